-- Dead letters: one row for what is judged alike, and why a row is settled that nobody replayed.

ALTER TABLE settled.dead_letters
    -- Why it is settled without a replay.
    ADD COLUMN note text,
    -- When it was last looked at whether it has settled since. Null: never.
    ADD COLUMN checked_at timestamptz;

COMMENT ON COLUMN settled.dead_letters.id IS
    'The head of SHA-256 over everything of the message that is judged (see domain::dead_letter::Identity); of rows stored '
    'before version 5, over routing key and body alone.';
