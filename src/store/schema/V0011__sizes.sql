-- What the console asks of a million dead letters is answered by an index.

-- Those that nobody known made, and those that the broker did, are few among many.
CREATE INDEX dead_letters_made_by ON settled.dead_letters (made_by, state, seq) WHERE made_by <> 'settled';
-- How many would be purged.
CREATE INDEX dead_letters_discarded ON settled.dead_letters (discarded_at) WHERE state = 'discarded';
CREATE INDEX dead_letters_judged ON settled.dead_letters (judged_at) WHERE state = 'settled';
-- In which state each message of a plan is now.
CREATE INDEX dead_letters_now ON settled.dead_letters (id) INCLUDE (state);
