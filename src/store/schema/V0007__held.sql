-- A side room for messages that would make others wait, and bounds for it.

-- Messages taken from a queue, acknowledged, and not judged yet: what one partner sent beyond its share, or faster than its
-- rate, and what needs rows that somebody's open transaction has locked. A row is a pack of messages with one owner, since to
-- store hundreds in a row costs no more than to store one; it is judged as a whole, or cut in two first.
CREATE TABLE settled.held (
    id            uuid PRIMARY KEY,
    -- Oldest first.
    seq           bigint GENERATED ALWAYS AS IDENTITY,
    -- The enterprise in the routing keys; null: nobody we know.
    whose         text COLLATE "C",
    why           text COLLATE "C" NOT NULL CHECK (why IN ('share', 'rate', 'locked')),
    messages      integer NOT NULL CHECK (messages > 0),
    -- Of the bodies and properties.
    bytes         bigint NOT NULL CHECK (bytes >= 0),
    format        smallint NOT NULL,
    -- Routing keys, properties and bodies as received, in the numbered format.
    content       bytea NOT NULL,
    -- SHA-256 of each body, one after the other: so that a message is found here.
    digests       bytea NOT NULL,
    held_at       timestamptz NOT NULL,
    due_at        timestamptz NOT NULL,
    attempts      integer NOT NULL DEFAULT 0,
    -- A worker that takes it owns it until then.
    leased_until  timestamptz,
    CHECK (octet_length(digests) = 32 * messages)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05);
CREATE INDEX held_due_at ON settled.held (due_at);
DO $$
BEGIN
    ALTER TABLE settled.held ALTER COLUMN content SET COMPRESSION lz4;
EXCEPTION
    WHEN feature_not_supported THEN NULL;
END
$$;

-- What came into the side room and what left it, so that one that vanished is seen. What is cut in two leaves as 'split' and
-- comes in again.
CREATE TABLE settled.holdings (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    held_id   uuid NOT NULL,
    step      text COLLATE "C" NOT NULL CHECK (step IN ('held', 'split', 'left')),
    messages  integer NOT NULL CHECK (messages > 0),
    at        timestamptz NOT NULL,
    -- The batch that judged it.
    batch_id  uuid,
    CHECK ((step = 'left') = (batch_id IS NOT NULL))
);
CREATE INDEX holdings_held_id ON settled.holdings (held_id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.holdings
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- What a parked message takes: its partner's are counted along the index.
ALTER TABLE settled.parked ADD COLUMN bytes integer NOT NULL
    GENERATED ALWAYS AS (octet_length(body) + octet_length(properties)) STORED;
DROP INDEX settled.parked_enterprise_id;
CREATE INDEX parked_enterprise_id ON settled.parked (enterprise_id) INCLUDE (bytes);
