-- Two people by the database's own word: whose voucher counts, what takes two of them whatever the acting program's settings
-- say, and that what was approved is what is replayed.

-- Who vouches ----------------------------------------------------------------------------------------------------------

-- A voucher stands in the place of the login. So it counts only from the login of a console (`settled roles` makes the role).
CREATE FUNCTION settled.may_vouch() RETURNS boolean LANGUAGE sql STABLE
SET search_path = pg_catalog, pg_temp AS $$
    SELECT EXISTS (
        SELECT
        FROM pg_roles AS r
        WHERE r.rolname = 'settled_console' AND pg_has_role(session_user, r.oid, 'USAGE')
    )
$$;

CREATE FUNCTION settled.sign_person() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.session_name := session_user;
    NEW.client_address := inet_client_addr();
    IF NEW.voucher IS NOT NULL AND NOT settled.may_vouch() THEN
        NEW.voucher := NULL;
    END IF;
    RETURN NEW;
END
$$;

-- Until now anybody's SQL could write one: none of those counts.
ALTER TABLE settled.approvals DISABLE TRIGGER append_only;
ALTER TABLE settled.voices DISABLE TRIGGER append_only;
UPDATE settled.plans SET voucher = NULL WHERE voucher IS NOT NULL;
UPDATE settled.approvals SET voucher = NULL WHERE voucher IS NOT NULL;
UPDATE settled.voices SET voucher = NULL WHERE voucher IS NOT NULL;
ALTER TABLE settled.approvals ENABLE TRIGGER append_only;
ALTER TABLE settled.voices ENABLE TRIGGER append_only;

ALTER TABLE settled.runs
    ADD COLUMN voucher text,
    ADD COLUMN session_name text,
    ADD COLUMN client_address inet;
DROP TRIGGER signed ON settled.plans;
DROP TRIGGER signed ON settled.approvals;
DROP TRIGGER signed ON settled.voices;
CREATE TRIGGER signed BEFORE INSERT ON settled.plans FOR EACH ROW EXECUTE FUNCTION settled.sign_person();
CREATE TRIGGER signed BEFORE INSERT ON settled.approvals FOR EACH ROW EXECUTE FUNCTION settled.sign_person();
CREATE TRIGGER signed BEFORE INSERT ON settled.voices FOR EACH ROW EXECUTE FUNCTION settled.sign_person();
CREATE TRIGGER signed BEFORE INSERT ON settled.runs FOR EACH ROW EXECUTE FUNCTION settled.sign_person();

-- Whether two may be one person (domain::person). Of a name that a console vouches for and a login nobody knows that they are two.
CREATE FUNCTION settled.may_be_one(
    operator_a text, voucher_a text, session_a text, operator_b text, voucher_b text, session_b text
) RETURNS boolean LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT (voucher_a IS NULL) <> (voucher_b IS NULL)
        OR EXISTS (
            SELECT
            FROM unnest(ARRAY[operator_a, coalesce(voucher_a, session_a)]) AS a (name)
            JOIN unnest(ARRAY[operator_b, coalesce(voucher_b, session_b)]) AS b (name)
              ON lower(btrim(a.name)) = lower(btrim(b.name))
        )
$$;

-- What was approved is what is replayed --------------------------------------------------------------------------------

-- An approval names a plan by its number. So no number comes twice, nor is one chosen: the sequence is nobody's but the owner's.
DO $$
DECLARE
    last bigint;
    used boolean;
BEGIN
    SELECT s.last_value, s.is_called INTO last, used FROM settled.plans_id_seq AS s;
    ALTER TABLE settled.plans ALTER COLUMN id DROP IDENTITY;
    CREATE SEQUENCE settled.plans_number;
    -- It is whose the table is, which need not be whoever migrates.
    EXECUTE format('ALTER SEQUENCE settled.plans_number OWNER TO %I', (
        SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = 'settled.plans'::regclass
    ));
    ALTER SEQUENCE settled.plans_number OWNED BY settled.plans.id;
    PERFORM setval('settled.plans_number', last, used);
END
$$;
CREATE FUNCTION settled.number_plan() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'settled.plans'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.plans only' USING ERRCODE = '42501';
    END IF;
    NEW.id := nextval('settled.plans_number');
    RETURN NEW;
END
$$;
REVOKE ALL ON FUNCTION settled.number_plan() FROM PUBLIC;
CREATE TRIGGER numbered BEFORE INSERT ON settled.plans FOR EACH ROW EXECUTE FUNCTION settled.number_plan();
-- To lock a row takes the right to change it; nobody does.
CREATE TRIGGER fixed BEFORE UPDATE ON settled.plans FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- A plan has its messages from the transaction that made it, and gets no others.
CREATE FUNCTION settled.refuse_later_items() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'settled.plan_items'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.plan_items only' USING ERRCODE = '42501';
    END IF;
    IF EXISTS (
        SELECT
        FROM settled.plans AS p
        WHERE p.id IN (SELECT a.plan_id FROM added AS a)
          AND p.xmin <> pg_current_xact_id()::xid
    ) THEN
        RAISE EXCEPTION 'a plan keeps the messages that it was made with';
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_later_items() FROM PUBLIC;
CREATE TRIGGER with_its_plan AFTER INSERT ON settled.plan_items
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_later_items();

-- What takes two people ------------------------------------------------------------------------------------------------

-- One row or none. With it a setting can make more take two people, and never less. It is the owner's: `settled roles --two-people`.
CREATE TABLE settled.approval_limits (
    one       boolean PRIMARY KEY DEFAULT true CHECK (one),
    -- A replay of more messages takes two people; 0: however many.
    messages  bigint NOT NULL CHECK (messages >= 0),
    -- One that could move more of a currency, in base units: {"BTC": "100000000"}.
    amounts   jsonb NOT NULL CHECK (jsonb_typeof(amounts) = 'object')
);

-- A run takes what its plan has; and what is large, what somebody else approved. What it could move is counted from what is
-- reserved, and not from what whoever planned it wrote.
CREATE FUNCTION settled.refuse_alone() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    limits settled.approval_limits;
    run settled.runs;
    many bigint;
    why text;
BEGIN
    IF TG_RELID <> 'settled.run_items'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.run_items only' USING ERRCODE = '42501';
    END IF;
    SELECT l.* INTO limits FROM settled.approval_limits AS l;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    FOR run IN SELECT r.* FROM settled.runs AS r WHERE r.id IN (SELECT a.run_id FROM added AS a) LOOP
        IF EXISTS (
            SELECT
            FROM added AS a
            WHERE a.run_id = run.id
              AND NOT EXISTS (
                  SELECT
                  FROM settled.plan_items AS p
                  WHERE p.plan_id = run.plan_id AND p.dead_letter_id = a.dead_letter_id
              )
        ) THEN
            RAISE EXCEPTION 'run % takes a message that plan % has not', run.id, run.plan_id;
        END IF;
        SELECT count(*) INTO many FROM settled.run_items AS i WHERE i.run_id = run.id;
        why := NULL;
        IF limits.messages > 0 AND many > limits.messages THEN
            why := format('%s messages are more than %s', many, limits.messages);
        ELSIF limits.amounts <> '{}' THEN
            SELECT CASE
                       WHEN s.currency IS NULL THEN 'what they would move is not known'
                       ELSE format('%s %s are more than %s', s.moved, s.currency, limits.amounts ->> s.currency)
                   END
            INTO why
            FROM (
                SELECT a.currency, sum(a.quantity) AS moved
                FROM (
                    SELECT DISTINCT d.allocation_id
                    FROM settled.run_items AS i
                    JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
                    WHERE i.run_id = run.id AND d.allocation_id IS NOT NULL
                ) AS n
                LEFT JOIN settled.allocations AS a ON a.id = n.allocation_id
                WHERE a.id IS NULL OR a.status = 'reserved'
                GROUP BY a.currency
            ) AS s
            WHERE s.currency IS NULL OR s.moved > (limits.amounts ->> s.currency)::numeric
            LIMIT 1;
        END IF;
        IF why IS NOT NULL AND NOT EXISTS (
            SELECT
            FROM settled.approvals AS v
            JOIN settled.plans AS p ON p.id = v.plan_id
            WHERE v.plan_id = run.plan_id
              AND v.act = 'replay'
              AND v.expires_at > clock_timestamp()
              AND NOT settled.may_be_one(
                  v.operator, v.voucher, v.session_name, p.operator, p.voucher, p.session_name
              )
              AND NOT settled.may_be_one(
                  v.operator, v.voucher, v.session_name, run.operator, run.voucher, run.session_name
              )
        ) THEN
            RAISE EXCEPTION 'a replay of plan % takes two people: %; nobody else has approved it', run.plan_id, why;
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_alone() FROM PUBLIC;
CREATE TRIGGER two_people AFTER INSERT ON settled.run_items
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_alone();

-- And nothing is replayed but by a run that is to take it still.
CREATE FUNCTION settled.refuse_without_run() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_RELID <> 'settled.dead_letters'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.dead_letters only' USING ERRCODE = '42501';
    END IF;
    IF EXISTS (SELECT FROM settled.approval_limits) AND NOT EXISTS (
        SELECT
        FROM settled.run_items AS i
        WHERE i.run_id = NEW.run_id AND i.dead_letter_id = NEW.id AND i.state = 'waiting'
    ) THEN
        RAISE EXCEPTION 'dead letter % is in no run that replays it', NEW.id;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_without_run() FROM PUBLIC;
CREATE TRIGGER by_a_run AFTER UPDATE OF state ON settled.dead_letters
    FOR EACH ROW WHEN (NEW.state = 'due' AND OLD.state <> 'due') EXECUTE FUNCTION settled.refuse_without_run();

-- Whose all this is ----------------------------------------------------------------------------------------------------

-- As in V0020. And whoever plans asks for the limits from now on, whether `settled roles` was applied again or not.
DO $$
DECLARE
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = 'settled.plans'::regclass);
    made text;
BEGIN
    EXECUTE format('ALTER TABLE settled.approval_limits OWNER TO %I', owner);
    FOREACH made IN ARRAY ARRAY[
        'may_vouch()', 'sign_person()', 'may_be_one(text, text, text, text, text, text)', 'number_plan()',
        'refuse_later_items()', 'refuse_alone()', 'refuse_without_run()'
    ] LOOP
        EXECUTE format('ALTER FUNCTION settled.%s OWNER TO %I', made, owner);
    END LOOP;
    IF EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = 'settled_operator') THEN
        GRANT SELECT ON settled.approval_limits TO settled_operator;
    END IF;
END
$$;
