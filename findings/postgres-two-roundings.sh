#!/usr/bin/env bash
# One instant, handed to one PostgreSQL column by one program, is stored as two values: as text it is rounded, as a parameter
# it is cut off; before the year 2000 it is cut off upwards.
#
# Seen with PostgreSQL 15 (Debian 12), tokio-postgres 0.7.18, jiff 0.2.46, chrono 0.4.45. RFC 3339 and both time types have
# nanoseconds, the column has microseconds. The server rounds what it reads as text, over the end of the second and of the
# year: 23:59:59.9999996 on New Year's Eve is in the next year. tokio-postgres sends the distance from 2000-01-01 as an
# integer and drops what does not fit, towards that day. So a window given by text in a registry and the time of a message
# bound as a parameter disagree about the same instant, and "the row that was written at this time" is not found by it.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'tokio-postgres = { version = "=0.7.18", features = ["with-jiff-0_2", "with-chrono-0_4"] }
jiff = "=0.2.46"
chrono = "=0.4.45"
tokio = { version = "1", features = ["rt", "macros"] }' <<'RS'
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let to = format!("host={} user=finding dbname=postgres options='-c TimeZone=UTC'", std::env::var("PGHOST").unwrap());
    let (client, connection) = tokio_postgres::connect(&to, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for text in ["2025-12-31T23:59:59.9999996Z", "1999-12-31T23:59:58.9999996Z", "1999-12-31T23:59:58.9999994Z"] {
        let jiff: jiff::Timestamp = text.parse().unwrap();
        let chrono = chrono::DateTime::parse_from_rfc3339(text).unwrap();
        let sql = "SELECT $1::text::timestamptz::text, $2::timestamptz::text, $3::timestamptz::text";
        let row = client.query_one(sql, &[&text, &jiff, &chrono]).await.unwrap();
        println!("{text}");
        for (index, how) in ["text  ", "jiff  ", "chrono"].iter().enumerate() {
            println!("  {how} {}", row.get::<_, &str>(index));
        }
    }
}
RS
start_postgres
"$work/rust/run" | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "fractions are treated otherwise"
2025-12-31T23:59:59.9999996Z
  text   2026-01-01 00:00:00+00
  jiff   2025-12-31 23:59:59.999999+00
  chrono 2025-12-31 23:59:59.999999+00
1999-12-31T23:59:58.9999996Z
  text   1999-12-31 23:59:59+00
  jiff   1999-12-31 23:59:59+00
  chrono 1999-12-31 23:59:59+00
1999-12-31T23:59:58.9999994Z
  text   1999-12-31 23:59:58.999999+00
  jiff   1999-12-31 23:59:59+00
  chrono 1999-12-31 23:59:59+00
TXT
say "as found: one instant, two values"
