#!/usr/bin/env bash
# PostgreSQL: NaN is a value of numeric(78, 0), is larger than 0, and equals itself. So CHECK (quantity > 0) takes it, and a
# ledger with it in passes the checks that are meant to prove it.
#
# Seen with PostgreSQL 15 (Debian 12). One would expect a column with precision and scale to hold numbers only, as it refuses
# Infinity, or a comparison with NaN to be false, as IEEE 754 has it and every language that writes to the column. Here the
# constraint that nothing is negative holds, the kept balance equals the sum of the entries (NaN = NaN), and only arithmetic
# that subtracts says otherwise. And a fraction in the same column is rounded without a word: 0.5 of a satoshi becomes 1.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
psql -qAt -F ' ' -v ON_ERROR_STOP=1 <<'SQL' | tee "$work/out"
SELECT 'server', current_setting('server_version_num')::integer / 10000;
CREATE TABLE entries (account integer, quantity numeric(78, 0) NOT NULL CHECK (quantity > 0));
CREATE TABLE balances (account integer, balance numeric(78, 0) NOT NULL CHECK (balance >= 0));
INSERT INTO entries VALUES (1, 5), (1, 'NaN');
INSERT INTO balances VALUES (1, 'NaN');
SELECT 'the balance equals the sum of its entries:', b.balance = sum(e.quantity), sum(e.quantity)
FROM balances AS b JOIN entries AS e USING (account) GROUP BY b.balance;
SELECT 'nothing is negative:', NOT EXISTS (SELECT FROM balances WHERE balance < 0);
SELECT 'more than any amount:', 'NaN'::numeric(78, 0) > repeat('9', 78)::numeric(78, 0);
INSERT INTO entries VALUES (2, 0.5) RETURNING 'half of one is', quantity;
DO $$ BEGIN INSERT INTO entries VALUES (1, 'Infinity'); EXCEPTION WHEN OTHERS THEN RAISE NOTICE 'Infinity: %', SQLSTATE; END $$;
SQL
cat >"$work/expected" <<'TXT'
server 15
the balance equals the sum of its entries: t NaN
nothing is negative: t
more than any amount: t
half of one is 1
TXT
diff "$work/expected" "$work/out" || changed "NaN is treated otherwise"
say "as found: a column for amounts holds what is no amount, and the sums agree"
