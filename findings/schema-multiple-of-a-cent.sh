#!/usr/bin/env bash
# JSON Schema: "multipleOf": 0.01, which says that a price has two places, refuses 19.99 in two languages; and of two whole
# numbers each validator finds another one even.
#
# Seen with ajv 8.20.0 on Node 20 and jsonschema 4.26.0 on CPython 3.11. Both divide as floats and ask for a whole result:
# 19.99, 4.02 and 0.07 are no multiples of a cent, 19.98 is, so most prices pass and examples do. ajv also refuses 10^21 as a
# multiple of 1, and takes the odd 2^53 + 1 for even (JSON.parse has made it 2^53 before). Python says the opposite of both.
# An API that publishes one schema gives a partner two verdicts on one valid message, depending on which side validates.
cd "$(dirname "$0")"
. lib/debian.sh
node_with ajv@8.20.0
python_with jsonschema==4.26.0
cases=('0.01 19.98' '0.01 19.99' '0.01 4.02' '0.01 0.07' '1 1000000000000000000000' '2 9007199254740993')
cat >"$work/valid.js" <<'JS'
const Ajv = require('ajv');
const [, , divisor, text] = process.argv;
process.stdout.write(`ajv ${new Ajv().validate({ type: 'number', multipleOf: JSON.parse(divisor) }, JSON.parse(text))}`);
JS
cat >"$work/valid.py" <<'PY'
import json, sys, jsonschema
divisor, text = sys.argv[1:]
schema = {'type': 'number', 'multipleOf': json.loads(divisor)}
print('jsonschema', str(jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))).lower(), end='')
PY
for case in "${cases[@]}"; do
    read -r divisor text <<<"$case"
    say "$text is a multiple of $divisor: $(cd "$work" && node valid.js "$divisor" "$text"), $(python "$work/valid.py" "$divisor" "$text")"
done | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "multiples are others"
19.98 is a multiple of 0.01: ajv true, jsonschema true
19.99 is a multiple of 0.01: ajv false, jsonschema false
4.02 is a multiple of 0.01: ajv false, jsonschema false
0.07 is a multiple of 0.01: ajv false, jsonschema false
1000000000000000000000 is a multiple of 1: ajv false, jsonschema true
9007199254740993 is a multiple of 2: ajv true, jsonschema false
TXT
say "as found: nineteen ninety-nine is no price"
