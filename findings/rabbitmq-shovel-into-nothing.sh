#!/usr/bin/env bash
# RabbitMQ's shovel, in its safest mode, empties a queue into an exchange that leads nowhere, and says that it is running.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), its shovel plugin, pika 1.4.4. With ack-mode on-confirm a message is acknowledged at
# the source only after the destination confirmed it, which is documented as the way to lose none. But the broker confirms at
# once what no queue takes, and the shovel does not publish as mandatory. So a binding that is missing while dead letters are
# moved back, or a wrong destination key, costs every message; one would expect them to stay, as with a full destination,
# where they do.
cd "$(dirname "$0")"
. lib/debian.sh
export plugins='rabbitmq_shovel'
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, shovel, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY'
import sys, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.queue_declare('dead', durable=True, arguments={'x-queue-type': 'quorum'})
channel.exchange_declare('again', 'topic', durable=True)
for _ in range(5):
    channel.basic_publish('', 'dead', b'one', pika.BasicProperties(delivery_mode=2))
PY
rabbitmqctl -q set_parameter shovel move "{\"src-protocol\":\"amqp091\",\"src-uri\":\"$SETTINGS_URL\",\"src-queue\":\"dead\",
    \"dest-protocol\":\"amqp091\",\"dest-uri\":\"$SETTINGS_URL\",\"dest-exchange\":\"again\",\"dest-exchange-key\":\"in\",
    \"ack-mode\":\"on-confirm\"}"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
for _ in range(200):
    if channel.queue_declare('dead', passive=True).method.message_count == 0:
        break
    time.sleep(0.1)
time.sleep(1)
PY
state=$(rabbitmqctl -q eval 'element(1, element(3, hd(rabbit_shovel_status:status()))).')
rabbitmqctl -q clear_parameter shovel move
# What the shovel only held would be back now.
sleep 2
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
print('left at the source', channel.queue_declare('dead', passive=True).method.message_count, 'of 5')
PY
say "the shovel was $state" | tee -a "$work/out"
printf '%s\n' 'left at the source 0 of 5' 'the shovel was running' | diff - "$work/out" || changed "the shovel keeps what nobody takes"
say "as found: confirmed, acknowledged, and nowhere"
