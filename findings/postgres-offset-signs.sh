#!/usr/bin/env bash
# PostgreSQL: "+02:00" lies east of Greenwich in a time, and west of it as a time zone.
#
# Seen with PostgreSQL 15 (Debian 12). In a literal +02:00 is two hours ahead of UTC, as RFC 3339 has it. The same text after
# AT TIME ZONE, or in SET TimeZone, is read as POSIX has it, where a positive number is behind: four hours between two
# readings of one offset. As a number (SET TimeZone = 2) or an interval it is east again. So a program that takes the offset
# out of a partner's timestamp and hands it back to show, group or close the day in that partner's time is off by twice the
# offset, and only those in UTC notice nothing.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
psql -qAt -F ' ' -v ON_ERROR_STOP=1 <<'SQL' | tee "$work/out"
SELECT 'server', current_setting('server_version_num')::integer / 10000;
SET TimeZone = 'UTC';
\set noon 'timestamp ''2026-11-28 12:00'''
SELECT 'literal:      ', '2026-11-28 12:00+02:00'::timestamptz;
SELECT 'AT TIME ZONE: ', :noon AT TIME ZONE '+02:00';
SELECT 'as interval:  ', :noon AT TIME ZONE interval '+02:00';
SET TimeZone = '+02:00';
SELECT 'SET text:     ', '2026-11-28 12:00'::timestamptz AT TIME ZONE 'UTC';
SET TimeZone = 2;
SELECT 'SET number:   ', '2026-11-28 12:00'::timestamptz AT TIME ZONE 'UTC';
SQL
diff - "$work/out" <<'TXT' || changed "offsets are read otherwise"
server 15
literal:       2026-11-28 10:00:00+00
AT TIME ZONE:  2026-11-28 14:00:00+00
as interval:   2026-11-28 10:00:00+00
SET text:      2026-11-28 14:00:00
SET number:    2026-11-28 10:00:00
TXT
say "as found: noon at +02:00 is ten o'clock, or two"
