-- The second line, closed further: its triggers serve their own tables only, what settles an allocation is its own transfer, and
-- nobody but the owner says when a key was registered or an act was done.

-- Nobody's trigger but ours --------------------------------------------------------------------------------------------

-- Who may execute a trigger function may hang it on a table of his own, a temporary one too; and with SECURITY DEFINER it does
-- there what its owner may. A function is everybody's unless that is taken away. To fire, a trigger needs nobody's right.
REVOKE ALL ON FUNCTION settled.transfers_owe(), settled.balances_pay(), settled.refuse_debt(), settled.date_symbol(),
    settled.tell_of_partner() FROM PUBLIC;

-- What settles an allocation is its transfer ---------------------------------------------------------------------------

-- An allocation that leaves 'reserved' and the transfer that settles it say the same: who, what, how much, from where to where.
-- Hashed, and the hashes added up like money under a number that no account has: a batch costs one number more, where to look up
-- each of its allocations cost it a fifth more time. Which hash it is depends on a number drawn once, which nobody has a right to
-- read: so nobody can look for a transfer that passes for another.
CREATE TABLE settled.seeds (
    is_the_one  boolean PRIMARY KEY DEFAULT true CHECK (is_the_one),
    seed        bigint NOT NULL
);
INSERT INTO settled.seeds (seed)
SELECT ('x' || encode(substr(sha256(uuid_send(gen_random_uuid())), 1, 8), 'hex'))::bit(64)::bigint;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.seeds
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

CREATE OR REPLACE FUNCTION settled.transfers_owe() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    key bigint;
BEGIN
    IF TG_RELID <> 'settled.transfers'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.transfers only' USING ERRCODE = '42501';
    END IF;
    SELECT s.seed INTO STRICT key FROM settled.seeds AS s WHERE s.is_the_one;
    INSERT INTO settled.owed (xid, first, accounts, changes)
    SELECT pg_current_xact_id(), NOT EXISTS (SELECT FROM settled.owed AS o WHERE o.xid = pg_current_xact_id()),
           array_agg(s.account), array_agg(s.change)
    FROM (
        SELECT e.account, sum(e.change) AS change
        FROM (
            SELECT a.debit_account AS account, -a.amount AS change FROM added AS a
            UNION ALL
            SELECT a.credit_account, a.amount FROM added AS a
            UNION ALL
            SELECT -1, sum(hash_record_extended(
                ROW(a.subject_id, a.event, a.amount, a.debit_account, a.credit_account), key
            ))
            FROM added AS a
            WHERE a.step = 1
        ) AS e
        GROUP BY e.account
        HAVING sum(e.change) <> 0
    ) AS s
    HAVING count(*) > 0;
    RETURN NULL;
END
$$;

-- What was not reserved before can not have been changed: the trigger terminal.
CREATE FUNCTION settled.allocations_owe() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    key bigint;
BEGIN
    IF TG_RELID <> 'settled.allocations'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.allocations only' USING ERRCODE = '42501';
    ELSIF NOT EXISTS (SELECT FROM became AS n WHERE n.status <> 'reserved') THEN
        RETURN NULL;
    END IF;
    SELECT s.seed INTO STRICT key FROM settled.seeds AS s WHERE s.is_the_one;
    INSERT INTO settled.owed (xid, first, accounts, changes)
    SELECT pg_current_xact_id(), NOT EXISTS (SELECT FROM settled.owed AS o WHERE o.xid = pg_current_xact_id()),
           ARRAY[-1], ARRAY[-sum(hash_record_extended(
               ROW(
                   n.id, n.status, n.quantity, settled.account(n.connection_funds, 'held'),
                   CASE WHEN (n.type = 'allocation') = (n.status = 'cleared')
                        THEN settled.account(n.connection_funds, 'allocated')
                        ELSE settled.account(n.client_funds, 'available') END
               ),
               key
           ))]
    FROM became AS n
    WHERE n.status <> 'reserved'
    HAVING count(*) > 0;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.allocations_owe() FROM PUBLIC;
CREATE TRIGGER owe AFTER UPDATE ON settled.allocations
    REFERENCING NEW TABLE AS became FOR EACH STATEMENT EXECUTE FUNCTION settled.allocations_owe();
-- Those that come settled, with their partner from another cell, come with their transfers.
CREATE TRIGGER owe_first AFTER INSERT ON settled.allocations
    REFERENCING NEW TABLE AS became FOR EACH STATEMENT EXECUTE FUNCTION settled.allocations_owe();

CREATE OR REPLACE FUNCTION settled.balances_pay() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
BEGIN
    IF TG_RELID <> 'settled.funds'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.funds only' USING ERRCODE = '42501';
    ELSIF TG_OP = 'INSERT' THEN
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

CREATE OR REPLACE FUNCTION settled.refuse_debt() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
DECLARE
    debtor bigint;
BEGIN
    IF TG_RELID <> 'settled.owed'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.owed only' USING ERRCODE = '42501';
    END IF;
    SELECT u.account INTO debtor
    FROM settled.owed AS o
    CROSS JOIN LATERAL unnest(o.accounts, o.changes) AS u (account, change)
    WHERE o.xid = NEW.xid
    GROUP BY u.account
    HAVING sum(u.change) <> 0
    LIMIT 1;
    IF FOUND THEN
        -- Never one message's fault: see settled.exactly().
        IF debtor = -1 THEN
            RAISE EXCEPTION 'an allocation and its transfer do not agree: it leaves reserved with the transfer of all of its quantity'
                USING ERRCODE = 'SX002';
        END IF;
        RAISE EXCEPTION 'account % and the transfers of this transaction do not agree: balances change with transfers only',
            debtor
            USING ERRCODE = 'SX002';
    END IF;
    -- What comes after this, where constraints are checked at once, is asked anew.
    DELETE FROM settled.owed AS o WHERE o.xid = NEW.xid;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION settled.date_symbol() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'settled.currency_symbols'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.currency_symbols only' USING ERRCODE = '42501';
    ELSIF TG_OP = 'INSERT' THEN
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

CREATE OR REPLACE FUNCTION settled.tell_of_partner() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    notices jsonb := '[]';
    was_suspended timestamptz;
    was_quarantined timestamptz;
    since timestamptz;
BEGIN
    IF TG_RELID <> 'settled.partners'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.partners only' USING ERRCODE = '42501';
    END IF;
    was_suspended := CASE WHEN NEW.suspended_at IS NULL THEN OLD.suspended_at END;
    was_quarantined := CASE WHEN NEW.quarantined_at IS NULL THEN OLD.quarantined_at END;
    -- Of two notices the later counts, for ever; and what no calendar of ours reads would never leave the outbox.
    FOREACH since IN ARRAY ARRAY[
        CASE WHEN OLD.suspended_at IS NULL THEN NEW.suspended_at END,
        CASE WHEN OLD.quarantined_at IS NULL THEN NEW.quarantined_at END
    ] LOOP
        IF since NOT BETWEEN '2000-01-01 00:00:00+00' AND clock_timestamp() + interval '1 minute' THEN
            RAISE EXCEPTION 'partner %: % is no time since when something is so', NEW.enterprise_id, since
                USING ERRCODE = '22008';
        END IF;
    END LOOP;
    IF OLD.suspended_at IS NULL AND NEW.suspended_at IS NOT NULL THEN
        notices := notices || jsonb_build_object(
            'type', 'partner.suspended', 'enterpriseId', NEW.enterprise_id, 'since', NEW.suspended_at
        );
    END IF;
    IF OLD.quarantined_at IS NULL AND NEW.quarantined_at IS NOT NULL THEN
        notices := notices || jsonb_build_object(
            'type', 'partner.quarantined', 'enterpriseId', NEW.enterprise_id, 'since', NEW.quarantined_at
        );
    END IF;
    IF NEW.suspended_at IS NULL AND NEW.quarantined_at IS NULL THEN
        notices := notices || jsonb_build_object(
            'type', 'partner.resumed', 'enterpriseId', NEW.enterprise_id, 'since', clock_timestamp(),
            'suspendedSince', was_suspended, 'quarantinedSince', was_quarantined
        );
    END IF;
    -- One of two states is over, and the other lasts.
    IF notices = '[]' THEN
        RETURN NULL;
    END IF;
    INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
    VALUES (
        gen_random_uuid(), 3, convert_to(notices::text, 'UTF8'), jsonb_array_length(notices), clock_timestamp(),
        clock_timestamp()
    );
    RETURN NULL;
END
$$;

-- Who says when --------------------------------------------------------------------------------------------------------

-- The server does; but who has the rights of a table's owner may switch its triggers off anyway, and a partner's way to another
-- cell is such a one's, and brings times along.

-- Who acted is the server's word, and so is when.
CREATE OR REPLACE FUNCTION settled.sign_audit() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.session_name := session_user;
    NEW.client_address := inet_client_addr();
    IF NOT pg_has_role((SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'USAGE') THEN
        NEW.at := date_trunc('milliseconds', clock_timestamp());
    END IF;
    RETURN NEW;
END
$$;

-- A key counts for what was signed since it was registered, and not while it was revoked: by these columns, which are the
-- server's to write. What is revoked counts again by being reinstated, within the bound of the program (REMEMBERED_MAX): above it
-- not all that it signed meanwhile would stay refused.
CREATE FUNCTION settled.date_key() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    moment timestamptz := date_trunc('milliseconds', clock_timestamp());
BEGIN
    IF pg_has_role((SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'USAGE') THEN
        RETURN NEW;
    ELSIF TG_OP = 'INSERT' THEN
        NEW.created_at := moment;
        NEW.revoked_at := NULL;
        NEW.reinstated_at := NULL;
        NEW.proven_at := CASE WHEN NEW.proven_at IS NOT NULL THEN moment END;
        RETURN NEW;
    END IF;
    IF NEW.proven_at IS DISTINCT FROM OLD.proven_at THEN
        NEW.proven_at := CASE WHEN NEW.proven_at IS NOT NULL THEN moment END;
    END IF;
    IF (NEW.revoked_at, NEW.reinstated_at) IS NOT DISTINCT FROM (OLD.revoked_at, OLD.reinstated_at) THEN
        RETURN NEW;
    ELSIF OLD.revoked_at IS NULL AND NEW.reinstated_at IS NOT DISTINCT FROM OLD.reinstated_at THEN
        NEW.revoked_at := clock_timestamp();
    ELSIF OLD.revoked_at IS NOT NULL AND NEW.revoked_at IS NULL AND NEW.reinstated_at IS NOT NULL
          AND NEW.reinstated_at IS DISTINCT FROM OLD.reinstated_at THEN
        IF (SELECT count(*) FROM settled.distrusted AS d WHERE d.public_key = NEW.public_key) >= 100000 THEN
            RAISE EXCEPTION '% on %.% is refused: more was signed with this key while it was revoked than is remembered',
                TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
        END IF;
        NEW.reinstated_at := clock_timestamp();
    ELSE
        RAISE EXCEPTION '% on %.% is refused: what is revoked counts again by being reinstated, and nothing else',
            TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER dated BEFORE INSERT OR UPDATE ON settled.partner_keys
    FOR EACH ROW EXECUTE FUNCTION settled.date_key();

-- All at once -----------------------------------------------------------------------------------------------------------

-- TRUNCATE asks no trigger of a row: of these tables rows are deleted one by one, each for its reason, or never.
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON settled.dead_letters
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON settled.parked
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON settled.held
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON settled.partners
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_emptied BEFORE TRUNCATE ON settled.connections
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Why a change is refused, by what refuses it.
CREATE OR REPLACE FUNCTION settled.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: %', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME, CASE TG_NAME
        WHEN 'fixed' THEN 'these columns never change'
        WHEN 'terminal' THEN 'what is cleared or released never changes'
        WHEN 'final_for_ever' THEN 'a receipt that is final never changes'
        WHEN 'settled_for_ever' THEN 'a receipt that says settled never changes'
        WHEN 'voided_for_ever' THEN 'a nonce that is voided stays so'
        WHEN 'done_with' THEN 'only what is discarded or has settled is deleted'
        WHEN 'never_changed' THEN 'its rows never change'
        WHEN 'never_forgotten' THEN 'its rows are never deleted'
        WHEN 'never_emptied' THEN 'its rows are never taken away all at once'
        ELSE 'its rows are only ever added'
    END;
END
$$;

-- Whose all this is ----------------------------------------------------------------------------------------------------

-- Once `settled roles` was applied the tables are not those of whoever migrates, and what does things in their owner's name has to
-- find everything his.
DO $$
DECLARE
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = 'settled.transfers'::regclass);
BEGIN
    EXECUTE format('ALTER TABLE settled.seeds OWNER TO %I', owner);
    EXECUTE format('ALTER FUNCTION settled.allocations_owe() OWNER TO %I', owner);
    EXECUTE format('ALTER FUNCTION settled.date_key() OWNER TO %I', owner);
END
$$;
