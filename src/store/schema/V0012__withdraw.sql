-- Funds go out again: the twin of a deposit.

CREATE TABLE settled.withdrawals (
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
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.withdrawals
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

ALTER TABLE settled.transfers
    DROP CONSTRAINT transfers_event_check,
    ADD CONSTRAINT transfers_event_check CHECK (event IN ('deposit', 'withdrawal', 'reserved', 'cleared', 'released'));

-- The rules of `settled deposit` and `settled withdraw`. numeric(78, 0) would round a fraction silently; NaN sorts above
-- everything.
CREATE FUNCTION settled.must_be_funds(client uuid, money text, quantity numeric, ref text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
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
END
$$;
REVOKE ALL ON FUNCTION settled.must_be_funds(uuid, text, numeric, text) FROM PUBLIC;

-- Locks what moves between a client and the world outside, in the order of every writer. Null where nothing was opened.
CREATE FUNCTION settled.lock_client(client uuid, money text, OUT external bigint, OUT available bigint, OUT funds numeric)
LANGUAGE plpgsql AS $$
DECLARE
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
BEGIN
    PERFORM FROM settled.funds AS f
    WHERE f.currency = money AND ((f.holder = 'world' AND f.owner = nobody) OR (f.holder = 'client' AND f.owner = client))
    ORDER BY f.id
    FOR NO KEY UPDATE;
    SELECT settled.account(f.id, 'external') INTO external
    FROM settled.funds AS f WHERE f.holder = 'world' AND f.owner = nobody AND f.currency = money;
    SELECT settled.account(f.id, 'available'), f.available INTO available, funds
    FROM settled.funds AS f WHERE f.holder = 'client' AND f.owner = client AND f.currency = money;
END
$$;
REVOKE ALL ON FUNCTION settled.lock_client(uuid, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION settled.deposit(client uuid, money text, quantity numeric, ref text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    made uuid;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    nobody CONSTANT uuid := '00000000-0000-0000-0000-000000000000';
    locked record;
BEGIN
    PERFORM settled.must_be_funds(client, money, quantity, ref);
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
    SELECT * INTO STRICT locked FROM settled.lock_client(client, money);
    PERFORM settled.move(made, 'deposit', locked.external, locked.available, quantity, moment);
    RETURN 'deposited';
END
$$;

-- Funds go out, once per client and reference: 'withdrawn', 'exists', 'conflict' (other content before), or
-- 'insufficient_funds' (the client has less available; nothing was changed, and the reference is free).
CREATE FUNCTION settled.withdraw(client uuid, money text, quantity numeric, ref text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    made uuid;
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
    locked record;
    earlier record;
BEGIN
    PERFORM settled.must_be_funds(client, money, quantity, ref);
    -- Before the question whether it went out before: who says the same at the same time waits here.
    SELECT * INTO STRICT locked FROM settled.lock_client(client, money);
    SELECT w.currency, w.quantity INTO earlier
    FROM settled.withdrawals AS w
    WHERE w.client_id = client AND w.reference = ref;
    IF FOUND THEN
        RETURN CASE WHEN (earlier.currency, earlier.quantity) = (money, quantity) THEN 'exists' ELSE 'conflict' END;
    ELSIF locked.funds IS NULL OR locked.funds < quantity THEN
        RETURN 'insufficient_funds';
    END IF;
    -- Another currency under the same reference locks other funds: it may have come first.
    INSERT INTO settled.withdrawals (client_id, reference, currency, quantity)
    VALUES (client, ref, money, quantity)
    ON CONFLICT (client_id, reference) DO NOTHING
    RETURNING id INTO made;
    IF made IS NULL THEN
        RETURN 'conflict';
    END IF;
    PERFORM settled.move(made, 'withdrawal', locked.available, locked.external, quantity, moment);
    RETURN 'withdrawn';
END
$$;
-- Who may deposit may not withdraw, unless somebody says so: `settled roles --apply`.
REVOKE ALL ON FUNCTION settled.withdraw(uuid, text, numeric, text) FROM PUBLIC;
