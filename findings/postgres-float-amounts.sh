#!/usr/bin/env bash
# PostgreSQL: a float8 that holds a whole number exactly becomes another number when it is cast to numeric; so one Python
# value is booked as two amounts, depending on the driver.
#
# Seen with PostgreSQL 15 (Debian 12), psycopg 3.3.9, psycopg2 2.9.13, asyncpg 0.32.0. A float8 has 53 bits, all whole numbers
# up to 2^53 are exact, the server prints all digits of 2099999999999999 (the satoshis of all bitcoins, less one) and casts it
# to bigint without loss. Its cast to numeric, which one would take for the safest, keeps 15 digits. psycopg 3 sends a float
# as float8 and the column's assignment casts it; psycopg2 writes digits into the statement and asyncpg sends a decimal: those
# are right. So upgrading psycopg changes amounts, by up to 5 units from 10^15 on, without an error.
cd "$(dirname "$0")"
. lib/debian.sh
python_with 'psycopg[binary]==3.3.9' psycopg2-binary==2.9.13 asyncpg==0.32.0
start_postgres
python - <<'PY' | tee "$work/out"
import asyncio, os, asyncpg, psycopg, psycopg2
amount = 2099999999999999.0
new = psycopg.connect(autocommit=True)
print('float8 %s, as bigint %s, as numeric %s' % new.execute('SELECT x::text, x::bigint, x::numeric FROM (SELECT %s::float8 AS x) AS _', [amount]).fetchone())
new.execute('CREATE TABLE entries (quantity numeric(78, 0))')
insert = 'INSERT INTO entries VALUES (%s) RETURNING quantity'
print('psycopg ', new.execute(insert, [amount]).fetchone()[0])
old = psycopg2.connect(host=os.environ['PGHOST'], user=os.environ['PGUSER'], dbname='postgres').cursor()
old.execute(insert, [amount])
print('psycopg2', old.fetchone()[0])
async def third():
    connection = await asyncpg.connect(host=os.environ['PGHOST'], user=os.environ['PGUSER'], database='postgres')
    print('asyncpg ', await connection.fetchval(insert.replace('%s', '$1'), amount))
    await connection.close()
asyncio.run(third())
PY
diff - "$work/out" <<'TXT' || changed "the amounts are others"
float8 2.099999999999999e+15, as bigint 2099999999999999, as numeric 2100000000000000
psycopg  2100000000000000
psycopg2 2099999999999999
asyncpg  2099999999999999
TXT
say "as found: one value, two amounts"
