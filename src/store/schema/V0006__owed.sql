-- What is owed is written down and added up once, at COMMIT. It was added up by every statement, so that the n-th of a transaction
-- read what the n-1 before it had left: many deposits in one transaction cost the square of their number.

DROP TRIGGER owe ON settled.transfers;
DROP TRIGGER pay ON settled.funds;
DROP TRIGGER pay_first ON settled.funds;
DROP TABLE settled.owed;
DROP FUNCTION settled.owe(bigint[], numeric[]), settled.transfers_owe(), settled.balances_pay(), settled.refuse_debt();

-- What one statement owes. Only ever added to, until the end of the transaction takes all of it away. Nobody has rights on it:
-- the triggers are its owner's. Nothing of it outlives its transaction, so that it needs no log.
CREATE UNLOGGED TABLE settled.owed (
    xid       xid8 NOT NULL,
    -- Whether it is the transaction's first: by it the question is asked once.
    first     boolean NOT NULL,
    accounts  bigint[] COMPRESSION lz4 NOT NULL,
    changes   numeric[] COMPRESSION lz4 NOT NULL
);
-- In the row itself, if it fits: no second table to write to.
ALTER TABLE settled.owed ALTER COLUMN accounts SET STORAGE MAIN, ALTER COLUMN changes SET STORAGE MAIN;
CREATE INDEX owed_xid ON settled.owed (xid);

CREATE FUNCTION settled.transfers_owe() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    INSERT INTO settled.owed (xid, first, accounts, changes)
    SELECT pg_current_xact_id(), NOT EXISTS (SELECT FROM settled.owed AS o WHERE o.xid = pg_current_xact_id()),
           array_agg(s.account), array_agg(s.change)
    FROM (
        SELECT e.account, sum(e.change) AS change
        FROM (
            SELECT a.debit_account AS account, -a.amount AS change FROM added AS a
            UNION ALL
            SELECT a.credit_account, a.amount FROM added AS a
        ) AS e
        GROUP BY e.account
        HAVING sum(e.change) <> 0
    ) AS s
    HAVING count(*) > 0;
    RETURN NULL;
END
$$;

CREATE FUNCTION settled.balances_pay() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
               array_agg(n.id * 4 + k.kind), array_agg(-k.change)
        FROM became AS n
        JOIN was AS o ON o.id = n.id
        CROSS JOIN LATERAL (VALUES
            (0, n.external - o.external), (1, n.available - o.available), (2, n.held - o.held),
            (3, n.allocated - o.allocated)
        ) AS k (kind, change)
        WHERE k.change <> 0
        HAVING count(*) > 0;
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER owe AFTER INSERT ON settled.transfers
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION settled.transfers_owe();
CREATE TRIGGER pay AFTER UPDATE ON settled.funds
    REFERENCING OLD TABLE AS was NEW TABLE AS became FOR EACH STATEMENT EXECUTE FUNCTION settled.balances_pay();
CREATE TRIGGER pay_first AFTER INSERT ON settled.funds
    REFERENCING NEW TABLE AS became FOR EACH STATEMENT EXECUTE FUNCTION settled.balances_pay();

CREATE FUNCTION settled.refuse_debt() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    debtor bigint;
BEGIN
    SELECT u.account INTO debtor
    FROM settled.owed AS o
    CROSS JOIN LATERAL unnest(o.accounts, o.changes) AS u (account, change)
    WHERE o.xid = NEW.xid
    GROUP BY u.account
    HAVING sum(u.change) <> 0
    LIMIT 1;
    IF FOUND THEN
        -- Never one message's fault: see settled.exactly().
        RAISE EXCEPTION 'account % and the transfers of this transaction do not agree: balances change with transfers only',
            debtor
            USING ERRCODE = 'SX002';
    END IF;
    -- What comes after this, where constraints are checked at once, is asked anew.
    DELETE FROM settled.owed AS o WHERE o.xid = NEW.xid;
    RETURN NULL;
END
$$;

-- Asked at COMMIT, once a transaction.
CREATE CONSTRAINT TRIGGER paid AFTER INSERT ON settled.owed
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.first) EXECUTE FUNCTION settled.refuse_debt();

-- A refusal says which rule it is.
CREATE OR REPLACE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: %', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME, CASE TG_NAME
        WHEN 'append_only' THEN 'its rows are only ever added'
        WHEN 'never_forgotten' THEN 'its rows are kept for ever'
        WHEN 'fixed' THEN 'what it would change is written once'
        ELSE 'what is final never changes'
    END;
END
$$;
