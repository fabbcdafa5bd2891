#!/usr/bin/env bash
# CloudEvents whose data is 0 or false leave the JavaScript SDK without data, and the Python SDK's binary form with a body
# that is no JSON; one without a time gets the time of whoever reads it.
#
# Seen with cloudevents 10.0.0 (npm) on Node 20 and cloudevents 2.2.0 (PyPI). The specification allows any JSON value as data.
# Read and written again, as a bridge does: a balance that went to 0 and a flag that went to false are events about nothing,
# and a subscriber sees neither an error nor the value. Python's structured form is right, its binary form writes False with
# content type application/json. Data that is null is dropped by both. And an event without `time`, which is optional, has one
# afterwards: now. JavaScript also takes a time to milliseconds, and one that it can not read (a leap second) for now.
cd "$(dirname "$0")"
. lib/debian.sh
python_with cloudevents==2.2.0
node_with cloudevents@10.0.0
cat >"$work/again.js" <<'JS'
const { HTTP } = require('cloudevents');
const read = (rest) => HTTP.toEvent({
  headers: { 'content-type': 'application/cloudevents+json' }, body: `{"specversion":"1.0","id":"1","source":"/s","type":"t"${rest}}` });
for (const data of ['5', '0', 'false', 'null']) {
  const event = read(`,"time":"2026-11-20T08:15:02Z","datacontenttype":"application/json","data":${data}`);
  const { data: structured } = JSON.parse(HTTP.structured(event).body);
  console.log(`JavaScript ${data}: structured ${JSON.stringify(structured)}, binary ${HTTP.binary(event).body}`);
}
const written = (rest) => JSON.parse(HTTP.structured(read(rest)).body).time;
console.log('JavaScript micro:', written(',"time":"2026-11-20T08:15:02.113456Z"'));
const now = (time) => (Math.abs(Date.now() - Date.parse(time)) < 60000 ? 'now' : time);
console.log('JavaScript no time:', now(written('')), '- leap second:', now(written(',"time":"2016-12-31T23:59:60Z"')));
JS
cat >"$work/again.py" <<'PY'
import datetime, json
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event, to_binary_event, to_structured_event
def read(rest):
    body = '{"specversion":"1.0","id":"1","source":"/s","type":"t"%s}' % rest
    return from_rabbitmq_event(RabbitMQMessage(headers={}, content_type='application/cloudevents+json', body=body.encode()))
for data in ['5', '0', 'false', 'null']:
    event = read(',"datacontenttype":"application/json","data":' + data)
    structured = json.loads(to_structured_event(event).body)
    print(f'Python {data}: structured {json.dumps(structured["data"]) if "data" in structured else "undefined"}, binary {to_binary_event(event).body.decode()}')
age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(json.loads(to_structured_event(read('')).body)['time'])
print('Python no time:', 'now' if abs(age) < datetime.timedelta(minutes=1) else age)
PY
{ (cd "$work" && node again.js); python "$work/again.py"; } | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "data or times are kept otherwise"
JavaScript 5: structured 5, binary 5
JavaScript 0: structured undefined, binary undefined
JavaScript false: structured undefined, binary undefined
JavaScript null: structured undefined, binary undefined
JavaScript micro: 2026-11-20T08:15:02.113Z
JavaScript no time: now - leap second: now
Python 5: structured 5, binary 5
Python 0: structured 0, binary 0
Python false: structured false, binary False
Python null: structured undefined, binary 
Python no time: now
TXT
say "as found: nothing left of nothing"
