-- Whether the books are as new as the world. Workers tell the broker which batch they committed last; books that lack it are a
-- backup that was taken up again, or a standby that had not heard everything. No worker goes on with such books until two people
-- accept the loss, and then in a new epoch: what was told of earlier ones counts no more.

CREATE TABLE settled.epochs (
    epoch     integer PRIMARY KEY CHECK (epoch > 0),
    -- Which books these are: made once. A copy of them has the same, which is how it is told from other books.
    books     uuid NOT NULL,
    begun_at  timestamptz NOT NULL
);
INSERT INTO settled.epochs (epoch, books, begun_at)
VALUES (1, gen_random_uuid(), date_trunc('milliseconds', clock_timestamp()));
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.epochs
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Acts that take two people and have no plan: who said that they shall be done, until when that counts. The second one does it.
CREATE TABLE settled.voices (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    act             text COLLATE "C" NOT NULL CHECK (act IN ('recover', 'purge')),
    -- What exactly: two people mean the same if it is the same.
    subject         text NOT NULL CHECK (octet_length(subject) BETWEEN 1 AND 255),
    at              timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL CHECK (expires_at > at),
    operator        text NOT NULL,
    why             text NOT NULL CHECK (why <> ''),
    voucher         text,
    session_name    text,
    client_address  inet
);
CREATE INDEX voices_subject ON settled.voices (act, subject);
CREATE TRIGGER signed BEFORE INSERT ON settled.voices FOR EACH ROW EXECUTE FUNCTION settled.sign_audit();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.voices
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Why a change is refused, by what refuses it.
CREATE OR REPLACE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: %', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME, CASE TG_NAME
        WHEN 'fixed' THEN 'these columns never change'
        WHEN 'terminal' THEN 'what is cleared or released never changes'
        WHEN 'final_for_ever' THEN 'a receipt that is final never changes'
        WHEN 'settled_for_ever' THEN 'a receipt that says settled never changes'
        WHEN 'never_changed' THEN 'its rows never change'
        WHEN 'never_forgotten' THEN 'its rows are never deleted'
        ELSE 'its rows are only ever added'
    END;
END
$$;
