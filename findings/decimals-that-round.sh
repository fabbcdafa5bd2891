#!/usr/bin/env bash
# Exact decimals that add up wrong: Python's Decimal and JavaScript's decimal.js round a sum of whole amounts, Rust's
# rust_decimal rounds what it parses, adds and reads from PostgreSQL. None of them says so.
#
# Seen with CPython 3.11 and psycopg 3.3.9, decimal.js 10.6.0 on Node 20, rust_decimal 1.43.0 with tokio-postgres 0.7.18,
# PostgreSQL 15 (Debian 12). Decimal keeps each amount in wei as it was read and rounds every result to 28 digits; three times
# 10^30 + 1 is 3 * 10^30 to Python where SQL's sum ends in 3. decimal.js does so from 20 digits on. rust_decimal has 96 bits:
# from_str drops digits of a fraction that do not fit (from_str_exact does not), checked_add returns Some with a digit
# missing, and a numeric with more digits is read as its neighbour, 10^-29 as 0, where one too large is an error. So a check
# in the program that "the sum of the entries is the balance" passes or fails by rounding.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'tokio-postgres = "=0.7.18"
rust_decimal = { version = "=1.43.0", features = ["db-tokio-postgres"] }
tokio = { version = "1", features = ["rt", "macros"] }' <<'RS'
use rust_decimal::Decimal;
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let say = |what: &str, result: Result<String, ()>| println!("rust_decimal {what} {}", result.unwrap_or_else(|()| "refuses".into()));
    let text = "123456789012.123456789012345678";
    say("from_str:      ", text.parse::<Decimal>().map(|d| d.to_string()).map_err(drop));
    say("from_str_exact:", Decimal::from_str_exact(text).map(|d| d.to_string()).map_err(drop));
    let one: Decimal = "7922816251426433759354395033.5".parse().unwrap();
    say("checked_add:   ", one.checked_add("0.04".parse().unwrap()).map(|d| d.to_string()).ok_or(()));
    let to = format!("host={} user=finding dbname=postgres", std::env::var("PGHOST").unwrap());
    let (client, connection) = tokio_postgres::connect(&to, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for number in [text, "0.00000000000000000000000000001", "79228162514264337593543950336"] {
        let row = client.query_one(&format!("SELECT {number}::numeric"), &[]).await.unwrap();
        say(&format!("reads {number}:"), row.try_get::<_, Decimal>(0).map(|d| d.to_string()).map_err(drop));
    }
}
RS
python_with 'psycopg[binary]==3.3.9'
node_with decimal.js@10.6.0
start_postgres
python - <<'PY' | tee "$work/out"
import psycopg
connection = psycopg.connect()
amounts = [row[0] for row in connection.execute('SELECT 1000000000000000000000000000001::numeric(78, 0) FROM generate_series(1, 3)')]
print('PostgreSQL', connection.execute('SELECT sum(n) FROM unnest(%s::numeric[]) AS n', [amounts]).fetchone()[0])
print('Decimal   ', int(sum(amounts)))
PY
(cd "$work" && node -e "
const { Decimal } = require('decimal.js');
console.log('decimal.js', ['1', '1', '1'].map(() => new Decimal('1000000000000000000001')).reduce((a, b) => a.plus(b)).toFixed());") | tee -a "$work/out"
"$work/rust/run" | tee -a "$work/out"
diff - "$work/out" <<'TXT' || changed "decimals are rounded otherwise"
PostgreSQL 3000000000000000000000000000003
Decimal    3000000000000000000000000000000
decimal.js 3000000000000000000000
rust_decimal from_str:       123456789012.12345678901234568
rust_decimal from_str_exact: refuses
rust_decimal checked_add:    7922816251426433759354395033.5
rust_decimal reads 123456789012.123456789012345678: 123456789012.12345678901234568
rust_decimal reads 0.00000000000000000000000000001: 0.0000000000000000000000000000
rust_decimal reads 79228162514264337593543950336: refuses
TXT
say "as found: exact types, rounded sums"
