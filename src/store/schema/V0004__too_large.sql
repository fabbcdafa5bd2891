-- What is too large to be judged is kept with its head only: how long its body was, and why it is too large. The digest is
-- that of the whole body. Null: the message is kept as it was received.
ALTER TABLE settled.dead_letters
    ADD COLUMN body_length bigint CHECK (body_length >= octet_length(body)),
    ADD COLUMN too_large text,
    ADD CHECK ((body_length IS NULL) = (too_large IS NULL));
