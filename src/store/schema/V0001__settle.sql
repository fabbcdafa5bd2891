-- The whole state of settled. Everything stands in the schema "settled", so that it can share a database with the custody
-- system that calls settled.reserve(). Migrations are added, never edited.

CREATE SCHEMA IF NOT EXISTS settled;

-- Who may speak -------------------------------------------------------------------------------------------------------

CREATE TABLE settled.partners (
    enterprise_id        text COLLATE "C" PRIMARY KEY
                         CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    name                 text NOT NULL CHECK (name <> ''),
    async_allocations    boolean NOT NULL DEFAULT true,
    async_deallocations  boolean NOT NULL DEFAULT true,
    -- The AMQP user that its messages must carry in user_id; null: any.
    broker_user          text,
    own_queue            boolean NOT NULL DEFAULT false,
    suspended_at         timestamptz,
    created_at           timestamptz NOT NULL DEFAULT now()
);

-- The primary key says that a key belongs to one partner only.
CREATE TABLE settled.partner_keys (
    public_key     bytea PRIMARY KEY
                   CHECK (octet_length(public_key) = 33 AND get_byte(public_key, 0) IN (2, 3)),
    enterprise_id  text COLLATE "C" NOT NULL REFERENCES settled.partners,
    valid_from     timestamptz NOT NULL DEFAULT now(),
    valid_until    timestamptz,
    revoked_at     timestamptz,
    reinstated_at  timestamptz,
    created_at     timestamptz NOT NULL DEFAULT now(),
    CHECK (valid_until IS NULL OR valid_until > valid_from)
);
CREATE INDEX partner_keys_enterprise_id ON settled.partner_keys (enterprise_id);

CREATE TABLE settled.connections (
    connection_id           uuid PRIMARY KEY,
    enterprise_id           text COLLATE "C" NOT NULL REFERENCES settled.partners,
    client_id               uuid NOT NULL,
    partners_client_id      text NOT NULL CHECK (octet_length(partners_client_id) BETWEEN 1 AND 1024),
    partners_connection_id  text NOT NULL CHECK (octet_length(partners_connection_id) BETWEEN 1 AND 1024),
    created_at              timestamptz NOT NULL DEFAULT now()
);

-- What a revoked key signed and was refused for: it never settles, whatever becomes of the key. Only who has held the
-- private key of a registered partner can add to it, and up to a number (REMEMBERED_MAX) a key; above it the key can not be
-- reinstated any more. The reference makes a batch that adds to it and a command that reinstates wait for each other.
CREATE TABLE settled.distrusted (
    public_key      bytea NOT NULL REFERENCES settled.partner_keys,
    -- SHA-256 of the signed text.
    payload_digest  bytea NOT NULL CHECK (octet_length(payload_digest) = 32),
    at              timestamptz NOT NULL,
    PRIMARY KEY (public_key, payload_digest)
);

-- Money ---------------------------------------------------------------------------------------------------------------

-- Funds, one row for each owner and currency; its balances move together more often than not (held to allocated), and are
-- locked and written once for both. An account is one balance of a row: settled.accounts shows them, settled.account() has
-- their numbers. A balance has no precision: it is a sum of quantities that may each be 2^256-1. The checks are the second
-- line of defence. Half of each page is free, so that a balance changes within its page.
CREATE TABLE settled.funds (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    holder     text COLLATE "C" NOT NULL CHECK (holder IN ('world', 'client', 'connection')),
    -- The client or the connection; of the world outside, which is nobody, the nil UUID, so that the index finds it too.
    owner      uuid NOT NULL,
    currency   text COLLATE "C" NOT NULL,
    -- The world's. The only one that may be negative.
    external   numeric NOT NULL DEFAULT 0,
    -- A client's.
    available  numeric NOT NULL DEFAULT 0,
    -- A connection's.
    held       numeric NOT NULL DEFAULT 0,
    allocated  numeric NOT NULL DEFAULT 0,
    UNIQUE (owner, currency, holder),
    CHECK (holder <> 'world' OR owner = '00000000-0000-0000-0000-000000000000'),
    CONSTRAINT funds_never_negative CHECK (available >= 0 AND held >= 0 AND allocated >= 0),
    -- NaN sorts above everything and passes any lower bound.
    CONSTRAINT funds_whole CHECK (
        external = trunc(external) AND external < 'Infinity' AND external > '-Infinity'
        AND available = trunc(available) AND available < 'Infinity'
        AND held = trunc(held) AND held < 'Infinity'
        AND allocated = trunc(allocated) AND allocated < 'Infinity'
    ),
    CONSTRAINT funds_of_the_holder CHECK (
        CASE holder
            WHEN 'connection' THEN external = 0 AND available = 0
            WHEN 'client' THEN external = 0 AND held = 0 AND allocated = 0
            ELSE available = 0 AND held = 0 AND allocated = 0
        END
    )
) WITH (fillfactor = 50);

-- As a constraint the form of a currency would be matched anew at each change of a balance, which was a good part of what
-- that cost.
CREATE FUNCTION settled.refuse_currency() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '"%" is no currency', NEW.currency
        USING ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'currency';
END
$$;

CREATE TRIGGER currency BEFORE INSERT OR UPDATE OF currency ON settled.funds
    FOR EACH ROW WHEN (NEW.currency !~ '^[A-Za-z0-9:._-]{1,64}$') EXECUTE FUNCTION settled.refuse_currency();

-- The number of an account: four for each row of funds, which is the number divided by four.
CREATE FUNCTION settled.account(funds bigint, kind text) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT funds * 4 + array_position(ARRAY['external', 'available', 'held', 'allocated'], kind) - 1
$$;

CREATE FUNCTION settled.kind_of(account bigint) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT (ARRAY['external', 'available', 'held', 'allocated'])[account % 4 + 1]
$$;

CREATE VIEW settled.accounts AS
SELECT settled.account(f.id, k.kind) AS id, k.kind, CASE WHEN f.holder <> 'world' THEN f.owner END AS owner, f.currency,
       k.balance
FROM settled.funds AS f
CROSS JOIN LATERAL (VALUES
    ('world', 'external', f.external),
    ('client', 'available', f.available),
    ('connection', 'held', f.held),
    ('connection', 'allocated', f.allocated)
) AS k (holder, kind, balance)
WHERE k.holder = f.holder;

CREATE TABLE settled.deposits (
    id          uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    client_id   uuid NOT NULL,
    reference   text NOT NULL CHECK (octet_length(reference) BETWEEN 1 AND 1024),
    currency    text COLLATE "C" NOT NULL,
    quantity    numeric(78, 0) NOT NULL
                CHECK (quantity BETWEEN 1 AND
                115792089237316195423570985008687907853269984665640564039457584007913129639935),
    created_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (client_id, reference)
);

-- One id space for allocations and deallocations. enterprise_id, client_id and the funds are copied from the connection and
-- its funds, which never change, so that a batch reads one row per message. What settling changes stands last: the log takes
-- a row from its first changed byte on. Half of each page is free, so that it changes within its page. No foreign keys to
-- funds, which every settlement would pay for: `settled ledger check` proves what they would.
CREATE TABLE settled.allocations (
    id                   uuid PRIMARY KEY,
    connection_id        uuid NOT NULL REFERENCES settled.connections,
    client_id            uuid NOT NULL,
    client_funds         bigint NOT NULL,
    connection_funds     bigint NOT NULL,
    created_at           timestamptz NOT NULL,
    type                 text NOT NULL CHECK (type IN ('allocation', 'deallocation')),
    currency             text COLLATE "C" NOT NULL,
    quantity             numeric(78, 0) NOT NULL
                         CHECK (quantity BETWEEN 1 AND
                115792089237316195423570985008687907853269984665640564039457584007913129639935),
    client_external_id   text NOT NULL,
    initiated_by         text NOT NULL,
    notes                text,
    -- What the reservation said, kept apart because settling overwrites reason and retriable.
    reserved_reason      text NOT NULL,
    reserved_retriable   boolean NOT NULL,
    -- From here on settling changes it.
    retriable            boolean NOT NULL,
    updated_at           timestamptz NOT NULL,
    status               text NOT NULL DEFAULT 'reserved' CHECK (status IN ('reserved', 'cleared', 'released')),
    reason               text,
    partner_external_id  text,
    evaluation_id        text,
    pending_approval_id  text,
    policy_result        text CHECK (policy_result IN ('approved', 'rejected')),
    settled_nonce        text,
    UNIQUE (client_id, client_external_id),
    CHECK ((status = 'reserved') = (settled_nonce IS NULL)),
    CHECK ((status = 'cleared') = (reason IS NULL))
) WITH (fillfactor = 50);

-- A text that is too long is refused when a row is inserted only: as a constraint it would be measured at every settlement.
CREATE FUNCTION settled.refuse_length() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a text of the new row in %.% is empty or longer than it may be', TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME;
END
$$;

CREATE TRIGGER lengths BEFORE INSERT ON settled.allocations
    FOR EACH ROW WHEN (
        octet_length(NEW.client_external_id) NOT BETWEEN 1 AND 1024
        OR octet_length(NEW.initiated_by) NOT BETWEEN 1 AND 1024
        OR octet_length(NEW.notes) NOT BETWEEN 1 AND 16384
        OR octet_length(NEW.reserved_reason) NOT BETWEEN 1 AND 16384
    ) EXECUTE FUNCTION settled.refuse_length();
CREATE TRIGGER lengths BEFORE INSERT OR UPDATE OF name, broker_user ON settled.partners
    FOR EACH ROW WHEN (
        octet_length(NEW.name) NOT BETWEEN 1 AND 1024
        OR octet_length(NEW.broker_user) NOT BETWEEN 1 AND 255
    ) EXECUTE FUNCTION settled.refuse_length();

-- subject_id is the allocation or the deposit. step 0 brings the funds in (deposit, reserve), step 1 settles: the primary key
-- lets an allocation leave 'reserved' once only, whatever the code above it does. What authorised a settlement stands in its
-- row: whose receipt, what was signed, and the signature. No foreign keys: they double the cost of a settlement; `settled
-- ledger check` proves what they would. No index on id: nobody looks for one.
CREATE TABLE settled.transfers (
    id              bigint GENERATED ALWAYS AS IDENTITY (CACHE 64),
    debit_account   bigint NOT NULL,
    credit_account  bigint NOT NULL CHECK (credit_account <> debit_account),
    created_at      timestamptz NOT NULL,
    subject_id      uuid NOT NULL,
    -- The batch that settled it; null for what a command did.
    batch_id        uuid,
    receipt_key     uuid,
    step            smallint NOT NULL CHECK (step IN (0, 1)),
    event           text NOT NULL CHECK (event IN ('deposit', 'reserved', 'cleared', 'released')),
    amount          numeric(78, 0) NOT NULL
                    CHECK (amount BETWEEN 1 AND
                115792089237316195423570985008687907853269984665640564039457584007913129639935),
    signature       bytea CHECK (octet_length(signature) = 65),
    payload         text,
    PRIMARY KEY (subject_id, step),
    CONSTRAINT transfers_authority CHECK (
        CASE step
            WHEN 1 THEN num_nulls(batch_id, receipt_key, signature, payload) = 0
            ELSE num_nonnulls(batch_id, receipt_key, signature, payload) = 0
        END
    )
);

-- Double entry: the two sides of each transfer, by what the account's balance changed. As rows of their own they would say
-- the same again.
CREATE VIEW settled.entries AS
SELECT t.id AS transfer_id, t.debit_account AS account_id, -t.amount AS change
FROM settled.transfers AS t
UNION ALL
SELECT t.id, t.credit_account, t.amount
FROM settled.transfers AS t;

-- Messages ------------------------------------------------------------------------------------------------------------

-- Kept for ever: with any retention an old message could be replayed. key is the head of SHA-256(enterprise_id, nonce),
-- short and of fixed width, because this index grows for ever.
CREATE TABLE settled.receipts (
    key             uuid PRIMARY KEY,
    allocation_id   uuid NOT NULL,
    event_id        uuid NOT NULL,
    -- The batch that gave the verdict.
    batch_id        uuid NOT NULL,
    first_seen      timestamptz NOT NULL,
    last_seen       timestamptz NOT NULL,
    verdict         text COLLATE "C" NOT NULL CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    enterprise_id   text COLLATE "C" NOT NULL,
    nonce           text NOT NULL,
    payload_digest  bytea NOT NULL CHECK (octet_length(payload_digest) = 32),
    message_digest  bytea NOT NULL CHECK (octet_length(message_digest) = 32),
    public_key      bytea NOT NULL CHECK (octet_length(public_key) = 33)
) WITH (fillfactor = 80);
-- Who asked for an allocation and did not settle it. The one that did is named by its transfer.
CREATE INDEX receipts_unsettled ON settled.receipts (allocation_id) WHERE verdict <> 'settled';

-- What authorised each settlement: of the receipt who and with which key, of the transfer what was signed.
CREATE VIEW settled.settlements AS
SELECT t.subject_id AS allocation_id, r.enterprise_id, r.nonce, t.payload, t.signature, r.public_key, t.batch_id,
       t.created_at AS settled_at
FROM settled.transfers AS t
JOIN settled.receipts AS r ON r.key = t.receipt_key
WHERE t.step = 1;

-- One row a batch: what came in and what became of it.
CREATE TABLE settled.batches (
    id         uuid PRIMARY KEY,
    worker     text NOT NULL,
    -- The door it came through: 'queue', 'parked', 'replayed' or 'dead'.
    source     text NOT NULL,
    at         timestamptz NOT NULL,
    received   integer NOT NULL,
    settled    integer NOT NULL,
    duplicate  integer NOT NULL,
    parked     integer NOT NULL,
    rejected   integer NOT NULL,
    -- Rejections by reason.
    reasons    jsonb NOT NULL,
    -- How many dead letters it published, copies of one message counted once.
    letters    integer CHECK (letters >= 0),
    CONSTRAINT batches_check CHECK (received = settled + duplicate + parked + rejected)
);

-- Messages that wait for their allocation; the row goes when they wait no more.
CREATE TABLE settled.parked (
    key            uuid PRIMARY KEY,
    seq            bigint GENERATED ALWAYS AS IDENTITY,
    enterprise_id  text COLLATE "C" NOT NULL,
    nonce          text NOT NULL,
    allocation_id  uuid NOT NULL,
    exchange       text NOT NULL,
    routing_key    text NOT NULL,
    -- AMQP properties and headers as JSON, in the numbered format.
    format         smallint NOT NULL,
    properties     text NOT NULL,
    body           bytea NOT NULL,
    parked_at      timestamptz NOT NULL,
    until          timestamptz NOT NULL,
    attempts       integer NOT NULL,
    due_at         timestamptz NOT NULL,
    -- A worker that claims it sets both due_at and this to the end of its lease; a due_at below it says that the message
    -- was woken while it was being judged.
    leased_until   timestamptz,
    -- A replayed message whose allocation is still missing is parked; what becomes of it then goes back to its row.
    dead_letter_id uuid,
    -- Where the newest copy of the message asks to be answered too, as JSON.
    also_reply     text,
    -- What it takes: a partner's are counted along the index.
    bytes          integer NOT NULL GENERATED ALWAYS AS (octet_length(body) + octet_length(properties)) STORED
);
ALTER TABLE settled.parked ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE INDEX parked_due_at ON settled.parked (due_at);
CREATE INDEX parked_allocation_id ON settled.parked (allocation_id);
CREATE INDEX parked_enterprise_id ON settled.parked (enterprise_id) INCLUDE (bytes);

-- What a parked message went through. Few messages are parked, so a row a step is cheap.
CREATE TABLE settled.parkings (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key            uuid NOT NULL,
    allocation_id  uuid NOT NULL,
    step           text NOT NULL CHECK (step IN ('parked', 'woken', 'left')),
    at             timestamptz NOT NULL
);
CREATE INDEX parkings_key ON settled.parkings (key);

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

-- The side room: messages that would make others wait, and bounds for it ----------------------------------------------

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

-- What is to be published ---------------------------------------------------------------------------------------------

-- One row a batch holds everything it has to publish, until every confirm is in. The lane that wrote it owns it while the
-- lease runs; after that any relay may take it.
CREATE TABLE settled.outbox (
    batch_id      uuid PRIMARY KEY,
    format        smallint NOT NULL,
    publications  bytea NOT NULL,
    count         integer NOT NULL,
    created_at    timestamptz NOT NULL,
    leased_until  timestamptz NOT NULL,
    -- A publication that the broker refused and an operator put back has a row of its own: this is whose it is. The row's own
    -- id is new, since whoever had the batch's row may delete by the batch's id once more.
    of_batch      uuid
) WITH (fillfactor = 50);
-- A batch's publications are much alike: to press them together is less work than to write and log them as they are. A server
-- that was built without lz4 keeps them as they are.
ALTER TABLE settled.outbox ALTER COLUMN publications SET STORAGE EXTERNAL;
DO $$
BEGIN
    ALTER TABLE settled.outbox ALTER COLUMN publications SET COMPRESSION lz4;
    ALTER TABLE settled.outbox ALTER COLUMN publications SET STORAGE EXTENDED;
EXCEPTION
    WHEN feature_not_supported THEN NULL;
END
$$;

-- Publications that the broker refused when each was published alone: for a person to look at.
CREATE TABLE settled.outbox_refused (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    batch_id      uuid NOT NULL,
    format        smallint NOT NULL,
    publications  bytea NOT NULL,
    -- Of publications: a crash between setting aside and deleting the row must not set the same aside twice.
    digest        bytea NOT NULL GENERATED ALWAYS AS (sha256(publications)) STORED,
    refusal       text NOT NULL,
    at            timestamptz NOT NULL DEFAULT now(),
    UNIQUE (batch_id, digest)
);

-- The operator's desk: every message that was refused, until a person is done with it, and what that person does ------

-- One row for a message (routing key and body), however often it fails or is copied. A replayed row changes in the very
-- transaction that judges the message again.
CREATE TABLE settled.dead_letters (
    -- The head of SHA-256 over everything of the message that is judged (see domain::dead_letter::Identity): whoever knows
    -- the message knows the id, so that a copy and a redelivery meet their row.
    id                uuid PRIMARY KEY,
    -- Order of arrival: pages and replays go by it.
    seq               bigint GENERATED ALWAYS AS IDENTITY,
    state             text COLLATE "C" NOT NULL DEFAULT 'open'
                      CHECK (state IN ('open', 'due', 'parked', 'settled', 'discarded')),
    exchange          text NOT NULL,
    routing_key       text NOT NULL,
    -- SHA-256 of body.
    digest            bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- AMQP properties and headers as the partner sent them, as JSON in the numbered format.
    format            smallint NOT NULL,
    properties        text NOT NULL,
    body              bytea NOT NULL,
    -- Where they can be read from it.
    enterprise_id     text COLLATE "C",
    nonce             text,
    allocation_id     uuid,
    reason            text COLLATE "C" NOT NULL,
    detail            text NOT NULL,
    -- The same for all of one partner, reason and kind of detail.
    group_id          text COLLATE "C" NOT NULL,
    -- Who made the dead letter: the worker's verdict, the broker by itself, or somebody by hand.
    made_by           text NOT NULL CHECK (made_by IN ('settled', 'broker', 'unknown')),
    first_failed_at   timestamptz NOT NULL,
    last_failed_at    timestamptz NOT NULL,
    times_seen        bigint NOT NULL DEFAULT 1 CHECK (times_seen > 0),
    collected_at      timestamptz NOT NULL,
    -- The run that replays it, or did last.
    run_id            bigint,
    -- A worker that takes a due row owns it until then.
    leased_until      timestamptz,
    -- What the last replay came to.
    replays           integer NOT NULL DEFAULT 0,
    verdict           text CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    judged_at         timestamptz,
    batch_id          uuid,
    discarded_at      timestamptz,
    -- What is too large to be judged is kept with its head only: how long its body was, and why it is too large. The digest
    -- is that of the whole body. Null: the message is kept as it was received.
    body_length       bigint CHECK (body_length >= octet_length(body)),
    too_large         text,
    -- Why it is settled without a replay.
    note              text,
    -- When it was last looked at whether it has settled since. Null: never.
    checked_at        timestamptz,
    CHECK ((body_length IS NULL) = (too_large IS NULL)),
    CHECK ((state = 'discarded') = (discarded_at IS NOT NULL)),
    CHECK (state <> 'due' OR run_id IS NOT NULL)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05);
ALTER TABLE settled.dead_letters ALTER COLUMN body SET STORAGE EXTERNAL;
-- Lists go by state and order of arrival. Everything that is filtered or counted by stands in the index, so that whatever
-- an operator asks for costs a walk along the index at most, and the table is visited for the rows that are shown.
CREATE INDEX dead_letters_state ON settled.dead_letters (state, seq)
    INCLUDE (id, enterprise_id, reason, group_id, last_failed_at);
-- Groups and counts are sums along this one, in its order.
CREATE INDEX dead_letters_group ON settled.dead_letters
    (state, group_id, enterprise_id, reason, first_failed_at, last_failed_at);
CREATE INDEX dead_letters_partner ON settled.dead_letters (enterprise_id, state, seq);
CREATE INDEX dead_letters_reason ON settled.dead_letters (reason, state, seq);
CREATE INDEX dead_letters_nonce ON settled.dead_letters (nonce);
CREATE INDEX dead_letters_allocation ON settled.dead_letters (allocation_id);
CREATE INDEX dead_letters_digest ON settled.dead_letters (digest);

-- How many dead letters of a batch's time were taken: one that never came is missing here.
CREATE TABLE settled.letters_taken (
    failed_at  timestamptz PRIMARY KEY,
    letters    bigint NOT NULL CHECK (letters > 0)
);

-- How many dead letters there are and how many bytes they take, by partner ('' where none can be read), as sums of rows:
-- whoever stores or deletes some adds a row, so that nobody waits for another's. The worker puts them together now and then.
CREATE TABLE settled.dead_letter_space (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL,
    rows           bigint NOT NULL,
    -- Of bodies and properties.
    bytes          bigint NOT NULL
);

CREATE FUNCTION settled.count_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
            SELECT coalesce(c.enterprise_id, ''), count(*), sum(octet_length(c.body) + octet_length(c.properties))
            FROM changed AS c
            GROUP BY 1;
        WHEN 'DELETE' THEN
            INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
            SELECT coalesce(c.enterprise_id, ''), -count(*), -sum(octet_length(c.body) + octet_length(c.properties))
            FROM changed AS c
            GROUP BY 1;
        ELSE
            DELETE FROM settled.dead_letter_space;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER counted_in AFTER INSERT ON settled.dead_letters
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();
CREATE TRIGGER counted_out AFTER DELETE ON settled.dead_letters
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();
CREATE TRIGGER counted_away AFTER TRUNCATE ON settled.dead_letters
    FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();

-- A selection, frozen, with what each message would have come to when it was made.
CREATE TABLE settled.plans (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    operator    text NOT NULL,
    filters     jsonb NOT NULL,
    messages    integer NOT NULL
);
CREATE TABLE settled.plan_items (
    plan_id         bigint NOT NULL REFERENCES settled.plans ON DELETE CASCADE,
    position        integer NOT NULL,
    dead_letter_id  uuid NOT NULL,
    verdict         text NOT NULL CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    detail          text,
    -- What would move.
    currency        text COLLATE "C",
    quantity        numeric(78, 0),
    PRIMARY KEY (plan_id, position),
    UNIQUE (plan_id, dead_letter_id),
    CHECK ((verdict = 'settled') = (quantity IS NOT NULL))
);

-- A replay of a plan.
CREATE TABLE settled.runs (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    plan_id       bigint NOT NULL REFERENCES settled.plans,
    -- 'stopped': by itself, because a verdict was not what the plan said, or none came; note says which.
    state         text NOT NULL CHECK (state IN ('running', 'cancelled', 'stopped', 'done')),
    note          text,
    operator      text NOT NULL,
    why           text NOT NULL CHECK (why <> ''),
    canary        integer CHECK (canary > 0),
    -- Messages a second; null: as fast as they are judged.
    rate          double precision CHECK (rate > 0),
    all_verdicts  boolean NOT NULL,
    started_at    timestamptz NOT NULL,
    changed_at    timestamptz NOT NULL,
    -- One program at a time marks its messages as due. Until then it is this one.
    driver        uuid,
    driven_until  timestamptz
);
CREATE TABLE settled.run_items (
    run_id          bigint NOT NULL REFERENCES settled.runs,
    position        integer NOT NULL,
    dead_letter_id  uuid NOT NULL,
    -- The plan's verdict.
    planned         text NOT NULL,
    state           text COLLATE "C" NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'due', 'judged', 'skipped')),
    verdict         text CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    -- Why it was skipped.
    note            text,
    judged_at       timestamptz,
    PRIMARY KEY (run_id, position),
    UNIQUE (run_id, dead_letter_id),
    CHECK ((state = 'judged') = (verdict IS NOT NULL))
);
CREATE INDEX run_items_state ON settled.run_items (run_id, state, position);
CREATE INDEX run_items_dead_letter_id ON settled.run_items (dead_letter_id);

-- Who did what, why, to what, and what came of it. Written by the transaction that did it.
CREATE TABLE settled.audit (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL,
    operator  text NOT NULL,
    act       text NOT NULL,
    why       text,
    filters   jsonb NOT NULL,
    outcome   jsonb NOT NULL,
    -- The run that it is about.
    run_id    bigint,
    -- As the server knows who did it, beside the operator's name, which anybody may type.
    session_name    text,
    client_address  inet
);
CREATE INDEX audit_run_id ON settled.audit (run_id);

-- Which messages an act changed by itself (discarded, restored, purged). What a run did stands in its items.
CREATE TABLE settled.audit_subjects (
    dead_letter_id  uuid NOT NULL,
    audit_id        bigint NOT NULL REFERENCES settled.audit,
    PRIMARY KEY (dead_letter_id, audit_id)
);

CREATE FUNCTION settled.sign_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.session_name := session_user;
    NEW.client_address := inet_client_addr();
    RETURN NEW;
END
$$;

CREATE TRIGGER signed BEFORE INSERT ON settled.audit FOR EACH ROW EXECUTE FUNCTION settled.sign_audit();

-- What is only ever added ---------------------------------------------------------------------------------------------

CREATE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: its rows are only ever added', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.transfers
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.batches
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.deposits
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.parkings
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.holdings
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.distrusted
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.audit
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.audit_subjects
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.receipts
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
-- A receipt that says settled is what authorised its transfer: only when it was last seen may change. After the change, since
-- a trigger before it locks every row anew.
CREATE TRIGGER settled_for_ever AFTER UPDATE ON settled.receipts
    FOR EACH ROW WHEN (
        OLD.verdict = 'settled'
        AND (OLD.key, OLD.allocation_id, OLD.event_id, OLD.batch_id, OLD.first_seen, OLD.verdict, OLD.reason,
             OLD.enterprise_id, OLD.nonce, OLD.payload_digest, OLD.message_digest, OLD.public_key)
            IS DISTINCT FROM
            (NEW.key, NEW.allocation_id, NEW.event_id, NEW.batch_id, NEW.first_seen, NEW.verdict, NEW.reason,
             NEW.enterprise_id, NEW.nonce, NEW.payload_digest, NEW.message_digest, NEW.public_key)
    ) EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_changed BEFORE UPDATE OR TRUNCATE ON settled.told
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE ON settled.told
    FOR EACH ROW WHEN (OLD.proven) EXECUTE FUNCTION settled.refuse_change();

-- Money in and money set aside ----------------------------------------------------------------------------------------

-- A batch's COMMIT travels with its statements: what touched another number of rows than it must fails by itself.
CREATE FUNCTION settled.exactly(what text, touched bigint, wanted bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF touched <> wanted THEN
        RAISE EXCEPTION '% touched % rows instead of %', what, touched, wanted USING ERRCODE = 'SX001';
    END IF;
END
$$;

-- Opens the funds that are missing, in one order everywhere.
CREATE FUNCTION settled.open_funds(holders text[], owners uuid[], currencies text[]) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO settled.funds (holder, owner, currency)
    SELECT DISTINCT holder, owner, currency
    FROM unnest(holders, owners, currencies) AS wanted (holder, owner, currency)
    WHERE NOT EXISTS (
        SELECT FROM settled.funds AS f
        WHERE f.owner = wanted.owner
          AND f.currency = wanted.currency
          AND f.holder = wanted.holder
    )
    ORDER BY holder, owner, currency
    ON CONFLICT DO NOTHING
$$;

-- Changes the balance of a locked account.
CREATE FUNCTION settled.change_balance(account bigint, change numeric) RETURNS void LANGUAGE sql AS $$
    UPDATE settled.funds
    SET external = external + CASE account % 4 WHEN 0 THEN change ELSE 0 END,
        available = available + CASE account % 4 WHEN 1 THEN change ELSE 0 END,
        held = held + CASE account % 4 WHEN 2 THEN change ELSE 0 END,
        allocated = allocated + CASE account % 4 WHEN 3 THEN change ELSE 0 END
    WHERE id = account / 4
$$;

-- Moves quantity between two locked accounts: one transfer, two balances.
CREATE FUNCTION settled.move(
    subject uuid, what text, debit bigint, credit bigint, quantity numeric, moment timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    VALUES (subject, 0, what, debit, credit, quantity, moment);
    PERFORM settled.change_balance(debit, -quantity);
    PERFORM settled.change_balance(credit, quantity);
END
$$;

-- Funds come in, once per client and reference: 'deposited', 'exists', or 'conflict' (other content before).
CREATE FUNCTION settled.deposit(client uuid, money text, quantity numeric, ref text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    made uuid;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    source bigint;
    target bigint;
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
BEGIN
    -- The rules of `settled deposit`. numeric(78, 0) would round a fraction silently; NaN sorts above everything.
    IF client IS NULL THEN
        RAISE EXCEPTION 'client: is missing' USING ERRCODE = '22023';
    ELSIF money IS NULL OR money !~ '^[A-Za-z0-9:._-]{1,64}$' THEN
        RAISE EXCEPTION 'currency: must be 1 to 64 letters, digits, :, ., _ and -' USING ERRCODE = '22023';
    ELSIF quantity IS NULL OR quantity <> trunc(quantity) OR quantity = 'NaN' THEN
        RAISE EXCEPTION 'quantity: must be a whole number' USING ERRCODE = '22003';
    ELSIF quantity NOT BETWEEN 1 AND 115792089237316195423570985008687907853269984665640564039457584007913129639935 THEN
        RAISE EXCEPTION 'quantity: must be 1 to 2^256-1' USING ERRCODE = '22003';
    ELSIF ref IS NULL OR octet_length(ref) NOT BETWEEN 1 AND 1024 THEN
        RAISE EXCEPTION 'reference: must be 1 to 1024 bytes' USING ERRCODE = '22023';
    END IF;
    INSERT INTO settled.deposits (client_id, reference, currency, quantity)
    VALUES (client, ref, money, quantity)
    ON CONFLICT (client_id, reference) DO NOTHING
    RETURNING id INTO made;
    IF made IS NULL THEN
        RETURN CASE WHEN EXISTS (
            SELECT FROM settled.deposits AS d
            WHERE d.client_id = client AND d.reference = ref AND d.currency = money AND d.quantity = deposit.quantity
        ) THEN 'exists' ELSE 'conflict' END;
    END IF;
    PERFORM settled.open_funds(ARRAY['world', 'client'], ARRAY[nobody, client], ARRAY[money, money]);
    PERFORM FROM settled.funds AS f
    WHERE f.currency = money AND ((f.holder = 'world' AND f.owner = nobody) OR (f.holder = 'client' AND f.owner = client))
    ORDER BY f.id
    FOR NO KEY UPDATE;
    SELECT settled.account(f.id, 'external') INTO STRICT source
    FROM settled.funds AS f WHERE f.holder = 'world' AND f.owner = nobody AND f.currency = money;
    SELECT settled.account(f.id, 'available') INTO STRICT target
    FROM settled.funds AS f WHERE f.holder = 'client' AND f.owner = client AND f.currency = money;
    PERFORM settled.move(made, 'deposit', source, target, quantity, moment);
    RETURN 'deposited';
END
$$;

-- Why a reservation is none, by its own text alone: the first rule that it breaks, as "field: rule". Null: it is one. What
-- `settled allocation reserve` refuses, settled.reserve() refuses.
CREATE FUNCTION settled.reservation_fault(reservation jsonb) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    field text;
    part jsonb;
    said text;
BEGIN
    IF reservation IS NULL OR jsonb_typeof(reservation) <> 'object' THEN
        RETURN 'must be a JSON object';
    END IF;
    SELECT k INTO field
    FROM jsonb_object_keys(reservation - ARRAY[
        'id', 'type', 'connectionId', 'amount', 'clientExternalId', 'initiatedBy', 'notes', 'reason', 'retriable'
    ]) AS k
    ORDER BY k COLLATE "C"
    LIMIT 1;
    IF FOUND THEN
        RETURN format(
            'unknown field "%s": a reservation has id, type, connectionId, amount, clientExternalId, initiatedBy, '
            'and may have notes, reason, retriable', left(field, 64)
        );
    END IF;
    FOREACH field IN ARRAY ARRAY[
        'id', 'type', 'connectionId', 'amount', 'amount.currency', 'amount.quantity', 'clientExternalId', 'initiatedBy',
        'notes', 'reason', 'retriable'
    ] LOOP
        part := reservation #> string_to_array(field, '.');
        IF part IS NULL THEN
            IF field IN ('notes', 'reason', 'retriable') THEN
                CONTINUE;
            END IF;
            RETURN field || ': is missing';
        END IF;
        IF field = 'amount' THEN
            IF jsonb_typeof(part) <> 'object' THEN
                RETURN 'amount: must be an object';
            END IF;
            SELECT k INTO said
            FROM jsonb_object_keys(part - ARRAY['currency', 'quantity']) AS k
            ORDER BY k COLLATE "C"
            LIMIT 1;
            IF FOUND THEN
                RETURN format('unknown field "amount.%s": an amount has currency and quantity', left(said, 64));
            END IF;
            CONTINUE;
        END IF;
        IF field = 'retriable' THEN
            IF jsonb_typeof(part) <> 'boolean' THEN
                RETURN 'retriable: must be true or false';
            END IF;
            CONTINUE;
        END IF;
        IF jsonb_typeof(part) <> 'string' THEN
            RETURN field || ': must be a string';
        END IF;
        said := part #>> '{}';
        CASE field
            WHEN 'id', 'connectionId' THEN
                IF said !~ '^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$' THEN
                    RETURN field || ': must be a UUID, 8-4-4-4-12';
                END IF;
            WHEN 'type' THEN
                IF said NOT IN ('allocation', 'deallocation') THEN
                    RETURN 'type: must be allocation or deallocation';
                END IF;
            WHEN 'amount.currency' THEN
                IF said !~ '^[A-Za-z0-9:._-]{1,64}$' THEN
                    RETURN 'amount.currency: must be 1 to 64 letters, digits, :, ., _ and -';
                END IF;
            WHEN 'amount.quantity' THEN
                IF said !~ '^[0-9]+$' THEN
                    RETURN 'amount.quantity: must be decimal digits';
                ELSIF said LIKE '0%' THEN
                    RETURN 'amount.quantity: must be at least 1 and have no leading zeros';
                ELSIF length(said) > 78
                   OR said::numeric > 115792089237316195423570985008687907853269984665640564039457584007913129639935 THEN
                    RETURN 'amount.quantity: must be at most 2^256-1';
                END IF;
            WHEN 'notes', 'reason' THEN
                IF octet_length(said) NOT BETWEEN 1 AND 16384 THEN
                    RETURN field || ': must be 1 to 16384 bytes';
                END IF;
            ELSE
                IF octet_length(said) NOT BETWEEN 1 AND 1024 THEN
                    RETURN field || ': must be 1 to 1024 bytes';
                END IF;
        END CASE;
    END LOOP;
    RETURN NULL;
END
$$;

-- Reserves allocations and deallocations. The custody system calls it as the last statement before the COMMIT of its own
-- transaction: it locks funds until then, and parked messages become due at that COMMIT.
--
-- reservations is a JSON array of {id, type, connectionId, amount: {currency, quantity}, clientExternalId, initiatedBy,
-- notes?, reason?, retriable?}; one row comes back for each, in order: result 'reserved', 'exists' (the same content
-- again) or 'refused' with reason 'conflict', 'insufficient_funds', 'unknown_connection' or 'invalid_field'; the detail
-- begins with the name of the field that is in the way (id is null where none can be read). Each is judged on its own and sees those before it. What is no array
-- raises an error.
--
-- Locks allocations, then parked messages, then funds, each in key order, as the settling batch does.
CREATE FUNCTION settled.reserve(reservations jsonb) RETURNS TABLE (
    ordinal integer, id uuid, result text, reason text, detail text
)
LANGUAGE plpgsql AS $$
DECLARE
    -- Why each is none, and those that are.
    faults text[];
    sound jsonb;
    asked record;
    wish record;
    link record;
    earlier record;
    taken uuid;
    books record;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    source bigint;
    funds numeric;
BEGIN
    IF jsonb_typeof(reservations) <> 'array' THEN
        RAISE EXCEPTION 'reservations are a JSON array of objects' USING ERRCODE = '22023';
    END IF;
    SELECT array_agg(settled.reservation_fault(e.r) ORDER BY e.n) INTO faults
    FROM jsonb_array_elements(reservations) WITH ORDINALITY AS e (r, n);
    SELECT coalesce(jsonb_agg(e.r ORDER BY e.n), '[]') INTO sound
    FROM jsonb_array_elements(reservations) WITH ORDINALITY AS e (r, n)
    WHERE faults[e.n] IS NULL;

    PERFORM FROM settled.allocations AS a
    WHERE a.id IN (SELECT (r ->> 'id')::uuid FROM jsonb_array_elements(sound) AS r)
    ORDER BY a.id
    FOR NO KEY UPDATE;

    -- Wakes what waits for these ids. Before the funds are locked, or it could deadlock with a batch that judges one of
    -- them; a message parked after this line is judged again soon by itself.
    WITH waiting AS (
        SELECT p.key
        FROM settled.parked AS p
        WHERE p.allocation_id IN (SELECT (r ->> 'id')::uuid FROM jsonb_array_elements(sound) AS r)
        ORDER BY p.key
        FOR UPDATE
    ), woken AS (
        UPDATE settled.parked AS p
        SET due_at = least(p.due_at, moment)
        FROM waiting AS w
        WHERE p.key = w.key
        RETURNING p.key, p.allocation_id
    )
    INSERT INTO settled.parkings (key, allocation_id, step, at)
    SELECT w.key, w.allocation_id, 'woken', moment
    FROM woken AS w;

    PERFORM settled.open_funds(array_agg(k.holder), array_agg(k.owner), array_agg(k.currency))
    FROM jsonb_array_elements(sound) AS r
    JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
    CROSS JOIN LATERAL (VALUES
        ('client', c.client_id, r -> 'amount' ->> 'currency'),
        ('connection', c.connection_id, r -> 'amount' ->> 'currency')
    ) AS k (holder, owner, currency);

    PERFORM FROM settled.funds AS f
    WHERE f.id IN (
        SELECT x.id
        FROM jsonb_array_elements(sound) AS r
        JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
        JOIN settled.funds AS x
          ON x.currency = r -> 'amount' ->> 'currency'
         AND ((x.holder = 'client' AND x.owner = c.client_id)
           OR (x.holder = 'connection' AND x.owner = c.connection_id))
    )
    ORDER BY f.id
    FOR NO KEY UPDATE;

    FOR asked IN
        SELECT e.n::integer AS ordinal, e.r AS said
        FROM jsonb_array_elements(reservations) WITH ORDINALITY AS e (r, n)
        ORDER BY e.n
    LOOP
        ordinal := asked.ordinal;
        reason := NULL;
        detail := faults[asked.ordinal];
        IF detail IS NOT NULL THEN
            id := CASE
                WHEN jsonb_typeof(asked.said) = 'object'
                 AND jsonb_typeof(asked.said -> 'id') = 'string'
                 AND asked.said ->> 'id' ~ '^[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$'
                THEN (asked.said ->> 'id')::uuid
            END;
            result := 'refused';
            reason := 'invalid_field';
            RETURN NEXT;
            CONTINUE;
        END IF;
        SELECT (asked.said ->> 'id')::uuid AS id,
               asked.said ->> 'type' AS type,
               (asked.said ->> 'connectionId')::uuid AS connection_id,
               asked.said -> 'amount' ->> 'currency' AS currency,
               (asked.said -> 'amount' ->> 'quantity')::numeric(78, 0) AS quantity,
               asked.said ->> 'clientExternalId' AS client_external_id,
               asked.said ->> 'initiatedBy' AS initiated_by,
               asked.said ->> 'notes' AS notes,
               coalesce(asked.said ->> 'reason', 'awaiting the partner''s update') AS reason,
               coalesce((asked.said ->> 'retriable')::boolean, false) AS retriable
        INTO wish;
        id := wish.id;

        SELECT a.* INTO earlier FROM settled.allocations AS a WHERE a.id = wish.id;
        IF FOUND THEN
            result := 'exists';
            SELECT d.field || ': this id is reserved with ' || coalesce(d.shown, 'another one') INTO detail
            FROM (VALUES
                (1, 'type', earlier.type IS DISTINCT FROM wish.type, earlier.type),
                (2, 'connectionId', earlier.connection_id IS DISTINCT FROM wish.connection_id,
                    earlier.connection_id::text),
                (3, 'amount.currency', earlier.currency IS DISTINCT FROM wish.currency, earlier.currency),
                (4, 'amount.quantity', earlier.quantity IS DISTINCT FROM wish.quantity, earlier.quantity::text),
                (5, 'clientExternalId', earlier.client_external_id IS DISTINCT FROM wish.client_external_id, NULL),
                (6, 'initiatedBy', earlier.initiated_by IS DISTINCT FROM wish.initiated_by, NULL),
                (7, 'notes', earlier.notes IS DISTINCT FROM wish.notes, NULL),
                (8, 'reason', earlier.reserved_reason IS DISTINCT FROM wish.reason, NULL),
                (9, 'retriable', earlier.reserved_retriable IS DISTINCT FROM wish.retriable,
                    earlier.reserved_retriable::text)
            ) AS d (place, field, differs, shown)
            WHERE d.differs
            ORDER BY d.place
            LIMIT 1;
            IF FOUND THEN
                result := 'refused';
                reason := 'conflict';
            END IF;
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT c.* INTO link FROM settled.connections AS c WHERE c.connection_id = wish.connection_id;
        IF NOT FOUND THEN
            result := 'refused';
            reason := 'unknown_connection';
            detail := 'connectionId: no connection of this id is registered';
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT a.id INTO taken
        FROM settled.allocations AS a
        WHERE a.client_id = link.client_id AND a.client_external_id = wish.client_external_id
        LIMIT 1;
        IF FOUND THEN
            result := 'refused';
            reason := 'conflict';
            detail := 'clientExternalId: this client used it before, for ' || taken;
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT max(f.id) FILTER (WHERE f.holder = 'client') AS client,
               max(f.id) FILTER (WHERE f.holder = 'connection') AS connection
        INTO books
        FROM settled.funds AS f
        WHERE f.currency = wish.currency
          AND ((f.holder = 'client' AND f.owner = link.client_id)
            OR (f.holder = 'connection' AND f.owner = link.connection_id));

        source := CASE wish.type
            WHEN 'allocation' THEN settled.account(books.client, 'available')
            ELSE settled.account(books.connection, 'allocated')
        END;
        SELECT CASE wish.type WHEN 'allocation' THEN f.available ELSE f.allocated END INTO STRICT funds
        FROM settled.funds AS f
        WHERE f.id = CASE wish.type WHEN 'allocation' THEN books.client ELSE books.connection END;
        IF funds < wish.quantity THEN
            result := 'refused';
            reason := 'insufficient_funds';
            detail := format(
                'amount.quantity: %s is more than the %s %s that are %s', wish.quantity, funds, wish.currency,
                CASE wish.type WHEN 'allocation' THEN 'available' ELSE 'allocated' END
            );
            RETURN NEXT;
            CONTINUE;
        END IF;

        INSERT INTO settled.allocations (
            id, type, connection_id, client_id, currency, quantity, client_external_id, initiated_by, notes,
            reserved_reason, reserved_retriable, reason, retriable,
            client_funds, connection_funds, created_at, updated_at
        ) VALUES (
            wish.id, wish.type, wish.connection_id, link.client_id, wish.currency, wish.quantity,
            wish.client_external_id, wish.initiated_by, wish.notes,
            wish.reason, wish.retriable, wish.reason, wish.retriable,
            books.client, books.connection, moment, moment
        ) ON CONFLICT DO NOTHING;
        -- Another transaction took the id or the clientExternalId just now, on a connection whose funds are not ours.
        IF NOT FOUND THEN
            result := 'refused';
            reason := 'conflict';
            detail := 'id: it, or the clientExternalId, was taken by somebody else just now';
            RETURN NEXT;
            CONTINUE;
        END IF;
        PERFORM settled.move(
            wish.id, 'reserved', source, settled.account(books.connection, 'held'), wish.quantity, moment
        );
        result := 'reserved';
        RETURN NEXT;
    END LOOP;
END
$$;

-- Who may ask over HTTP, and for whom ---------------------------------------------------------------------------------

-- A client's enterprise, as which it reads over HTTP. An enterprise may have several clients, a client has one enterprise.
CREATE TABLE settled.clients (
    client_id      uuid PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    created_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp())
);
CREATE INDEX clients_enterprise_id ON settled.clients (enterprise_id);

-- Of a token only a digest is kept: whoever reads this table can not ask with it. The secret has 256 bits of chance, so that
-- one SHA-256 is as good as a slow hash: nobody tries that many.
CREATE TABLE settled.tokens (
    id             uuid PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    role           text NOT NULL CHECK (role IN ('partner', 'client')),
    digest         bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- What people call it.
    name           text NOT NULL CHECK (octet_length(name) <= 255),
    -- Requests a second; null: as the setting says.
    rate           integer CHECK (rate BETWEEN 1 AND 1000000),
    expires_at     timestamptz NOT NULL,
    revoked_at     timestamptz,
    created_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp())
);
CREATE INDEX tokens_enterprise_id ON settled.tokens (enterprise_id);

-- Pages of what stands on a connection, the oldest first. Neither column is ever changed.
CREATE INDEX allocations_connection_id_created_at ON settled.allocations (connection_id, created_at, id);
CREATE INDEX connections_enterprise_id ON settled.connections (enterprise_id, connection_id);
CREATE INDEX connections_client_id ON settled.connections (client_id);
