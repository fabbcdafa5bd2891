#!/usr/bin/env bash
# RabbitMQ: a binding to a headers exchange that asks for a header whose name begins with x- asks for nothing, and gets every
# message.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4. Names of one's own with x- in front are usual, the broker's x-death is
# one that subscribers filter by, and with x-match: all one would expect a message without the header, or with another value,
# to be kept away. Such arguments are left out when the binding is compared, so nothing is left to compare; the binding is
# accepted and listed with its argument. With x-match: any the same binding gets no message at all. Only all-with-x and
# any-with-x, which 3.10 brought, look at them.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.exchange_declare('payments', 'headers', durable=True)
bindings = [('all', 'x-partner'), ('any', 'x-partner'), ('all-with-x', 'x-partner'), ('all', 'partner'), ('any', 'partner')]
for match, name in bindings:
    queue = match + ' ' + name
    channel.queue_declare(queue, durable=True)
    channel.queue_bind(queue, 'payments', '', {'x-match': match, name: 'one'})
for partner in ['one', 'two']:
    channel.basic_publish('payments', '', partner.encode(), pika.BasicProperties(headers={'x-partner': partner, 'partner': partner}))
time.sleep(1)
for match, name in bindings:
    got = []
    while (answer := channel.basic_get(match + ' ' + name, auto_ack=True))[0]:
        got.append(answer[2].decode())
    print(f'x-match {match}, {name} = one:', *got or ['nothing'])
PY
diff - "$work/out" <<'TXT' || changed "headers are compared otherwise"
x-match all, x-partner = one: one two
x-match any, x-partner = one: nothing
x-match all-with-x, x-partner = one: one
x-match all, partner = one: one
x-match any, partner = one: one
TXT
say "as found: who asks for one partner's gets everybody's"
