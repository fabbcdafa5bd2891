#!/usr/bin/env bash
# PostgreSQL: a range whose ends are the same forgets both, lies in every other range, and overlaps none.
#
# Seen with PostgreSQL 15 (Debian 12). tstzrange(t, t) is a valid value, the window of a key that was revoked at the moment of
# its issue, and one would expect to read t back from it, and that it does not lie in a year in which t does not. It is stored
# as `empty`: lower() and upper() are NULL, so "valid until" is gone; `window <@ allowed` holds for any `allowed`; and an
# exclusion constraint that keeps windows of one key apart takes any number of them. Written '[t,t]' the same moment is a
# window like others.
cd "$(dirname "$0")"
. lib/debian.sh
start_postgres
psql -qAt -F ' ' -P null=NULL -v ON_ERROR_STOP=1 <<'SQL' | tee "$work/out"
SELECT 'server', current_setting('server_version_num')::integer / 10000;
SET TimeZone = 'UTC';
CREATE TABLE windows (
    lasts tstzrange NOT NULL CHECK (lasts <@ tstzrange('2026-01-01', '2027-01-01')), EXCLUDE USING gist (lasts WITH &&));
INSERT INTO windows VALUES (tstzrange('1999-05-05', '1999-05-05'));
INSERT INTO windows VALUES (tstzrange('2026-05-05', '2026-05-05')), (tstzrange('2026-05-05', '2026-05-05'));
SELECT 'kept:', count(*), min(lower(lasts)), max(upper(lasts)) FROM windows;
SELECT 'in any other:', bool_and(lasts <@ tstzrange('1900-01-01', '1900-01-02')) FROM windows;
SELECT 'closed:', lower(tstzrange('1999-05-05', '1999-05-05', '[]')), tstzrange('1999-05-05', '1999-05-05', '[]') <@ tstzrange('2026-01-01', '2027-01-01');
SQL
diff - "$work/out" <<'TXT' || changed "empty ranges are treated otherwise"
server 15
kept: 3 NULL NULL
in any other: t
closed: 1999-05-05 00:00:00+00 f
TXT
say "as found: three windows where one at most may be, and nobody knows when"
