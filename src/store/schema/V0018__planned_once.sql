-- What PL/pgSQL asks is planned at its first call on a connection, for as many rows as that one has, and the plan is kept. Where
-- the first batch had one message, the balances of every later one were compared each with each: 10 ms for 300 of them. And what
-- was planned while settled.owed was empty read all of it from then on.

-- A full join is never a loop within a loop, and here it is the same as an inner one: both sides have the same rows.
CREATE OR REPLACE FUNCTION settled.balances_pay() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO settled.owed (xid, first, accounts, changes)
        SELECT pg_current_xact_id(), NOT EXISTS (SELECT FROM settled.owed AS o WHERE o.xid = pg_current_xact_id()),
               array_agg(n.id * 4 + k.kind), array_agg(-k.change)
        FROM became AS n
        CROSS JOIN LATERAL (VALUES (0, n.external), (1, n.available), (2, n.held), (3, n.allocated)) AS k (kind, change)
        WHERE k.change <> 0
        HAVING count(*) > 0;
    ELSE
        INSERT INTO settled.owed (xid, first, accounts, changes)
        SELECT pg_current_xact_id(), NOT EXISTS (SELECT FROM settled.owed AS o WHERE o.xid = pg_current_xact_id()),
               array_agg(d.id * 4 + k.kind), array_agg(-k.change)
        FROM (
            SELECT n.id, n.external - o.external AS external, n.available - o.available AS available,
                   n.held - o.held AS held, n.allocated - o.allocated AS allocated
            FROM became AS n
            FULL JOIN was AS o ON o.id = n.id
        ) AS d
        CROSS JOIN LATERAL (VALUES (0, d.external), (1, d.available), (2, d.held), (3, d.allocated)) AS k (kind, change)
        WHERE k.change <> 0
        HAVING count(*) > 0;
    END IF;
    RETURN NULL;
END
$$;

ALTER FUNCTION settled.transfers_owe() SET enable_seqscan = off;
ALTER FUNCTION settled.refuse_debt() SET enable_seqscan = off;
-- Of many reservations in one call, each read all of the funds where the first were among few.
ALTER FUNCTION settled.move(uuid, text, bigint, bigint, numeric, timestamptz) SET enable_seqscan = off;
