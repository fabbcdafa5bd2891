-- Dead letters: one row for what is judged alike, why a row is settled that nobody replayed, and how much they take.

ALTER TABLE settled.dead_letters
    -- Why it is settled without a replay.
    ADD COLUMN note text,
    -- When it was last looked at whether it has settled since. Null: never.
    ADD COLUMN checked_at timestamptz;

COMMENT ON COLUMN settled.dead_letters.id IS
    'The head of SHA-256 over everything of the message that is judged (see domain::dead_letter::Identity); of rows stored '
    'before version 5, over routing key and body alone.';

-- How many dead letters there are and how many bytes they take, by partner ('' where none can be read), as sums of rows:
-- whoever stores or deletes some adds a row, so that nobody waits for another's. The worker puts them together now and then.
CREATE TABLE settled.dead_letter_space (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL,
    rows           bigint NOT NULL,
    -- Of bodies and properties.
    bytes          bigint NOT NULL
);

CREATE FUNCTION settled.count_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    CASE TG_OP
        WHEN 'INSERT' THEN
            INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
            SELECT coalesce(c.enterprise_id, ''), count(*), sum(octet_length(c.body) + octet_length(c.properties))
            FROM changed AS c
            GROUP BY 1;
        WHEN 'DELETE' THEN
            INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
            SELECT coalesce(c.enterprise_id, ''), -count(*), -sum(octet_length(c.body) + octet_length(c.properties))
            FROM changed AS c
            GROUP BY 1;
        ELSE
            DELETE FROM settled.dead_letter_space;
    END CASE;
    RETURN NULL;
END
$$;
CREATE TRIGGER counted_in AFTER INSERT ON settled.dead_letters
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();
CREATE TRIGGER counted_out AFTER DELETE ON settled.dead_letters
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();
CREATE TRIGGER counted_away AFTER TRUNCATE ON settled.dead_letters
    FOR EACH STATEMENT EXECUTE FUNCTION settled.count_dead_letters();

INSERT INTO settled.dead_letter_space (enterprise_id, rows, bytes)
SELECT coalesce(d.enterprise_id, ''), count(*), sum(octet_length(d.body) + octet_length(d.properties))
FROM settled.dead_letters AS d
GROUP BY 1;
