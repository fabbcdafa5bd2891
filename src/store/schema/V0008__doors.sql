-- One rule at both doors: what `settled allocation reserve` refuses, settled.reserve() refuses.

-- Why a reservation is none, by its own text alone: the first rule that it breaks, as "field: rule". Null: it is one.
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
-- transaction: it locks accounts until then, and parked messages become due at that COMMIT.
--
-- reservations is a JSON array of {id, type, connectionId, amount: {currency, quantity}, clientExternalId, initiatedBy,
-- notes?, reason?, retriable?}; one row comes back for each, in order: result 'reserved', 'exists' (the same content
-- again) or 'refused' with reason 'conflict', 'insufficient_funds', 'unknown_connection' or 'invalid_field' (the detail
-- says which; id is null where none can be read). Each is judged on its own and sees those before it. What is no array
-- raises an error.
--
-- Locks allocations, then parked messages, then accounts, each in key order, as the settling batch does.
CREATE FUNCTION settled.reserve_anew(reservations jsonb) RETURNS TABLE (
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

    -- Wakes what waits for these ids. Before the accounts are locked, or it could deadlock with a batch that judges one of
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

    PERFORM settled.open_accounts(array_agg(k.kind), array_agg(k.owner), array_agg(k.currency))
    FROM jsonb_array_elements(sound) AS r
    JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
    CROSS JOIN LATERAL (VALUES
        ('available', c.client_id, r -> 'amount' ->> 'currency'),
        ('held', c.connection_id, r -> 'amount' ->> 'currency'),
        ('allocated', c.connection_id, r -> 'amount' ->> 'currency')
    ) AS k (kind, owner, currency);

    PERFORM FROM settled.accounts AS a
    WHERE a.id IN (
        SELECT x.id
        FROM jsonb_array_elements(sound) AS r
        JOIN settled.connections AS c ON c.connection_id = (r ->> 'connectionId')::uuid
        JOIN settled.accounts AS x
          ON x.currency = r -> 'amount' ->> 'currency'
         AND ((x.kind = 'available' AND x.owner = c.client_id)
           OR (x.kind IN ('held', 'allocated') AND x.owner = c.connection_id))
    )
    ORDER BY a.id
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

-- The function has one more column in its answer, so it can not be replaced. Who may reserve stays who may.
DO $$
DECLARE
    held record;
    made text;
BEGIN
    FOREACH made IN ARRAY ARRAY['settled.reserve_anew(jsonb)', 'settled.reservation_fault(jsonb)'] LOOP
        IF EXISTS (
            SELECT FROM pg_proc AS p
            WHERE p.oid = 'settled.reserve(jsonb)'::regprocedure
              AND p.proacl IS NOT NULL
              AND NOT EXISTS (SELECT FROM aclexplode(p.proacl) AS a WHERE a.grantee = 0)
        ) THEN
            EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', made);
        END IF;
        FOR held IN
            SELECT r.rolname, a.is_grantable
            FROM pg_proc AS p
            CROSS JOIN LATERAL aclexplode(p.proacl) AS a
            JOIN pg_roles AS r ON r.oid = a.grantee
            WHERE p.oid = 'settled.reserve(jsonb)'::regprocedure
              AND a.grantee <> p.proowner
        LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', made, held.rolname)
                || CASE WHEN held.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END;
        END LOOP;
    END LOOP;
END
$$;

DROP FUNCTION settled.reserve(jsonb);
ALTER FUNCTION settled.reserve_anew(jsonb) RENAME TO reserve;

-- The second line, for rows that are written past the functions. When they are inserted only: a record that an older
-- version let in can still be settled.
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

-- Funds come in, once per client and reference: 'deposited', 'exists', or 'conflict' (other content before).
CREATE OR REPLACE FUNCTION settled.deposit(client uuid, money text, quantity numeric, ref text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    made uuid;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    source bigint;
    target bigint;
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

-- Who did it, as the server knows it, beside the operator's name, which anybody may type ------------------------------

ALTER TABLE settled.audit ADD COLUMN session_name text, ADD COLUMN client_address inet;

CREATE FUNCTION settled.sign_audit() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.session_name := session_user;
    NEW.client_address := inet_client_addr();
    RETURN NEW;
END
$$;

CREATE TRIGGER signed BEFORE INSERT ON settled.audit FOR EACH ROW EXECUTE FUNCTION settled.sign_audit();

-- A key that is reinstated ----------------------------------------------------------------------------------------------

-- remembered: what its key signed while it was revoked was written down. An older version wrote nothing down.
ALTER TABLE settled.partner_keys
    ADD COLUMN reinstated_at timestamptz,
    ADD COLUMN remembered boolean NOT NULL DEFAULT true;
UPDATE settled.partner_keys SET remembered = false WHERE revoked_at IS NOT NULL;

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
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.distrusted
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
