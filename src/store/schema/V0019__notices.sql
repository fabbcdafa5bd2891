-- What is done to a partner is told as an event, by whatever hand it is done. The act's own transaction puts it into the outbox,
-- owned by nobody, so that the next relay publishes it: nothing is told that did not commit, and nothing commits untold. Format 3
-- of a row is a JSON array of such notices, which can say nothing else (domain::notice); who acts needs no right on the outbox,
-- with which anything could be published.

CREATE FUNCTION settled.tell_of_partner() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET timezone = 'UTC' AS $$
DECLARE
    notices jsonb := '[]';
    was_suspended timestamptz := CASE WHEN NEW.suspended_at IS NULL THEN OLD.suspended_at END;
    was_quarantined timestamptz := CASE WHEN NEW.quarantined_at IS NULL THEN OLD.quarantined_at END;
    since timestamptz;
BEGIN
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
REVOKE ALL ON FUNCTION settled.tell_of_partner() FROM PUBLIC;

-- A change that is none tells nothing. Nor does a partner's way to another cell, on which it is held because it moves.
CREATE TRIGGER told AFTER UPDATE OF suspended_at, quarantined_at ON settled.partners
    FOR EACH ROW WHEN (
        OLD.moving IS NULL AND NEW.moving IS NULL
        AND (
            (OLD.suspended_at IS NULL) <> (NEW.suspended_at IS NULL)
            OR (OLD.quarantined_at IS NULL) <> (NEW.quarantined_at IS NULL)
        )
    ) EXECUTE FUNCTION settled.tell_of_partner();
