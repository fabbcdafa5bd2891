-- Many reservations in one call: each is read from its JSON once, and what they need is found by key. It was joined as JSON, so
-- that each call read every connection and all funds of a currency, and read the JSON again for every pair.

-- Moves quantity between two locked accounts: one transfer, and the balances in one statement, whose plan is kept. Each balance
-- had a statement of its own, planned anew each time.
CREATE OR REPLACE FUNCTION settled.move(
    subject uuid, what text, debit bigint, credit bigint, quantity numeric, moment timestamptz
) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
    VALUES (subject, 0, what, debit, credit, quantity, moment);
    UPDATE settled.funds AS f
    SET external = f.external + k.external, available = f.available + k.available, held = f.held + k.held,
        allocated = f.allocated + k.allocated
    FROM (
        SELECT e.account / 4 AS id,
               coalesce(sum(e.change) FILTER (WHERE e.account % 4 = 0), 0) AS external,
               coalesce(sum(e.change) FILTER (WHERE e.account % 4 = 1), 0) AS available,
               coalesce(sum(e.change) FILTER (WHERE e.account % 4 = 2), 0) AS held,
               coalesce(sum(e.change) FILTER (WHERE e.account % 4 = 3), 0) AS allocated
        FROM (VALUES (debit, -quantity), (credit, quantity)) AS e (account, change)
        GROUP BY 1
    ) AS k
    WHERE f.id = k.id;
END
$$;
DROP FUNCTION settled.change_balance(bigint, numeric);

CREATE OR REPLACE FUNCTION settled.reserve(reservations jsonb) RETURNS TABLE (
    ordinal integer, id uuid, result text, reason text, detail text
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    -- Why each is none. Of those that are: their ids, connections and currencies.
    faults text[];
    ids uuid[];
    links uuid[];
    currencies text[];
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
    -- Read once: a join with JSON would read each of them again for every row that it is compared with.
    SELECT array_agg((e.r ->> 'id')::uuid), array_agg((e.r ->> 'connectionId')::uuid), array_agg(e.r -> 'amount' ->> 'currency')
    INTO ids, links, currencies
    FROM jsonb_array_elements(reservations) WITH ORDINALITY AS e (r, n)
    WHERE faults[e.n] IS NULL;

    PERFORM FROM settled.allocations AS a
    WHERE a.id = ANY (ids)
    ORDER BY a.id
    FOR NO KEY UPDATE;

    -- Wakes what waits for these ids. Before the funds are locked, or it could deadlock with a batch that judges one of
    -- them; a message parked after this line is judged again soon by itself.
    WITH waiting AS (
        SELECT p.key
        FROM settled.parked AS p
        WHERE p.allocation_id = ANY (ids)
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
    FROM (SELECT DISTINCT w.link, w.currency FROM unnest(links, currencies) AS w (link, currency)) AS w
    JOIN settled.connections AS c ON c.connection_id = w.link
    CROSS JOIN LATERAL (VALUES
        ('client', c.client_id, w.currency), ('connection', c.connection_id, w.currency)
    ) AS k (holder, owner, currency);

    -- By id, as everybody does: found first, so that they are locked in that order.
    PERFORM FROM settled.funds AS f
    WHERE f.id = ANY (ARRAY(
        SELECT x.id
        FROM (SELECT DISTINCT w.link, w.currency FROM unnest(links, currencies) AS w (link, currency)) AS w
        JOIN settled.connections AS c ON c.connection_id = w.link
        CROSS JOIN LATERAL (VALUES ('client', c.client_id), ('connection', c.connection_id)) AS k (holder, owner)
        JOIN settled.funds AS x ON x.owner = k.owner AND x.currency = w.currency AND x.holder = k.holder
    ))
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
