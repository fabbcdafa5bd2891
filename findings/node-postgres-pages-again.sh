#!/usr/bin/env bash
# A reader in Node that goes on after the last row's time gets that row again, for ever; and its bigints are exact in a column
# and rounded in a row that the server made into JSON.
#
# Seen with pg 8.23.1 on Node 20, PostgreSQL 15 (Debian 12). timestamptz has microseconds, a Date milliseconds, so `at > $1`
# with the Date that was just read is true for the row that it came from: each poll hands the last event out once more, unless
# its microseconds happen to end in 000, as in tests with whole seconds. pg gives bigint and numeric as text, so that nothing
# is lost; json_agg, row_to_json and jsonb go through JSON.parse, and the same id or amount in the same answer is another
# number.
cd "$(dirname "$0")"
. lib/debian.sh
node_with pg@8.23.1
start_postgres
cat >"$work/poll.js" <<'JS'
const { Client } = require('pg');
(async () => {
  const client = new Client({ host: process.env.PGHOST, user: 'finding', database: 'postgres' });
  await client.connect();
  const one = async (sql, values) => (await client.query(sql, values)).rows;
  await client.query(`CREATE TABLE events AS SELECT 9007199254740993 AS id, timestamptz '2026-11-28 10:00:00.123456Z' AS at`);
  let last = new Date(0);
  const seen = [];
  for (let poll = 0; poll < 5; poll++) {
    for (const event of await one('SELECT * FROM events WHERE at > $1 ORDER BY at', [last])) { seen.push(event.id); last = event.at; }
  }
  console.log('one event, five polls:', seen.length, 'events');
  const [{ id, rows }] = await one('SELECT id, (SELECT json_agg(e) FROM events AS e) AS rows FROM events');
  console.log('in a column:', id, 'in JSON:', rows[0].id);
  await client.end();
})();
JS
(cd "$work" && node poll.js) | tee "$work/out"
printf '%s\n' 'one event, five polls: 5 events' 'in a column: 9007199254740993 in JSON: 9007199254740992' | diff - "$work/out" ||
    changed "times or numbers are read otherwise"
say "as found: the last one again and again"
