#!/usr/bin/env bash
# One valid RFC 3339 time, a leap second, is a different moment, or none, to each of the parts that a message passes.
#
# Seen with PostgreSQL 15 (Debian 12), jiff 0.2.43, Node 20, CPython 3.11. 2016-12-31T23:59:60Z was a real second. PostgreSQL
# takes it for the first second of the new year, jiff for the last of the old one, Node gives an invalid date without an
# error, and Python refuses it. RFC 3339 section 5.6 allows second 60. So a window that ends then is a second longer in the
# database than in the program that wrote it, and in a browser it has no end at all.
cd "$(dirname "$0")"
. lib/debian.sh
time=2016-12-31T23:59:60Z
mkdir -p "$work/jiff/src"
(
    cd "$work/jiff"
    printf '[package]\nname = "leap"\nversion = "0.1.0"\nedition = "2021"\n[dependencies]\njiff = "=0.2.43"\n' >Cargo.toml
    printf 'fn main() { println!("jiff {}", "%s".parse::<jiff::Timestamp>().unwrap()); }\n' "$time" >src/main.rs
    cargo run -q
) | tee "$work/out"
start_postgres
psql -qAtc "SET TimeZone = 'UTC'" -c "SELECT 'postgres ' || to_char('$time'::timestamptz, 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')" | tee -a "$work/out"
node -e "console.log('node', String(new Date('$time')))" | tee -a "$work/out"
python3 -c "
import datetime
try: print('python', datetime.datetime.fromisoformat('$time'))
except ValueError as error: print('python', 'ValueError')" | tee -a "$work/out"
printf '%s\n' 'jiff 2016-12-31T23:59:59Z' 'postgres 2017-01-01T00:00:00Z' 'node Invalid Date' 'python ValueError' |
    diff - "$work/out" || changed "leap seconds are read otherwise"
say "as found: four parts, four readings of one time"
