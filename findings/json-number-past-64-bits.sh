#!/usr/bin/env bash
# One JSON amount is a whole number up to 2^64 - 1 and a float from there on, in orjson and in serde_json's Value; and a Rust
# field that takes it stops taking any number when the struct around it gets #[serde(flatten)].
#
# Seen with orjson 3.13.0 and CPython 3.11's json, serde_json 1.0.154, serde 1.0.229. 18 ether in wei fit into 64 bits, 19 do
# not, so tests pass and the first large payment is off by up to 2048 wei. orjson is taken as a faster json, which reads any
# whole number exactly (ujson, msgspec and pydantic do). In Rust a u128 field reads 2^128 - 1 from text. Move it behind
# flatten, or into an enum that is untagged or tagged, as one does when messages get kinds, and even the amount 5 is refused:
# what is read in between has no 128-bit numbers. Untagged only says that no variant matches.
cd "$(dirname "$0")"
. lib/debian.sh
python_with orjson==3.13.0
rust_with 'serde = { version = "=1.0.229", features = ["derive"] }
serde_json = "=1.0.154"' <<'RS'
use serde::Deserialize;
#[derive(Deserialize)]
struct Amount { quantity: u128 }
#[derive(Deserialize)]
struct Flat { #[serde(flatten)] amount: Amount }
#[derive(Deserialize)]
#[serde(untagged)]
enum Untagged { Pay { quantity: u128 } }
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Tagged { Pay { quantity: u128 } }
fn say(how: &str, quantity: Result<u128, serde_json::Error>) {
    println!("serde_json {how}: {}", quantity.map_or_else(|why| format!("refuses, {why}"), |quantity| quantity.to_string()));
}
fn main() {
    for number in ["18446744073709551615", "18446744073709551616"] {
        println!("serde_json Value: {}", serde_json::from_str::<serde_json::Value>(number).unwrap());
    }
    let (large, small) = (r#"{"quantity":340282366920938463463374607431768211455}"#, r#"{"quantity":5,"type":"Pay"}"#);
    say("u128", serde_json::from_str::<Amount>(large).map(|amount| amount.quantity));
    say("u128", serde_json::from_str::<Amount>(small).map(|amount| amount.quantity));
    say("flatten", serde_json::from_str::<Flat>(small).map(|flat| flat.amount.quantity));
    say("untagged", serde_json::from_str(small).map(|Untagged::Pay { quantity }| quantity));
    say("tagged", serde_json::from_str(small).map(|Tagged::Pay { quantity }| quantity));
}
RS
{
    python -c '
import json, orjson
for text in ["18446744073709551615", "18446744073709551616"]:
    print("json", json.loads(text), "orjson", orjson.loads(text))'
    "$work/rust/run"
} | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "numbers are read otherwise"
json 18446744073709551615 orjson 18446744073709551615
json 18446744073709551616 orjson 1.8446744073709552e+19
serde_json Value: 18446744073709551615
serde_json Value: 1.8446744073709552e+19
serde_json u128: 340282366920938463463374607431768211455
serde_json u128: 5
serde_json flatten: refuses, u128 is not supported at line 1 column 27
serde_json untagged: refuses, data did not match any variant of untagged enum Untagged
serde_json tagged: refuses, u128 is not supported
TXT
say "as found: one more is a float, and five is no number"
