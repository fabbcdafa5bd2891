-- What an operator's role may do by SQL to what was refused is what its commands do; and each reservation is judged on its own.

-- A nonce that was voided stays so: whoever takes that back lets settle what was not to settle any more.
CREATE TRIGGER voided_for_ever BEFORE UPDATE OF voided_at ON settled.receipts
    FOR EACH ROW WHEN (OLD.voided_at IS NOT NULL AND NEW.voided_at IS DISTINCT FROM OLD.voided_at)
    EXECUTE FUNCTION settled.refuse_change();

-- A dead letter is deleted once a person is done with it, or it has settled. One that waits for a person, a run or its
-- reservation is the only place where its message is.
CREATE TRIGGER done_with BEFORE DELETE ON settled.dead_letters
    FOR EACH ROW WHEN (OLD.state NOT IN ('discarded', 'settled')) EXECUTE FUNCTION settled.refuse_change();

-- A reservation under the id of a deposit or a withdrawal is refused like one under an id that was taken: it failed with all
-- that were asked for in the same breath, since a transfer's key is its subject's id.
CREATE FUNCTION settled.leave_taken_id() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM settled.transfers AS t WHERE t.subject_id = NEW.id AND t.step = 0) THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$$;
REVOKE ALL ON FUNCTION settled.leave_taken_id() FROM PUBLIC;
CREATE TRIGGER id_taken BEFORE INSERT ON settled.allocations
    FOR EACH ROW EXECUTE FUNCTION settled.leave_taken_id();

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
        ELSE 'its rows are only ever added'
    END;
END
$$;
