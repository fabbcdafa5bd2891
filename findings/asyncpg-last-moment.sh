#!/usr/bin/env bash
# asyncpg writes the last microsecond of the year 9999 as infinity, and reads infinity as that microsecond; Rust's SystemTime
# reads it as a day in the year 294277.
#
# Seen with asyncpg 0.32.0, psycopg 3.3.9, pg 8.23.1 on Node 20, tokio-postgres 0.7.18 with jiff 0.2.46, PostgreSQL 15 (Debian
# 12). 9999-12-31T23:59:59.999999Z is finite, RFC 3339 can say it, and it is much used for "valid for ever". Written by
# psycopg it stays finite; by asyncpg it is infinite, and isfinite(), a constraint or a comparison with another writer's row
# say so. Read back, psycopg and jiff refuse infinity with an error, Node gives the number Infinity where a Date is declared,
# asyncpg and SystemTime make up a date.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'tokio-postgres = { version = "=0.7.18", features = ["with-jiff-0_2"] }
jiff = "=0.2.46"
tokio = { version = "1", features = ["rt", "macros"] }' <<'RS'
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let to = format!("host={} user=finding dbname=postgres", std::env::var("PGHOST").unwrap());
    let (client, connection) = tokio_postgres::connect(&to, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let row = client.query_one("SELECT 'infinity'::timestamptz", &[]).await.unwrap();
    let system = row.get::<_, std::time::SystemTime>(0).duration_since(std::time::UNIX_EPOCH).unwrap();
    println!("infinity: SystemTime in year {}", 1970 + system.as_secs() / 31_556_952);
    println!("infinity: jiff {}", row.try_get::<_, jiff::Timestamp>(0).map_or("refuses".into(), |time| time.to_string()));
}
RS
python_with asyncpg==0.32.0 'psycopg[binary]==3.3.9'
node_with pg@8.23.1
start_postgres
cat >"$work/read.js" <<'JS'
const { Client } = require('pg');
(async () => {
  const client = new Client({ host: process.env.PGHOST, user: 'finding', database: 'postgres' });
  await client.connect();
  const { at } = (await client.query("SELECT 'infinity'::timestamptz AS at")).rows[0];
  console.log('infinity: pg', typeof at, at);
  await client.end();
})();
JS
python - <<'PY' | tee "$work/out"
import asyncio, datetime, os, asyncpg, psycopg
last = datetime.datetime(9999, 12, 31, 23, 59, 59, 999999, datetime.timezone.utc)
blocking = psycopg.connect("options='-c TimeZone=UTC'", autocommit=True)
async def main():
    connection = await asyncpg.connect(host=os.environ['PGHOST'], user='finding', database='postgres', server_settings={'timezone': 'UTC'})
    print('written by psycopg:', blocking.execute('SELECT %s::timestamptz::text', [last]).fetchone()[0])
    print('written by asyncpg:', await connection.fetchval('SELECT $1::timestamptz::text', last))
    print('infinity: asyncpg', (await connection.fetchval("SELECT 'infinity'::timestamptz")).replace(tzinfo=None))
    await connection.close()
asyncio.run(main())
try:
    print('infinity: psycopg', blocking.execute("SELECT 'infinity'::timestamptz").fetchone()[0])
except psycopg.DataError:
    print('infinity: psycopg refuses')
PY
(cd "$work" && node read.js) | tee -a "$work/out"
"$work/rust/run" | tee -a "$work/out"
diff - "$work/out" <<'TXT' || changed "infinity is read or written otherwise"
written by psycopg: 9999-12-31 23:59:59.999999+00
written by asyncpg: infinity
infinity: asyncpg 9999-12-31 23:59:59.999999
infinity: psycopg refuses
infinity: pg number Infinity
infinity: SystemTime in year 294277
infinity: jiff refuses
TXT
say "as found: a finite moment that is infinite, and five readings of infinity"
