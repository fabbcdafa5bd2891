#!/usr/bin/env bash
# Canonical JSON of one message is three different strings, or none, by the library that makes it; so a signature over it
# holds in one language and not in another.
#
# Seen with canonicalize 4.0.0 (npm), rfc8785 0.1.4, jcs 0.2.1 and canonicaljson 2.0.0 (PyPI), serde_jcs 0.1.0 (crates.io);
# all but canonicaljson name RFC 8785. That sees numbers as IEEE doubles, so it has no 2^53 + 1: JavaScript and Python's jcs
# write the neighbour, whose digest is that of another amount too; rfc8785 refuses; Rust's writes it as it came. At 10^20,
# which a double holds, rfc8785 refuses the integer and takes the float, and canonicaljson keeps 1.0 apart from 1. One would
# expect to be able to choose any of them.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'serde_json = "=1.0.154"
serde_jcs = "=0.1.0"' <<'RS'
fn main() {
    for text in std::env::args().skip(1) {
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        println!("{text} serde_jcs {}", serde_jcs::to_string(&value).unwrap());
    }
}
RS
python_with rfc8785==0.1.4 jcs==0.2.1 canonicaljson==2.0.0
node_with canonicalize@4.0.0
cat >"$work/canonical.mjs" <<'JS'
import canonicalize from 'canonicalize';
for (const text of process.argv.slice(2)) console.log(text, 'canonicalize', canonicalize(JSON.parse(text)));
JS
cat >"$work/canonical.py" <<'PY'
import json, sys, canonicaljson, jcs, rfc8785
for text in sys.argv[1:]:
    for name, write in [('rfc8785', rfc8785.dumps), ('jcs', jcs.canonicalize), ('canonicaljson', canonicaljson.encode_canonical_json)]:
        try:
            print(text, name, write(json.loads(text)).decode())
        except Exception as error:
            print(text, name, 'refuses')
PY
texts=('{"q":9007199254740993}' '{"q":100000000000000000000}' '{"q":1.0}')
{ "$work/rust/run" "${texts[@]}"; python "$work/canonical.py" "${texts[@]}"; node "$work/canonical.mjs" "${texts[@]}"; } | LC_ALL=C sort | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "they write otherwise"
{"q":1.0} canonicalize {"q":1}
{"q":1.0} canonicaljson {"q":1.0}
{"q":1.0} jcs {"q":1}
{"q":1.0} rfc8785 {"q":1}
{"q":1.0} serde_jcs {"q":1}
{"q":100000000000000000000} canonicalize {"q":100000000000000000000}
{"q":100000000000000000000} canonicaljson {"q":100000000000000000000}
{"q":100000000000000000000} jcs {"q":100000000000000000000}
{"q":100000000000000000000} rfc8785 refuses
{"q":100000000000000000000} serde_jcs {"q":100000000000000000000}
{"q":9007199254740993} canonicalize {"q":9007199254740992}
{"q":9007199254740993} canonicaljson {"q":9007199254740993}
{"q":9007199254740993} jcs {"q":9007199254740992}
{"q":9007199254740993} rfc8785 refuses
{"q":9007199254740993} serde_jcs {"q":9007199254740993}
TXT
say "as found: one message, three canonical forms"
