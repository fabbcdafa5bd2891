#!/usr/bin/env bash
# PostgreSQL: UPDATE ... WHERE id IN (SELECT id ... LIMIT 1 FOR UPDATE SKIP LOCKED), the usual way to take one job, takes all
# ten.
#
# Seen with PostgreSQL 15 (Debian 12), nothing but its own settings, no second session. The planner may put the subquery on
# the inner side of a nested loop, where it runs once for each row of the outer one; each run skips the rows that this very
# statement has changed already, and so finds the next. That happens when the table was small at the last ANALYZE, as a queue
# or an outbox is when all is well; after an ANALYZE at ten rows the same statement takes one. The same with FROM (subquery)
# and with DELETE. A scalar `id = (SELECT ...)` and WITH ... AS MATERIALIZED are run once. So a bound on a batch is no bound,
# and a worker that takes "one" publishes, or deletes, all of them.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
psql -qAt -F ' ' -v ON_ERROR_STOP=1 <<'SQL' | tee "$work/out"
SELECT 'server', current_setting('server_version_num')::integer / 10000;
CREATE TABLE outbox (id integer PRIMARY KEY, taken boolean NOT NULL DEFAULT false);
INSERT INTO outbox VALUES (0);
VACUUM ANALYZE outbox;
DELETE FROM outbox;
INSERT INTO outbox SELECT generate_series(1, 10);
BEGIN;
WITH changed AS (
    UPDATE outbox SET taken = true
    WHERE id IN (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id)
SELECT 'UPDATE IN:', count(*) FROM changed;
ROLLBACK; BEGIN;
WITH changed AS (
    UPDATE outbox AS o SET taken = true
    FROM (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) AS one WHERE o.id = one.id RETURNING o.id)
SELECT 'UPDATE FROM:', count(*) FROM changed;
ROLLBACK; BEGIN;
WITH changed AS (
    DELETE FROM outbox
    WHERE id IN (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id)
SELECT 'DELETE IN:', count(*) FROM changed;
ROLLBACK; BEGIN;
WITH changed AS (
    UPDATE outbox SET taken = true
    WHERE id = (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id)
SELECT 'UPDATE =:', count(*) FROM changed;
ROLLBACK; BEGIN;
WITH one AS MATERIALIZED (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED), changed AS (
    UPDATE outbox AS o SET taken = true FROM one WHERE o.id = one.id RETURNING o.id)
SELECT 'UPDATE FROM MATERIALIZED:', count(*) FROM changed;
ROLLBACK;
ANALYZE outbox;
WITH changed AS (
    UPDATE outbox SET taken = true
    WHERE id IN (SELECT id FROM outbox WHERE NOT taken ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id)
SELECT 'UPDATE IN, analyzed:', count(*) FROM changed;
SQL
diff - "$work/out" <<'TXT' || changed "another number of rows is taken"
server 15
UPDATE IN: 10
UPDATE FROM: 10
DELETE IN: 10
UPDATE =: 1
UPDATE FROM MATERIALIZED: 1
UPDATE IN, analyzed: 1
TXT
say "as found: LIMIT 1 takes ten"
