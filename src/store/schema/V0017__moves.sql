-- A partner moves from these books to those of another database ("cell"), with everything that was ever said of it. Two databases
-- have no common COMMIT: a row on each side says how far it is, and the one of the target decides whether it goes on or is taken
-- back. At no time can both judge the partner's messages.

-- The move that the partner is in, or left with. While it is set nothing of the partner is judged here, by whatever door, and
-- nothing of its registry changes: what changed here would be missing there.
ALTER TABLE settled.partners
    ADD COLUMN moving uuid,
    -- Since when its move is over: what comes here still is the other cell's.
    ADD COLUMN left_at timestamptz,
    ADD CONSTRAINT partners_moving CHECK (moving IS NOT NULL OR left_at IS NULL),
    -- Its messages are held all the while.
    ADD CONSTRAINT partners_moving_held CHECK (moving IS NULL OR quarantined_at IS NOT NULL);

-- The same id on both sides.
CREATE TABLE settled.moves (
    id                 uuid PRIMARY KEY,
    enterprise_id      text COLLATE "C" NOT NULL CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    way                text COLLATE "C" NOT NULL CHECK (way IN ('out', 'in')),
    -- The books of the other cell.
    other              uuid NOT NULL,
    -- Out: paused, left (the money is gone from here), done. In: arrived (everything is here, and nothing is judged yet), done.
    -- Either: cancelled. In the target that row comes in the place of 'arrived', so that only one of the two is ever there.
    phase              text COLLATE "C" NOT NULL,
    begun_at           timestamptz NOT NULL,
    changed_at         timestamptz NOT NULL,
    -- Whether the partner was in quarantine before, since when and why: it is so again afterwards.
    quarantined_at     timestamptz,
    quarantine_reason  text,
    -- Rows that were copied and found equal, by table.
    counted            jsonb NOT NULL DEFAULT '{}',
    CHECK (phase IN ('paused', 'left', 'arrived', 'done', 'cancelled')),
    CHECK (CASE way WHEN 'out' THEN phase <> 'arrived' ELSE phase NOT IN ('paused', 'left') END)
);
CREATE UNIQUE INDEX moves_under_way ON settled.moves (enterprise_id) WHERE phase IN ('paused', 'left', 'arrived');
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.moves
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF id, enterprise_id, way, other, begun_at, quarantined_at, quarantine_reason
    ON settled.moves FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Money that left with a partner, or came with one: what was held and allocated on its connections. It leaves to the world outside
-- and comes from there, so that the books of each cell are whole by themselves.
CREATE TABLE settled.moved_funds (
    id             uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    move_id        uuid NOT NULL REFERENCES settled.moves,
    connection_id  uuid NOT NULL REFERENCES settled.connections,
    -- The balance that it left. Null: it came in, to the client's available funds, from which the partner's own transfers, which
    -- came along, take it to where it was.
    left_from      text COLLATE "C" CHECK (left_from IN ('held', 'allocated')),
    currency       text COLLATE "C" NOT NULL,
    quantity       numeric(78, 0) NOT NULL
                   CHECK (quantity BETWEEN 1 AND
                   115792089237316195423570985008687907853269984665640564039457584007913129639935),
    created_at     timestamptz NOT NULL
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.moved_funds
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

ALTER TABLE settled.transfers
    DROP CONSTRAINT transfers_event_check,
    ADD CONSTRAINT transfers_event_check
        CHECK (event IN ('deposit', 'withdrawal', 'arrived', 'left', 'reserved', 'cleared', 'released'));

-- Packs of the side room that went to the other cell.
ALTER TABLE settled.holdings
    DROP CONSTRAINT holdings_step_check,
    ADD CONSTRAINT holdings_step_check CHECK (step IN ('held', 'split', 'left', 'moved'));

-- A balance is a sum and has no bound; a transfer has one. The parts of a sum, each as large as a transfer may be.
CREATE FUNCTION settled.parts_of(total numeric) RETURNS SETOF numeric LANGUAGE sql IMMUTABLE AS $$
    SELECT least(total - n.part * b.most, b.most)
    FROM (SELECT 115792089237316195423570985008687907853269984665640564039457584007913129639935 AS most) AS b
    CROSS JOIN LATERAL generate_series(0, div(total - 1, b.most)) AS n (part)
    WHERE total > 0
$$;

-- A batch's part of one partner, as an id of its own in the target: the batch had messages of others too. It begins with the same
-- time, so that ids are in order still.
CREATE FUNCTION settled.part_of_batch(batch uuid, enterprise text) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT (left(batch::text, 15) || substr(h.text, 1, 3) || '-8' || substr(h.text, 4, 3) || '-' || substr(h.text, 7, 12))::uuid
    FROM (SELECT encode(sha256(convert_to(batch || ' of ' || enterprise, 'UTF8')), 'hex') AS text) AS h
$$;

-- What is said of a partner that is on its way or lives elsewhere, by who changes something of it here.
CREATE FUNCTION settled.refuse_of_moving() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_TABLE_NAME = 'partners' OR EXISTS (
        SELECT FROM settled.partners AS p WHERE p.enterprise_id = NEW.enterprise_id AND p.moving IS NOT NULL
    ) THEN
        RAISE EXCEPTION 'partner % is on its way to another cell, or lives there: nothing of it changes here', NEW.enterprise_id
            USING ERRCODE = 'SX003';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER of_moving BEFORE UPDATE ON settled.partners FOR EACH ROW
    WHEN (OLD.moving IS NOT NULL AND NEW.moving IS NOT DISTINCT FROM OLD.moving AND NEW.left_at IS NOT DISTINCT FROM OLD.left_at)
    EXECUTE FUNCTION settled.refuse_of_moving();
CREATE TRIGGER of_moving BEFORE INSERT OR UPDATE ON settled.partner_keys
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_of_moving();
CREATE TRIGGER of_moving BEFORE INSERT ON settled.connections
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_of_moving();
CREATE TRIGGER of_moving BEFORE INSERT OR UPDATE ON settled.currency_symbols
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_of_moving();
-- A nonce that is made unusable is made so where it is judged.
CREATE TRIGGER of_moving BEFORE UPDATE OF voided_at ON settled.receipts
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_of_moving();

-- A symbol comes with the time that it had. Only with a partner that is arriving: nobody else writes a meaning into the past.
CREATE OR REPLACE FUNCTION settled.date_symbol() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NOT EXISTS (
            SELECT FROM settled.moves AS m
            WHERE m.enterprise_id = NEW.enterprise_id AND m.way = 'in' AND m.phase = 'arrived'
        ) THEN
            NEW.since := clock_timestamp();
            NEW.until := NULL;
        END IF;
    ELSIF OLD.until IS NOT NULL THEN
        RAISE EXCEPTION '% on %.% is refused: what is over does not change', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
    ELSE
        NEW.until := greatest(OLD.since, clock_timestamp());
    END IF;
    RETURN NEW;
END
$$;

-- As before, and nothing is reserved with a partner that is on its way, or lives elsewhere: its answer would come to another cell.
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

        SELECT c.*, p.moving INTO link
        FROM settled.connections AS c
        JOIN settled.partners AS p ON p.enterprise_id = c.enterprise_id
        WHERE c.connection_id = wish.connection_id;
        IF NOT FOUND THEN
            result := 'refused';
            reason := 'unknown_connection';
            detail := 'connectionId: no connection of this id is registered';
            RETURN NEXT;
            CONTINUE;
        ELSIF link.moving IS NOT NULL THEN
            result := 'refused';
            reason := 'unknown_connection';
            detail := 'connectionId: its partner is on its way to another cell, or lives there: reserve it there';
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
