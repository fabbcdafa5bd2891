#!/usr/bin/env bash
# RabbitMQ: in 3.10 a headers exchange sees the x-death that the broker writes, in 4.0 it does not; there it sees
# x-first-death-reason always, and in 3.10 only where the sender wrote no x-death.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), 4.0.5 (Debian 13) and 4.3.6, pika 1.4.4. Who routes what died by the presence of x-death
# gets nothing after an upgrade but what senders made up; whoever reads the message finds an x-death in it either way, since it is
# written for the reader. Only both bindings together get every message on every version.
cd "$(dirname "$0")"
. lib/debian.sh
. lib/later.sh
start_later_broker
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version and $later_version, pika 1.4.4"
cat >"$work/try.py" <<'PY'
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.exchange_declare('dead', 'topic', durable=True)
channel.exchange_declare('by header', 'headers', durable=True)
channel.exchange_bind('by header', 'dead', '#')
quorum = {'x-queue-type': 'quorum'}
headers = ['x-death', 'x-first-death-reason']
for header in headers:
    channel.queue_declare(header, durable=True, arguments=quorum)
    channel.queue_bind(header, 'by header', '', {'x-match': 'all-with-x', header: None})
channel.queue_declare('q', durable=True, arguments={**quorum, 'x-dead-letter-exchange': 'dead'})
for name, made_up in [('plain', {}), ('made up', {'x-death': 'anything'})]:
    channel.basic_publish('', 'q', name.encode(), pika.BasicProperties(headers=made_up, expiration='1', delivery_mode=2))
time.sleep(4)
for header in headers:
    got = []
    while (answer := channel.basic_get(header, auto_ack=True))[0]:
        got.append(answer[2].decode())
    print(f'{sys.argv[2]} {header}:', ', '.join(sorted(got)) or 'nothing')
PY
{
    python "$work/try.py" "$SETTINGS_URL" "$broker_version"
    python "$work/try.py" "amqp://guest:guest@127.0.0.1:$later_port/%2f" "$later_version"
} | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "the exchange sees other headers"
3.10.8 x-death: made up, plain
3.10.8 x-first-death-reason: plain
4.0.5 x-death: made up
4.0.5 x-first-death-reason: made up, plain
TXT
say "as found: by x-death alone, what died is lost after an upgrade"
