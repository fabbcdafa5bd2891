-- A reservation that is refused says which field is in the way, whatever the reason.

-- Reserves allocations and deallocations. The custody system calls it as the last statement before the COMMIT of its own
-- transaction: it locks accounts until then, and parked messages become due at that COMMIT.
--
-- reservations is a JSON array of {id, type, connectionId, amount: {currency, quantity}, clientExternalId, initiatedBy,
-- notes?, reason?, retriable?}; one row comes back for each, in order: result 'reserved', 'exists' (the same content
-- again) or 'refused' with reason 'conflict', 'insufficient_funds', 'unknown_connection' or 'invalid_field'; the detail
-- begins with the name of the field that is in the way (id is null where none can be read). Each is judged on its own and sees those before it. What is no array
-- raises an error.
--
-- Locks allocations, then parked messages, then accounts, each in key order, as the settling batch does.
CREATE OR REPLACE FUNCTION settled.reserve(reservations jsonb) RETURNS TABLE (
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
            detail := 'id: it, or the clientExternalId, was taken by somebody else just now';
            RETURN NEXT;
            CONTINUE;
        END IF;
        PERFORM settled.move(wish.id, 'reserved', source, books.held, wish.quantity, moment);
        result := 'reserved';
        RETURN NEXT;
    END LOOP;
END
$$;
