#!/usr/bin/env bash
# The CloudEvents SDK for Python changes an event that it reads and writes again, and takes a batch for a single event.
#
# Seen with cloudevents 2.2.0 (PyPI), its binding for RabbitMQ, Python 3. A time of "2026-11-20T08:15:02.113Z" is written as
# "2026-11-20T08:15:02.113000Z", and "...:02.000Z" as "...:02Z"; text beyond ASCII is written as escapes. So who forwards
# events through the SDK sends other bytes under the same id, and a subscriber that compares copies by their bytes takes them
# for different ones. And the binding decides by the first letters of the media type: application/cloudevents-batch+json
# counts as one event in structured mode, and reading it ends in an AttributeError about a list instead of an error that says
# that batches are not supported.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv" && "$work/venv/bin/pip" -q install cloudevents==2.2.0
"$work/venv/bin/python" - <<'PY' | tee "$work/out"
from importlib.metadata import version
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event, to_structured_event
print('cloudevents', version('cloudevents'))

def event(time):
    return ('{"specversion":"1.0","id":"1","source":"/s","type":"t","time":"%s","data":{"reason":"trop tôt"}}' % time).encode()

for time in ['2026-11-20T08:15:02.113Z', '2026-11-20T08:15:02.000Z']:
    read = from_rabbitmq_event(RabbitMQMessage(headers={}, content_type='application/cloudevents+json', body=event(time)))
    print(time, '->', to_structured_event(read).body.decode())
batch = b'[' + event('2026-11-20T08:15:02Z') + b']'
try:
    from_rabbitmq_event(RabbitMQMessage(headers={}, content_type='application/cloudevents-batch+json', body=batch))
    print('batch: read')
except Exception as error:
    print('batch:', type(error).__name__, error)
PY
if ! { grep -q '02.113Z -> .*"time": "2026-11-20T08:15:02.113000Z".*trop t\\u00f4t' "$work/out" &&
    grep -q '02.000Z -> .*"time": "2026-11-20T08:15:02Z"' "$work/out" &&
    grep -q '^batch: AttributeError' "$work/out"; }; then
    echo "CHANGED: the SDK reads or writes otherwise"
    exit 1
fi
echo "as found: other bytes under the same id, and a batch is taken for one event"
