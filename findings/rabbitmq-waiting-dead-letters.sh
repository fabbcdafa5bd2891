#!/usr/bin/env bash
# RabbitMQ tells no AMQP client of dead letters that wait for their target, and once the target is there they may stay away for
# another three minutes.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4: a quorum queue with dead-letter-strategy at-least-once whose dead-letter
# exchange has no binding yet. Three messages expire. From then on a passive declare says 0 messages, and a
# purge says 0 and leaves them where they are. `rabbitmqctl list_queues` says 3 messages of which 0 are ready and 0 are
# unacknowledged, and has no column for the rest. After the binding is made they are tried again when a timer of 180 s runs out (application setting dead_letter_worker_publisher_confirm_timeout),
# not when the binding is made. So who drains such a queue, sees 0 and deletes it has deleted messages.
# To be quick the script sets the timer to 20 s, and shows that the letters wait for it.
cd "$(dirname "$0")"
. lib/debian.sh
export advanced='{rabbit, [{dead_letter_worker_publisher_confirm_timeout, 20000}]}'
start_broker
python3 -m venv "$work/venv" && "$work/venv/bin/pip" -q install pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
count() { rabbitmqctl -q list_queues name "$1" 2>/dev/null | awk '$1 == "in" { print $2 }'; }
"$work/venv/bin/python" - "$SETTINGS_URL" before <<'PY' | tee "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.exchange_declare('dlx', 'topic', durable=True)
channel.queue_declare('dead', durable=True, arguments={'x-queue-type': 'quorum'})
channel.queue_declare('in', durable=True, arguments={
    'x-queue-type': 'quorum', 'x-dead-letter-exchange': 'dlx',
    'x-dead-letter-strategy': 'at-least-once', 'x-overflow': 'reject-publish'})
for _ in range(3):
    channel.basic_publish('', 'in', b'one', pika.BasicProperties(delivery_mode=2, expiration='100'))
waiting = lambda: channel.queue_declare('in', passive=True).method.message_count
for _ in range(100):
    if waiting() == 0:
        break
    time.sleep(0.1)
print('passive declare says', waiting())
print('purge says', channel.queue_purge('in').method.message_count)
PY
# The broker measures its queues every few seconds.
for _ in $(seq 60); do [ "$(count messages)" = 3 ] && break; sleep 0.5; done
say "list_queues: $(count messages), ready $(count messages_ready), unacknowledged $(count messages_unacknowledged)" | tee -a "$work/out"
"$work/venv/bin/python" - "$SETTINGS_URL" <<'PY' | tee -a "$work/out"
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
arrived = lambda: channel.queue_declare('dead', passive=True).method.message_count
channel.queue_bind('dead', 'dlx', '#')
time.sleep(0.5)
print('half a second after the binding:', arrived())
for _ in range(400):
    if arrived() == 3:
        break
    time.sleep(0.1)
print('after the timer:', arrived())
PY
printf '%s\n' 'passive declare says 0' 'purge says 0' 'list_queues: 3, ready 0, unacknowledged 0' \
    'half a second after the binding: 0' 'after the timer: 3' | diff - "$work/out" || changed "waiting dead letters are counted or moved otherwise"
say "as found: nobody sees them, and a binding alone does not move them"
