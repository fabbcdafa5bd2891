-- What was told once is told the same way again, and every step of a life is kept with the batch that made it.

-- The first time that a refusal or a parking was told: one row an event's id, whatever comes again. Written only by batches
-- that refuse or park something.
CREATE TABLE settled.told (
    event_id       uuid PRIMARY KEY,
    -- Order of arrival: what is forgotten goes by it.
    seq            bigint GENERATED ALWAYS AS IDENTITY,
    at             timestamptz NOT NULL,
    batch_id       uuid NOT NULL,
    verdict        text COLLATE "C" NOT NULL CHECK (verdict IN ('parked', 'rejected')),
    reason         text COLLATE "C" NOT NULL,
    -- Whether the sender was. What strangers bring about is forgotten in time (events.remember, events.remember_max).
    proven         boolean NOT NULL,
    -- SHA-256 of the message.
    digest         bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- Where the message could be read: whose nonce, as in receipts, and the id that it names.
    key            uuid,
    allocation_id  uuid,
    -- What the event says besides, as JSON: a message's own words may hold what is no text to PostgreSQL.
    words          bytea NOT NULL
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX told_strangers ON settled.told (seq) WHERE NOT proven;
CREATE INDEX told_key ON settled.told (key) WHERE key IS NOT NULL;
CREATE INDEX told_allocation ON settled.told (allocation_id) WHERE allocation_id IS NOT NULL;

CREATE TRIGGER never_changed BEFORE UPDATE OR TRUNCATE ON settled.told
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE ON settled.told
    FOR EACH ROW WHEN (OLD.proven) EXECUTE FUNCTION settled.refuse_change();

-- Where the newest copy of a parked message asks to be answered too, as JSON.
ALTER TABLE settled.parked ADD COLUMN also_reply text;
