#!/usr/bin/env bash
# RFC 3339 goes from the year 0000 to the end of 9999 and allows offsets up to 23:59; each part that a time passes stops
# somewhere before, and each elsewhere.
#
# Seen with jiff 0.2.46, chrono 0.4.45, PostgreSQL 15 (Debian 12), CPython 3.11, Node 20. jiff's Timestamp ends on 9999-12-30
# at 22:00, so that every offset that it knows fits, and refuses 9999-12-31T23:59:59Z, which half the world writes for "no
# end"; PostgreSQL refuses year 0000 and offsets of 16 hours and more, Python year 0 only, jiff more than nine digits of a
# second. So a registry row that the database holds can be one that the program can not read, and a time that a program
# accepts one that the database refuses.
cd "$(dirname "$0")"
. lib/debian.sh
times=(9999-12-31T23:59:59Z 0000-01-01T00:00:00Z 2026-11-28T10:00:00+23:59 2026-11-28T10:00:00.1234567891Z)
rust_with 'jiff = "=0.2.46"
chrono = "=0.4.45"' <<'RS'
fn main() {
    println!("jiff's last moment: {}", jiff::Timestamp::MAX);
    for time in std::env::args().skip(1) {
        let word = |taken| if taken { "takes" } else { "refuses" };
        println!("{time} jiff {}", word(time.parse::<jiff::Timestamp>().is_ok()));
        println!("{time} chrono {}", word(chrono::DateTime::parse_from_rfc3339(&time).is_ok()));
    }
}
RS
start_postgres
{
    "$work/rust/run" "${times[@]}"
    for time in "${times[@]}"; do
        if psql -qAtc "SELECT '$time'::timestamptz" >/dev/null 2>&1; then say "$time PostgreSQL takes"; else say "$time PostgreSQL refuses"; fi
        python3 -c '
import datetime, sys
try: datetime.datetime.fromisoformat(sys.argv[1]); print(sys.argv[1], "Python takes")
except ValueError: print(sys.argv[1], "Python refuses")' "$time"
        node -e 'console.log(process.argv[1], "Node", isNaN(new Date(process.argv[1])) ? "refuses" : "takes")' "$time"
    done
} | LC_ALL=C sort | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "the ends are elsewhere"
0000-01-01T00:00:00Z Node takes
0000-01-01T00:00:00Z PostgreSQL refuses
0000-01-01T00:00:00Z Python refuses
0000-01-01T00:00:00Z chrono takes
0000-01-01T00:00:00Z jiff takes
2026-11-28T10:00:00+23:59 Node takes
2026-11-28T10:00:00+23:59 PostgreSQL refuses
2026-11-28T10:00:00+23:59 Python takes
2026-11-28T10:00:00+23:59 chrono takes
2026-11-28T10:00:00+23:59 jiff takes
2026-11-28T10:00:00.1234567891Z Node takes
2026-11-28T10:00:00.1234567891Z PostgreSQL takes
2026-11-28T10:00:00.1234567891Z Python takes
2026-11-28T10:00:00.1234567891Z chrono takes
2026-11-28T10:00:00.1234567891Z jiff refuses
9999-12-31T23:59:59Z Node takes
9999-12-31T23:59:59Z PostgreSQL takes
9999-12-31T23:59:59Z Python takes
9999-12-31T23:59:59Z chrono takes
9999-12-31T23:59:59Z jiff refuses
jiff's last moment: 9999-12-30T22:00:00.999999999Z
TXT
say "as found: four valid times, and each is refused by somebody"
