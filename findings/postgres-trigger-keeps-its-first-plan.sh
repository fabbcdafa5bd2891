#!/usr/bin/env bash
# PostgreSQL: a statement-level trigger that joins its OLD TABLE with its NEW TABLE keeps the plan of its first call on a
# connection. Where that one changed a single row, a later UPDATE of 300 rows compares 90,000 pairs.
#
# Seen with PostgreSQL 15 (Debian 12). PL/pgSQL plans a static statement once a connection. The planner knows exactly how many
# rows a transition table has, since it plans when the trigger runs first; for one row each a nested loop is as good as a hash
# join. A statement without parameters is never planned anew for its values; only an ANALYZE of the trigger's own table, or a
# change of it, throws the plan away, and the call after that decides again for all that follow. So a batch worker is fast or
# slow for minutes or for days by whether one batch was a small one; in psql, where the first call is the large one, the same
# statements show nothing. A FULL JOIN, which can be no nested loop, or EXECUTE, which plans each time, are not affected.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
cat >"$work/setup.sql" <<'SQL'
CREATE TABLE balances (id bigint PRIMARY KEY, amount numeric NOT NULL DEFAULT 0);
CREATE TABLE changes (changed bigint, by numeric);
INSERT INTO balances (id) SELECT generate_series(1, 1000);
VACUUM ANALYZE balances;
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO changes
    SELECT count(*), sum(n.amount - o.amount) FROM became AS n JOIN was AS o ON o.id = n.id;
    RETURN NULL;
END
$$;
CREATE TRIGGER note AFTER UPDATE ON balances
    REFERENCING OLD TABLE AS was NEW TABLE AS became FOR EACH STATEMENT EXECUTE FUNCTION note();
SQL
psql -q -v ON_ERROR_STOP=1 -f "$work/setup.sql"
explain="LOAD 'auto_explain'; SET auto_explain.log_nested_statements = on; SET auto_explain.log_min_duration = 0;
    SET auto_explain.log_analyze = on; SET client_min_messages = log"
many='UPDATE balances SET amount = amount + 1 WHERE id <= 300'
joined() { # TITLE STATEMENT...: how the trigger of the last statement joined
    local title=$1 statement
    shift
    local asked=(-c "$explain")
    for statement in "$@"; do asked+=(-c "$statement"); done
    psql -qAt "${asked[@]}" 2>&1 | sed -n '/INSERT INTO changes/,$p' | grep -oE '(Nested Loop|Hash Join|Merge Join|Hash Full Join|Merge Full Join|Rows Removed by Join Filter: [0-9]+)' |
        tail -n "$lines" | tr '\n' ',' | sed "s/^/$title: /; s/,\$/\n/; s/,\([^ ]\)/, \1/g"
}
{
    lines=1 joined '300 rows first' "$many"
    lines=2 joined 'one row first, then 300' 'UPDATE balances SET amount = amount + 1 WHERE id = 1' "$many"
    lines=2 joined 'one row first, ANALYZE, then 300' 'UPDATE balances SET amount = amount + 1 WHERE id = 1' 'ANALYZE balances' "$many"
    psql -q -c 'CREATE OR REPLACE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO changes
        SELECT count(*), sum(n.amount - o.amount) FROM became AS n FULL JOIN was AS o ON o.id = n.id; RETURN NULL; END $$'
    lines=1 joined 'a full join, one row first, then 300' 'UPDATE balances SET amount = amount + 1 WHERE id = 1' "$many"
} | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "a trigger's statement is planned otherwise"
300 rows first: Hash Join
one row first, then 300: Nested Loop, Rows Removed by Join Filter: 89700
one row first, ANALYZE, then 300: Nested Loop, Hash Join
a full join, one row first, then 300: Hash Full Join
TXT
say "as found: the plan of the first call is kept"
