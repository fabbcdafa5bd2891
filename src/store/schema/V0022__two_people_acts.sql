-- Two people by the database's own word for what is no replay: what is discarded, opened again or deleted for ever, and a loss that
-- is accepted.

-- Who acts -------------------------------------------------------------------------------------------------------------

-- The name that a console vouches for, where an act may take two people. Null: whoever typed it.
ALTER TABLE settled.audit ADD COLUMN voucher text;
-- How many messages an act touches is counted along this.
CREATE INDEX audit_subjects_audit_id ON settled.audit_subjects (audit_id);

CREATE OR REPLACE FUNCTION settled.sign_audit() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    NEW.session_name := session_user;
    NEW.client_address := inet_client_addr();
    IF NEW.voucher IS NOT NULL AND NOT settled.may_vouch() THEN
        NEW.voucher := NULL;
    END IF;
    IF NOT pg_has_role((SELECT c.relowner FROM pg_class AS c WHERE c.oid = TG_RELID), 'USAGE') THEN
        NEW.at := date_trunc('milliseconds', clock_timestamp());
    END IF;
    RETURN NEW;
END
$$;

-- What is large --------------------------------------------------------------------------------------------------------

-- An act's messages stand in settled.audit_subjects: more than the limit take an approval of the plan that they are of, and a purge
-- somebody else's voice for the same purge.
CREATE FUNCTION settled.refuse_act_alone() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    most bigint;
    done settled.audit;
    of_plan bigint;
BEGIN
    IF TG_RELID <> 'settled.audit_subjects'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.audit_subjects only' USING ERRCODE = '42501';
    END IF;
    SELECT l.messages INTO most FROM settled.approval_limits AS l;
    IF coalesce(most, 0) = 0 THEN
        RETURN NULL;
    END IF;
    FOR done IN
        SELECT a.*
        FROM settled.audit AS a
        WHERE a.id IN (SELECT s.audit_id FROM added AS s)
          AND a.act IN ('discard', 'restore', 'purge')
    LOOP
        of_plan := CASE WHEN done.act <> 'purge' THEN (done.filters ->> 'plan')::bigint END;
        -- What an act says it is of stands in a row that never changes: each part of its messages is looked at once.
        IF of_plan IS NOT NULL AND EXISTS (
            SELECT
            FROM added AS s
            WHERE s.audit_id = done.id
              AND NOT EXISTS (
                  SELECT
                  FROM settled.plan_items AS p
                  WHERE p.plan_id = of_plan AND p.dead_letter_id = s.dead_letter_id
              )
        ) THEN
            RAISE EXCEPTION 'act % touches a message that plan % has not', done.id, of_plan;
        END IF;
        IF most >= (
            SELECT count(*)
            FROM (SELECT FROM settled.audit_subjects AS s WHERE s.audit_id = done.id LIMIT most + 1) AS n
        ) THEN
            CONTINUE;
        END IF;
        IF done.act = 'purge' THEN
            -- The time that two people have said is the only one.
            IF done.filters ? 'settledBefore'
                AND done.filters ->> 'settledBefore' IS DISTINCT FROM done.filters ->> 'discardedBefore' THEN
                RAISE EXCEPTION 'a purge of more than % messages has one time', most;
            END IF;
            IF NOT EXISTS (
                SELECT
                FROM settled.voices AS v
                WHERE v.act = 'purge'
                  AND v.subject = format(
                      'before %s settled %s', done.filters ->> 'discardedBefore',
                      CASE WHEN done.filters ? 'settledBefore' THEN 'true' ELSE 'false' END
                  )
                  AND v.expires_at > clock_timestamp()
                  AND NOT settled.may_be_one(
                      v.operator, v.voucher, v.session_name, done.operator, done.voucher, done.session_name
                  )
            ) THEN
                RAISE EXCEPTION 'a purge of more than % messages takes two people; nobody else has said so', most;
            END IF;
        ELSIF of_plan IS NULL THEN
            RAISE EXCEPTION 'a % of more than % messages takes two people, and a plan', done.act, most;
        ELSIF NOT EXISTS (
            SELECT
            FROM settled.approvals AS v
            JOIN settled.plans AS p ON p.id = v.plan_id
            WHERE v.plan_id = of_plan
              AND v.act = done.act
              AND v.expires_at > clock_timestamp()
              AND NOT settled.may_be_one(
                  v.operator, v.voucher, v.session_name, p.operator, p.voucher, p.session_name
              )
              AND NOT settled.may_be_one(
                  v.operator, v.voucher, v.session_name, done.operator, done.voucher, done.session_name
              )
        ) THEN
            RAISE EXCEPTION 'a % of more than % messages takes two people; nobody else has approved it of plan %',
                done.act, most, of_plan;
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_act_alone() FROM PUBLIC;
CREATE TRIGGER two_people AFTER INSERT ON settled.audit_subjects
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_act_alone();

-- And nothing is discarded, opened again or deleted but by such an act, which the same transaction has written before.
CREATE FUNCTION settled.refuse_without_act() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    wanted text := 'purge';
BEGIN
    IF TG_RELID <> 'settled.dead_letters'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.dead_letters only' USING ERRCODE = '42501';
    END IF;
    IF NOT EXISTS (SELECT FROM settled.approval_limits AS l WHERE l.messages > 0) THEN
        RETURN NULL;
    END IF;
    IF TG_OP = 'UPDATE' THEN
        wanted := CASE NEW.state WHEN 'discarded' THEN 'discard' WHEN 'open' THEN 'restore' END;
        IF wanted IS NULL THEN
            RAISE EXCEPTION 'dead letter % becomes % by being judged, and by nothing else', OLD.id, NEW.state;
        END IF;
    END IF;
    IF NOT EXISTS (
        SELECT
        FROM settled.audit_subjects AS s
        JOIN settled.audit AS a ON a.id = s.audit_id
        WHERE s.dead_letter_id = OLD.id
          AND a.xmin = pg_current_xact_id()::xid
          AND a.act = wanted
          AND (
              TG_OP = 'UPDATE'
              OR OLD.state = 'discarded' AND OLD.discarded_at < (a.filters ->> 'discardedBefore')::timestamptz
              OR OLD.state = 'settled' AND OLD.judged_at < (a.filters ->> 'settledBefore')::timestamptz
          )
    ) THEN
        RAISE EXCEPTION 'dead letter % is in no % that the audit has', OLD.id, wanted;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_without_act() FROM PUBLIC;
-- Who stores dead letters opens them again where they fail anew, and says what they were judged: whoever may do that needs no other
-- way around this. A message that is judged costs the condition alone.
CREATE TRIGGER by_an_act AFTER UPDATE OF state ON settled.dead_letters
    FOR EACH ROW WHEN (
        NEW.state <> OLD.state
        AND (
            NEW.state = 'discarded'
            OR (OLD.state IN ('discarded', 'settled', 'parked') AND NEW.state <> 'due' OR NEW.state IN ('settled', 'parked'))
                AND NOT has_table_privilege(current_user, 'settled.dead_letters'::regclass, 'INSERT')
        )
    ) EXECUTE FUNCTION settled.refuse_without_act();
CREATE TRIGGER purged_by_an_act AFTER DELETE ON settled.dead_letters
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_without_act();

-- A loss that is accepted ----------------------------------------------------------------------------------------------

-- It takes two people whatever the limits say: two who said the same of the epoch that ends.
CREATE FUNCTION settled.refuse_epoch_alone() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    last settled.epochs;
BEGIN
    IF TG_RELID <> 'settled.epochs'::regclass THEN
        RAISE EXCEPTION 'this function serves settled.epochs only' USING ERRCODE = '42501';
    END IF;
    SELECT e.* INTO last FROM settled.epochs AS e WHERE e.epoch <> NEW.epoch ORDER BY e.epoch DESC LIMIT 1;
    IF last.epoch IS NULL OR NEW.epoch <= last.epoch OR NEW.books <> last.books THEN
        RAISE EXCEPTION 'epoch % of books % does not follow epoch % of books %', NEW.epoch, NEW.books, last.epoch, last.books;
    END IF;
    IF NOT EXISTS (
        SELECT
        FROM settled.voices AS a
        JOIN settled.voices AS b ON b.act = a.act AND b.subject = a.subject AND b.id > a.id
        WHERE a.act = 'recover'
          AND starts_with(a.subject, format('epoch %s: ', last.epoch))
          AND a.expires_at > clock_timestamp()
          AND b.expires_at > clock_timestamp()
          AND NOT settled.may_be_one(
              a.operator, a.voucher, a.session_name, b.operator, b.voucher, b.session_name
          )
    ) THEN
        RAISE EXCEPTION 'a new epoch takes two people who accept the same loss of epoch %', last.epoch;
    END IF;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION settled.refuse_epoch_alone() FROM PUBLIC;
CREATE TRIGGER two_people AFTER INSERT ON settled.epochs
    FOR EACH ROW EXECUTE FUNCTION settled.refuse_epoch_alone();

-- What failed lately ---------------------------------------------------------------------------------------------------

-- Whoever watches a run asks every second how many failed since it began; without this it is a walk through all that are open.
CREATE INDEX dead_letters_failed ON settled.dead_letters (state, last_failed_at);

-- Whose all this is ----------------------------------------------------------------------------------------------------

-- As in V0021.
DO $$
DECLARE
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class AS c WHERE c.oid = 'settled.audit'::regclass);
    made text;
BEGIN
    FOREACH made IN ARRAY ARRAY['refuse_act_alone()', 'refuse_without_act()', 'refuse_epoch_alone()'] LOOP
        EXECUTE format('ALTER FUNCTION settled.%s OWNER TO %I', made, owner);
    END LOOP;
END
$$;
