#!/usr/bin/env bash
# RabbitMQ: a message that is dead-lettered again by the same queue for the same reason keeps the time of its first death;
# only the count grows.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4. The x-death record is described as the history of a message, newest event
# first, and `time` as when it was dead-lettered. A retry loop (a dead-letter queue, and back) brings the record along, and
# after hours `time` is still the first attempt's: who gives up "what failed more than a day ago", or shows operators when a
# payment last failed, reads the wrong moment, and the time of the last death stands nowhere.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.queue_declare('dead', durable=True, arguments={'x-queue-type': 'quorum'})
channel.queue_declare('in', durable=True, arguments={
    'x-queue-type': 'quorum', 'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': 'dead'})
def take(queue):
    for _ in range(100):
        method, properties, body = channel.basic_get(queue)
        if method:
            return method.delivery_tag, properties
        time.sleep(0.1)
    sys.exit('nothing came')
channel.basic_publish('', 'in', b'one', pika.BasicProperties(delivery_mode=2))
first = None
for attempt in range(3):
    tag, _ = take('in')
    channel.basic_reject(tag, requeue=False)
    tag, properties = take('dead')
    channel.basic_ack(tag)
    (death,) = properties.headers['x-death']
    first = first or death['time']
    print('count', int(death['count']), 'seconds after the first:', int((death['time'] - first).total_seconds()))
    time.sleep(2)
    channel.basic_publish('', 'in', b'one', properties)
PY
diff - "$work/out" <<'TXT' || changed "the record is kept otherwise"
count 1 seconds after the first: 0
count 2 seconds after the first: 0
count 3 seconds after the first: 0
TXT
say "as found: two seconds between deaths, and all at the same time"
