#!/usr/bin/env bash
# RabbitMQ: a message that one queue rejects lands in another queue's dead letters too, when it was published with a CC
# header.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4, and the same on 4.0.5 and 4.3.6. CC names more routing keys for the same
# publication, each queue gets its own copy, and one would expect a copy's dead letter to keep the key of its own queue. Here
# `sepa` rejects its copy and `wire` settles the other. The dead letter travels with both keys, and comes to rest in both
# dead-letter queues: whoever replays dead.wire pays a second time what was paid.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
for exchange in ['in', 'dead']:
    channel.exchange_declare(exchange, 'direct', durable=True)
for name in ['sepa', 'wire']:
    channel.queue_declare(name, durable=True, arguments={'x-queue-type': 'quorum', 'x-dead-letter-exchange': 'dead'})
    channel.queue_bind(name, 'in', name)
    channel.queue_declare('dead.' + name, durable=True, arguments={'x-queue-type': 'quorum'})
    channel.queue_bind('dead.' + name, 'dead', name)
def take(queue):
    for _ in range(30):
        method, properties, _ = channel.basic_get(queue)
        if method:
            return method.delivery_tag, properties.headers
        time.sleep(0.1)
    return None, None
channel.basic_publish('in', 'sepa', b'one', pika.BasicProperties(delivery_mode=2, headers={'CC': ['wire']}))
channel.basic_ack(take('wire')[0])
channel.basic_reject(take('sepa')[0], requeue=False)
for queue in ['dead.sepa', 'dead.wire']:
    tag, headers = take(queue)
    print(queue, 'has it, rejected by ' + headers['x-death'][0]['queue'] if tag else 'has nothing')
PY
diff - "$work/out" <<'TXT' || changed "copies are dead-lettered otherwise"
dead.sepa has it, rejected by sepa
dead.wire has it, rejected by sepa
TXT
say "as found: one rejection, two dead letters"
