-- What is too large to be judged is kept with its head only: how long its body was, and why it is too large. The digest is
-- that of the whole body. Null: the message is kept as it was received.
ALTER TABLE settled.dead_letters
    ADD COLUMN body_length bigint CHECK (body_length >= octet_length(body)),
    ADD COLUMN too_large text,
    ADD CHECK ((body_length IS NULL) = (too_large IS NULL));

-- How many dead letters a batch published, copies of one message counted once. Null: written before this was counted.
ALTER TABLE settled.batches ADD COLUMN letters integer CHECK (letters >= 0);
-- How many of them were taken, by when their batch was: a dead letter that never came is missing here.
CREATE TABLE settled.letters_taken (
    failed_at  timestamptz PRIMARY KEY,
    letters    bigint NOT NULL CHECK (letters > 0)
);
-- Who stores dead letters counts them.
DO $$
DECLARE
    held record;
BEGIN
    FOR held IN
        SELECT DISTINCT a.grantee::regrole AS role
        FROM pg_class AS c
        CROSS JOIN LATERAL aclexplode(c.relacl) AS a
        WHERE c.oid = 'settled.dead_letters'::regclass
          AND a.privilege_type = 'INSERT'
          AND a.grantee <> 0
          AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT SELECT, INSERT, UPDATE ON settled.letters_taken TO %s', held.role);
    END LOOP;
END
$$;
