-- The second line: what no role that works with the books can do to them, whatever program it runs. Who owns the tables can
-- take all of it away; the roles of `settled roles` own nothing.

-- What never changes in a row -----------------------------------------------------------------------------------------

-- A trigger that names columns is asked only of a statement that names one of them: of a batch's own statements, never.
CREATE TRIGGER fixed BEFORE UPDATE OF
    id, connection_id, client_id, client_funds, connection_funds, created_at, type, currency, quantity,
    client_external_id, initiated_by, notes, reserved_reason, reserved_retriable
    ON settled.allocations FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF id, holder, owner, currency
    ON settled.funds FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF key, enterprise_id, nonce, payload_digest, first_seen
    ON settled.receipts FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF
    id, exchange, routing_key, digest, format, properties, body, enterprise_id, nonce, allocation_id, collected_at,
    body_length, too_large
    ON settled.dead_letters FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF
    key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at
    ON settled.parked FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF id, messages, bytes, format, content, digests, held_at
    ON settled.held FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id
    ON settled.connections FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER fixed BEFORE UPDATE OF public_key, enterprise_id, created_at
    ON settled.partner_keys FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.allocations
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.funds
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.partner_keys
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- What is over ---------------------------------------------------------------------------------------------------------

-- A terminal allocation is what was signed. After the change, since a trigger before it locks every row anew.
CREATE TRIGGER terminal AFTER UPDATE ON settled.allocations
    FOR EACH ROW WHEN (OLD.status <> 'reserved') EXECUTE FUNCTION settled.refuse_change();

-- A receipt never leaves a final reason; of 'settled' the trigger settled_for_ever says the same.
CREATE TRIGGER final_for_ever AFTER UPDATE ON settled.receipts
    FOR EACH ROW WHEN (
        OLD.reason IN (
            'payload_mismatch', 'nonce_reused', 'nonce_voided', 'expired_update', 'not_permitted', 'allocation_mismatch',
            'already_settled'
        )
        AND (OLD.allocation_id, OLD.event_id, OLD.batch_id, OLD.verdict, OLD.reason, OLD.message_digest, OLD.public_key)
            IS DISTINCT FROM
            (NEW.allocation_id, NEW.event_id, NEW.batch_id, NEW.verdict, NEW.reason, NEW.message_digest, NEW.public_key)
    ) EXECUTE FUNCTION settled.refuse_change();

-- Balances change with transfers only ----------------------------------------------------------------------------------

-- What transfers and balances of the running transaction still owe each other, a row a transaction; at its end it is nothing.
-- Nobody has rights on it: the triggers are its owner's. Nothing of it outlives its transaction, so that it needs no log.
CREATE UNLOGGED TABLE settled.owed (
    xid       xid8 PRIMARY KEY,
    accounts  bigint[] NOT NULL,
    changes   numeric[] NOT NULL
);

-- Adds to what is owed: nothing is left where all of it was paid.
CREATE FUNCTION settled.owe(more_accounts bigint[], more_changes numeric[]) RETURNS void LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    old_accounts bigint[];
    old_changes numeric[];
    new_accounts bigint[];
    new_changes numeric[];
BEGIN
    IF more_accounts IS NULL THEN
        RETURN;
    END IF;
    SELECT o.accounts, o.changes INTO old_accounts, old_changes
    FROM settled.owed AS o
    WHERE o.xid = pg_current_xact_id();
    IF NOT FOUND THEN
        INSERT INTO settled.owed (xid, accounts, changes)
        VALUES (pg_current_xact_id(), more_accounts, more_changes);
        RETURN;
    END IF;
    SELECT array_agg(s.account), array_agg(s.change) INTO new_accounts, new_changes
    FROM (
        SELECT u.account, sum(u.change) AS change
        FROM unnest(old_accounts || more_accounts, old_changes || more_changes) AS u (account, change)
        GROUP BY u.account
        HAVING sum(u.change) <> 0
    ) AS s;
    IF new_accounts IS NULL THEN
        DELETE FROM settled.owed AS o WHERE o.xid = pg_current_xact_id();
    ELSE
        UPDATE settled.owed AS o
        SET accounts = new_accounts, changes = new_changes
        WHERE o.xid = pg_current_xact_id();
    END IF;
END
$$;
REVOKE ALL ON FUNCTION settled.owe(bigint[], numeric[]) FROM PUBLIC;

CREATE FUNCTION settled.transfers_owe() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    accounts bigint[];
    changes numeric[];
BEGIN
    SELECT array_agg(s.account), array_agg(s.change) INTO accounts, changes
    FROM (
        SELECT e.account, sum(e.change) AS change
        FROM (
            SELECT a.debit_account AS account, -a.amount AS change FROM added AS a
            UNION ALL
            SELECT a.credit_account, a.amount FROM added AS a
        ) AS e
        GROUP BY e.account
        HAVING sum(e.change) <> 0
    ) AS s;
    PERFORM settled.owe(accounts, changes);
    RETURN NULL;
END
$$;

CREATE FUNCTION settled.balances_pay() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    accounts bigint[];
    changes numeric[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(n.id * 4 + k.kind), array_agg(-k.change) INTO accounts, changes
        FROM became AS n
        CROSS JOIN LATERAL (VALUES (0, n.external), (1, n.available), (2, n.held), (3, n.allocated)) AS k (kind, change)
        WHERE k.change <> 0;
    ELSE
        SELECT array_agg(n.id * 4 + k.kind), array_agg(-k.change) INTO accounts, changes
        FROM became AS n
        JOIN was AS o ON o.id = n.id
        CROSS JOIN LATERAL (VALUES
            (0, n.external - o.external), (1, n.available - o.available), (2, n.held - o.held),
            (3, n.allocated - o.allocated)
        ) AS k (kind, change)
        WHERE k.change <> 0;
    END IF;
    PERFORM settled.owe(accounts, changes);
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
    account bigint;
BEGIN
    SELECT o.accounts[1] INTO account FROM settled.owed AS o WHERE o.xid = NEW.xid;
    IF FOUND THEN
        -- Never one message's fault: see settled.exactly().
        RAISE EXCEPTION 'account % and the transfers of this transaction do not agree: balances change with transfers only',
            account
            USING ERRCODE = 'SX002';
    END IF;
    RETURN NULL;
END
$$;

-- Asked at COMMIT, once a transaction.
CREATE CONSTRAINT TRIGGER paid AFTER INSERT ON settled.owed
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION settled.refuse_debt();

-- The two functions of the custody system ------------------------------------------------------------------------------

-- They do what their owner may, and nothing but what stands in them: who calls them needs no right on any table. The path is
-- fixed, so that nobody puts a function of his own before ours.
ALTER FUNCTION settled.reserve(jsonb) SECURITY DEFINER SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION settled.deposit(uuid, text, numeric, text) SECURITY DEFINER SET search_path = pg_catalog, pg_temp;

-- Who could reserve and deposit until now, still can. It was by rights on tables, which are not needed any more.
DO $$
DECLARE
    role record;
BEGIN
    FOR role IN
        SELECT r.rolname
        FROM pg_roles AS r
        WHERE NOT r.rolsuper
          AND NOT starts_with(r.rolname, 'pg_')
          AND NOT pg_has_role(r.oid, (SELECT c.relowner FROM pg_class AS c WHERE c.oid = 'settled.deposits'::regclass), 'USAGE')
          AND has_table_privilege(r.oid, 'settled.deposits', 'INSERT')
          AND has_table_privilege(r.oid, 'settled.allocations', 'INSERT')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION settled.reserve(jsonb) TO %I', role.rolname);
        EXECUTE format('GRANT EXECUTE ON FUNCTION settled.deposit(uuid, text, numeric, text) TO %I', role.rolname);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION
    settled.reserve(jsonb),
    settled.deposit(uuid, text, numeric, text),
    settled.open_funds(text[], uuid[], text[]),
    settled.change_balance(bigint, numeric),
    settled.move(uuid, text, bigint, bigint, numeric, timestamptz)
FROM PUBLIC;
