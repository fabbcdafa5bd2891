#!/usr/bin/env bash
# PostgreSQL: INSERT ... ON CONFLICT DO NOTHING that inserts nothing runs the table's BEFORE trigger, and what it booked
# stays.
#
# Seen with PostgreSQL 15 (Debian 12). The idiom makes a payment idempotent: the second delivery meets the primary key,
# "INSERT 0 0". One would expect no trace of a row that is not there. But BEFORE INSERT triggers run before the conflict is
# looked for, and their own writes are not undone: a balance that a trigger keeps grows with every duplicate. An AFTER trigger
# for each row runs for inserted rows only, one for each statement runs even when there were none.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
psql -qAt -F ' ' -v ON_ERROR_STOP=1 <<'SQL' | tee "$work/out"
SELECT 'server', current_setting('server_version_num')::integer / 10000;
CREATE TABLE balances (kind text PRIMARY KEY, balance bigint NOT NULL);
INSERT INTO balances VALUES ('before each row', 0), ('after each row', 0), ('after statement', 0);
CREATE TABLE payments (id integer PRIMARY KEY, quantity bigint NOT NULL);
CREATE FUNCTION book() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE balances SET balance = balance + 10 WHERE kind = TG_ARGV[0];
    RETURN NEW;
END $$;
CREATE TRIGGER a BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION book('before each row');
CREATE TRIGGER b AFTER INSERT ON payments FOR EACH ROW EXECUTE FUNCTION book('after each row');
CREATE TRIGGER c AFTER INSERT ON payments FOR EACH STATEMENT EXECUTE FUNCTION book('after statement');
INSERT INTO payments VALUES (1, 10) ON CONFLICT DO NOTHING;
INSERT INTO payments VALUES (1, 10) ON CONFLICT DO NOTHING;
INSERT INTO payments VALUES (1, 10) ON CONFLICT DO NOTHING;
SELECT 'payments:', sum(quantity) FROM payments;
SELECT kind || ':', balance FROM balances ORDER BY kind;
SQL
diff - "$work/out" <<'TXT' || changed "triggers run otherwise"
server 15
payments: 10
after each row: 10
after statement: 30
before each row: 30
TXT
say "as found: one payment, booked three times"
