#!/usr/bin/env bash
# RabbitMQ: a second policy, about the length of one queue, turns off the first one's dead-lettering there, and the rejected
# messages are gone.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4. One policy gives every queue a dead-letter exchange, another, which says
# nothing of dead letters, gives one queue a bound. Configurations that name different things add up elsewhere, and one would
# expect so here. But a queue has the one policy of the highest priority that matches, whole; the message that was rejected
# after it was set is in no queue, and rabbitmqctl list_policies shows both as before. An operator policy with the same words
# does add up.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
cat >"$work/reject.py" <<'PY'
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.exchange_declare('dlx', 'fanout', durable=True)
for queue in ['in', 'dead']:
    channel.queue_declare(queue, durable=True, arguments={'x-queue-type': 'quorum'})
channel.queue_bind('dead', 'dlx')
channel.queue_purge('dead')
time.sleep(1)
channel.basic_publish('', 'in', b'one', pika.BasicProperties(delivery_mode=2))
for _ in range(100):
    method, _, _ = channel.basic_get('in')
    if method:
        break
    time.sleep(0.1)
channel.basic_reject(method.delivery_tag, requeue=False)
dead = lambda: channel.queue_declare('dead', passive=True).method.message_count
for _ in range(30):
    if dead():
        break
    time.sleep(0.1)
print(sys.argv[2] + ':', 'dead-lettered' if dead() else 'gone')
PY
try() { python "$work/reject.py" "$SETTINGS_URL" "$1"; }
{
    rabbitmqctl -q set_policy letters '^in$' '{"dead-letter-exchange":"dlx"}' --apply-to queues --priority 1
    try 'a policy with a dead-letter exchange'
    rabbitmqctl -q set_policy length '^in$' '{"max-length":1000}' --apply-to queues --priority 2
    try 'and one with a length'
    rabbitmqctl -q clear_policy length
    rabbitmqctl -q set_operator_policy length '^in$' '{"max-length":1000}' --apply-to queues --priority 2
    try 'the length as an operator policy'
} | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "policies add up otherwise"
a policy with a dead-letter exchange: dead-lettered
and one with a length: gone
the length as an operator policy: dead-lettered
TXT
say "as found: a bound on the length costs the dead letters"
