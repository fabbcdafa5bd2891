-- The whole state of settled. Everything stands in the schema "settled", so that it can share a database with the custody
-- system that calls settled.reserve(). Migrations are added, never edited.

CREATE SCHEMA IF NOT EXISTS settled;

-- Who may speak ------------------------------------------------------------------------------------------------------

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

-- Money --------------------------------------------------------------------------------------------------------------

-- balance has no precision: it is a sum of quantities that may each be 2^256-1. The check is the second line of defence.
CREATE TABLE settled.accounts (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind      text NOT NULL CHECK (kind IN ('external', 'available', 'held', 'allocated')),
    -- The client of 'available', the connection of 'held' and 'allocated', nobody of 'external'.
    owner     uuid,
    currency  text COLLATE "C" NOT NULL CHECK (currency ~ '^[A-Za-z0-9:._-]{1,64}$'),
    balance   numeric NOT NULL DEFAULT 0,
    UNIQUE NULLS NOT DISTINCT (kind, owner, currency),
    CHECK ((kind = 'external') = (owner IS NULL)),
    CONSTRAINT accounts_never_negative CHECK (kind = 'external' OR balance >= 0),
    -- NaN sorts above everything and passes any lower bound.
    CHECK (balance = trunc(balance) AND balance < 'Infinity' AND balance > '-Infinity')
) WITH (fillfactor = 50);

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

-- One id space for allocations and deallocations. enterprise_id, client_id and the account numbers are copied from the
-- connection and the accounts, which never change, so that a batch reads one row per message.
CREATE TABLE settled.allocations (
    id                   uuid PRIMARY KEY,
    type                 text NOT NULL CHECK (type IN ('allocation', 'deallocation')),
    status               text NOT NULL DEFAULT 'reserved' CHECK (status IN ('reserved', 'cleared', 'released')),
    connection_id        uuid NOT NULL REFERENCES settled.connections,
    client_id            uuid NOT NULL,
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
    reason               text,
    retriable            boolean NOT NULL,
    partner_external_id  text,
    evaluation_id        text,
    pending_approval_id  text,
    policy_result        text CHECK (policy_result IN ('approved', 'rejected')),
    settled_nonce        text,
    available_account    bigint NOT NULL REFERENCES settled.accounts,
    held_account         bigint NOT NULL REFERENCES settled.accounts,
    allocated_account    bigint NOT NULL REFERENCES settled.accounts,
    created_at           timestamptz NOT NULL,
    updated_at           timestamptz NOT NULL,
    UNIQUE (client_id, client_external_id),
    CHECK ((status = 'reserved') = (settled_nonce IS NULL)),
    CHECK ((status = 'cleared') = (reason IS NULL))
) WITH (fillfactor = 50);

-- subject_id is the allocation or the deposit. step 0 brings the funds in (deposit, reserve), step 1 settles: the unique
-- index lets an allocation leave 'reserved' once only, whatever the code above it does. No foreign keys: they double the
-- cost of a settlement; `settled ledger check` proves what they would.
CREATE TABLE settled.transfers (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subject_id      uuid NOT NULL,
    step            smallint NOT NULL CHECK (step IN (0, 1)),
    event           text NOT NULL CHECK (event IN ('deposit', 'reserved', 'cleared', 'released')),
    debit_account   bigint NOT NULL,
    credit_account  bigint NOT NULL CHECK (credit_account <> debit_account),
    amount          numeric(78, 0) NOT NULL
                    CHECK (amount BETWEEN 1 AND
                115792089237316195423570985008687907853269984665640564039457584007913129639935),
    -- The batch that settled it; null for what a command did.
    batch_id        uuid,
    created_at      timestamptz NOT NULL,
    UNIQUE (subject_id, step)
);

CREATE TABLE settled.entries (
    transfer_id  bigint NOT NULL,
    account_id   bigint NOT NULL,
    -- What the account's balance changed by.
    change       numeric NOT NULL
                 CHECK (change <> 0 AND change = trunc(change) AND change < 'Infinity' AND change > '-Infinity'),
    PRIMARY KEY (transfer_id, account_id)
);

-- What authorised each settlement.
CREATE TABLE settled.settlements (
    allocation_id  uuid PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL,
    nonce          text NOT NULL,
    payload        text NOT NULL,
    signature      bytea NOT NULL CHECK (octet_length(signature) = 65),
    public_key     bytea NOT NULL CHECK (octet_length(public_key) = 33),
    batch_id       uuid NOT NULL,
    settled_at     timestamptz NOT NULL
);

-- Messages -----------------------------------------------------------------------------------------------------------

-- Kept for ever: with any retention an old message could be replayed. key is the head of SHA-256(enterprise_id, nonce),
-- short and of fixed width, because this index grows for ever.
CREATE TABLE settled.receipts (
    key             uuid PRIMARY KEY,
    enterprise_id   text COLLATE "C" NOT NULL,
    nonce           text NOT NULL,
    payload_digest  bytea NOT NULL CHECK (octet_length(payload_digest) = 32),
    message_digest  bytea NOT NULL CHECK (octet_length(message_digest) = 32),
    verdict         text NOT NULL CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    allocation_id   uuid NOT NULL,
    event_id        uuid NOT NULL,
    public_key      bytea NOT NULL,
    -- The batch that gave the verdict.
    batch_id        uuid NOT NULL,
    first_seen      timestamptz NOT NULL,
    last_seen       timestamptz NOT NULL
) WITH (fillfactor = 80);
CREATE INDEX receipts_allocation_id ON settled.receipts (allocation_id);

-- One row a batch: what came in and what became of it.
CREATE TABLE settled.batches (
    id         uuid PRIMARY KEY,
    worker     text NOT NULL,
    -- 'queue' or 'parked'.
    source     text NOT NULL,
    at         timestamptz NOT NULL,
    received   integer NOT NULL,
    settled    integer NOT NULL,
    duplicate  integer NOT NULL,
    parked     integer NOT NULL,
    rejected   integer NOT NULL,
    -- Rejections by reason.
    reasons    jsonb NOT NULL,
    CHECK (received = settled + duplicate + parked + rejected)
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
    leased_until   timestamptz
);
ALTER TABLE settled.parked ALTER COLUMN body SET STORAGE EXTERNAL;
CREATE INDEX parked_due_at ON settled.parked (due_at);
CREATE INDEX parked_allocation_id ON settled.parked (allocation_id);
CREATE INDEX parked_enterprise_id ON settled.parked (enterprise_id);

-- What a parked message went through. Few messages are parked, so a row a step is cheap.
CREATE TABLE settled.parkings (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key            uuid NOT NULL,
    allocation_id  uuid NOT NULL,
    step           text NOT NULL CHECK (step IN ('parked', 'woken', 'left')),
    at             timestamptz NOT NULL
);
CREATE INDEX parkings_key ON settled.parkings (key);

-- One row a batch holds everything it has to publish, until every confirm is in. The lane that wrote it owns it while the
-- lease runs; after that any relay may take it.
CREATE TABLE settled.outbox (
    batch_id      uuid PRIMARY KEY,
    format        smallint NOT NULL,
    publications  bytea NOT NULL,
    count         integer NOT NULL,
    created_at    timestamptz NOT NULL,
    leased_until  timestamptz NOT NULL
) WITH (fillfactor = 50);
ALTER TABLE settled.outbox ALTER COLUMN publications SET STORAGE EXTERNAL;

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

-- What is only ever added --------------------------------------------------------------------------------------------

CREATE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: its rows are only ever added', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.transfers
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.entries
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.settlements
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.batches
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.deposits
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.parkings
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.receipts
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Money in and money set aside ---------------------------------------------------------------------------------------

-- Creates the accounts that are missing, in one order everywhere.
CREATE FUNCTION settled.open_accounts(kinds text[], owners uuid[], currencies text[]) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO settled.accounts (kind, owner, currency)
    SELECT DISTINCT kind, owner, currency
    FROM unnest(kinds, owners, currencies) AS wanted (kind, owner, currency)
    WHERE NOT EXISTS (
        SELECT FROM settled.accounts AS account
        WHERE account.kind = wanted.kind
          AND account.owner IS NOT DISTINCT FROM wanted.owner
          AND account.currency = wanted.currency
    )
    ORDER BY kind, owner, currency
    ON CONFLICT DO NOTHING
$$;

-- Moves quantity between two locked accounts: one transfer, two entries, two balances.
CREATE FUNCTION settled.move(
    subject uuid, what text, debit bigint, credit bigint, quantity numeric, moment timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moved bigint;
BEGIN
    INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    VALUES (subject, 0, what, debit, credit, quantity, moment)
    RETURNING id INTO moved;
    INSERT INTO settled.entries (transfer_id, account_id, change)
    VALUES (moved, debit, -quantity), (moved, credit, quantity);
    UPDATE settled.accounts SET balance = balance - quantity WHERE id = debit;
    UPDATE settled.accounts SET balance = balance + quantity WHERE id = credit;
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
BEGIN
    -- numeric(78, 0) would round a fraction silently.
    IF quantity <> trunc(quantity) OR quantity = 'NaN' THEN
        RAISE EXCEPTION 'a quantity is a whole number' USING ERRCODE = '22003';
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
    PERFORM settled.open_accounts(ARRAY['external', 'available'], ARRAY[NULL, client]::uuid[], ARRAY[money, money]);
    PERFORM FROM settled.accounts AS a
    WHERE a.currency = money AND (a.kind = 'external' OR (a.kind = 'available' AND a.owner = client))
    ORDER BY a.id
    FOR NO KEY UPDATE;
    SELECT a.id INTO STRICT source FROM settled.accounts AS a WHERE a.kind = 'external' AND a.currency = money;
    SELECT a.id INTO STRICT target
    FROM settled.accounts AS a WHERE a.kind = 'available' AND a.owner = client AND a.currency = money;
    PERFORM settled.move(made, 'deposit', source, target, quantity, moment);
    RETURN 'deposited';
END
$$;

-- Reserves allocations and deallocations. The custody system calls it as the last statement before the COMMIT of its own
-- transaction: it locks accounts until then, and parked messages become due at that COMMIT.
--
-- reservations is a JSON array of {id, type, connectionId, amount: {currency, quantity}, clientExternalId, initiatedBy,
-- notes?, reason?, retriable?}; one row comes back for each, in order: result 'reserved', 'exists' (the same content
-- again) or 'refused' with reason 'conflict', 'insufficient_funds' or 'unknown_connection'. Each is judged on its own and
-- sees those before it. Malformed content raises an error: the caller validates.
--
-- Locks allocations, then parked messages, then accounts, each in key order, as the settling batch does.
CREATE FUNCTION settled.reserve(reservations jsonb) RETURNS TABLE (ordinal integer, id uuid, result text, reason text)
LANGUAGE plpgsql AS $$
DECLARE
    wish record;
    link record;
    earlier record;
    books record;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    source bigint;
    funds numeric;
BEGIN
    -- numeric(78, 0) would round a fraction silently, and a JSON number may have lost digits on its way.
    IF EXISTS (
        SELECT FROM jsonb_array_elements(reservations) AS r
        WHERE jsonb_typeof(r -> 'amount' -> 'quantity') IS DISTINCT FROM 'string'
           OR r -> 'amount' ->> 'quantity' !~ '^[1-9][0-9]{0,77}$'
    ) THEN
        RAISE EXCEPTION 'a quantity is a string of digits without leading zeros' USING ERRCODE = '22023';
    END IF;

    PERFORM FROM settled.allocations AS a
    WHERE a.id IN (SELECT (r ->> 'id')::uuid FROM jsonb_array_elements(reservations) AS r)
    ORDER BY a.id
    FOR NO KEY UPDATE;

    -- Wakes what waits for these ids. Before the accounts are locked, or it could deadlock with a batch that judges one of
    -- them; a message parked after this line is judged again soon by itself.
    WITH waiting AS (
        SELECT p.key
        FROM settled.parked AS p
        WHERE p.allocation_id IN (SELECT (r ->> 'id')::uuid FROM jsonb_array_elements(reservations) AS r)
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

    PERFORM settled.open_accounts(array_agg(k.kind), array_agg(k.owner), array_agg(k.currency))
    FROM jsonb_array_elements(reservations) AS r
    JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
    CROSS JOIN LATERAL (VALUES
        ('available', c.client_id, r -> 'amount' ->> 'currency'),
        ('held', c.connection_id, r -> 'amount' ->> 'currency'),
        ('allocated', c.connection_id, r -> 'amount' ->> 'currency')
    ) AS k (kind, owner, currency);

    PERFORM FROM settled.accounts AS a
    WHERE a.id IN (
        SELECT x.id
        FROM jsonb_array_elements(reservations) AS r
        JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
        JOIN settled.accounts AS x
          ON x.currency = r -> 'amount' ->> 'currency'
         AND ((x.kind = 'available' AND x.owner = c.client_id)
           OR (x.kind IN ('held', 'allocated') AND x.owner = c.connection_id))
    )
    ORDER BY a.id
    FOR NO KEY UPDATE;

    FOR wish IN
        SELECT n::integer AS ordinal,
               (r ->> 'id')::uuid AS id,
               r ->> 'type' AS type,
               (r ->> 'connectionId')::uuid AS connection_id,
               r -> 'amount' ->> 'currency' AS currency,
               (r -> 'amount' ->> 'quantity')::numeric(78, 0) AS quantity,
               r ->> 'clientExternalId' AS client_external_id,
               r ->> 'initiatedBy' AS initiated_by,
               r ->> 'notes' AS notes,
               coalesce(r ->> 'reason', 'awaiting the partner''s update') AS reason,
               coalesce((r ->> 'retriable')::boolean, false) AS retriable
        FROM jsonb_array_elements(reservations) WITH ORDINALITY AS e (r, n)
        ORDER BY n
    LOOP
        ordinal := wish.ordinal;
        id := wish.id;
        reason := NULL;

        SELECT a.* INTO earlier FROM settled.allocations AS a WHERE a.id = wish.id;
        IF FOUND THEN
            result := 'exists';
            IF (earlier.type, earlier.connection_id, earlier.currency, earlier.quantity, earlier.client_external_id,
                earlier.initiated_by, earlier.notes, earlier.reserved_reason, earlier.reserved_retriable)
               IS DISTINCT FROM
               (wish.type, wish.connection_id, wish.currency, wish.quantity, wish.client_external_id,
                wish.initiated_by, wish.notes, wish.reason, wish.retriable) THEN
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
            RETURN NEXT;
            CONTINUE;
        END IF;

        IF EXISTS (
            SELECT FROM settled.allocations AS a
            WHERE a.client_id = link.client_id AND a.client_external_id = wish.client_external_id
        ) THEN
            result := 'refused';
            reason := 'conflict';
            RETURN NEXT;
            CONTINUE;
        END IF;

        SELECT max(a.id) FILTER (WHERE a.kind = 'available') AS available,
               max(a.id) FILTER (WHERE a.kind = 'held') AS held,
               max(a.id) FILTER (WHERE a.kind = 'allocated') AS allocated
        INTO books
        FROM settled.accounts AS a
        WHERE a.currency = wish.currency
          AND ((a.kind = 'available' AND a.owner = link.client_id)
            OR (a.kind IN ('held', 'allocated') AND a.owner = link.connection_id));

        source := CASE wish.type WHEN 'allocation' THEN books.available ELSE books.allocated END;
        SELECT a.balance INTO STRICT funds FROM settled.accounts AS a WHERE a.id = source;
        IF funds < wish.quantity THEN
            result := 'refused';
            reason := 'insufficient_funds';
            RETURN NEXT;
            CONTINUE;
        END IF;

        INSERT INTO settled.allocations (
            id, type, connection_id, client_id, currency, quantity, client_external_id, initiated_by, notes,
            reserved_reason, reserved_retriable, reason, retriable,
            available_account, held_account, allocated_account, created_at, updated_at
        ) VALUES (
            wish.id, wish.type, wish.connection_id, link.client_id, wish.currency, wish.quantity,
            wish.client_external_id, wish.initiated_by, wish.notes,
            wish.reason, wish.retriable, wish.reason, wish.retriable,
            books.available, books.held, books.allocated, moment, moment
        ) ON CONFLICT DO NOTHING;
        -- Another transaction took the id or the clientExternalId just now, on a connection whose accounts are not ours.
        IF NOT FOUND THEN
            result := 'refused';
            reason := 'conflict';
            RETURN NEXT;
            CONTINUE;
        END IF;
        PERFORM settled.move(wish.id, 'reserved', source, books.held, wish.quantity, moment);
        result := 'reserved';
        RETURN NEXT;
    END LOOP;
END
$$;
