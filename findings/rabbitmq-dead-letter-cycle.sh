#!/usr/bin/env bash
# RabbitMQ drops a dead letter for good when the message brought an x-death header along that names the dead-letter queue.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4, a quorum queue with dead-letter-strategy at-least-once and overflow
# reject-publish, which is documented as the way to lose no dead letter.
#
# A tool that moves messages back from a dead-letter queue (a shovel, "move messages" of the management page) republishes
# them with all their headers, x-death among them. When such a message then expires, the broker looks for a cycle in the
# header that came with it, finds the name of its only target queue, and drops the message: it is in no queue, no channel
# is told, and nothing but a line in the broker's log says so. One would expect "at least once" to hold, or the check to use
# records that the broker itself made of this stay. With a reason `rejected` in the record the same message is kept.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python3 -m venv "$work/venv" && "$work/venv/bin/pip" -q install pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
"$work/venv/bin/python" - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import datetime, sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.exchange_declare('dlx', 'topic', durable=True)
channel.queue_declare('dead', durable=True, arguments={'x-queue-type': 'quorum'})
channel.queue_bind('dead', 'dlx', '#')
channel.queue_declare('in', durable=True, arguments={
    'x-queue-type': 'quorum', 'x-dead-letter-exchange': 'dlx',
    'x-dead-letter-strategy': 'at-least-once', 'x-overflow': 'reject-publish'})

def arrives(headers):
    channel.basic_publish('', 'in', b'one', pika.BasicProperties(delivery_mode=2, expiration='100', headers=headers))
    for _ in range(100):
        method, _, _ = channel.basic_get('dead', auto_ack=True)
        if method:
            return True
        time.sleep(0.1)
    assert channel.queue_declare('in', passive=True).method.message_count == 0
    return False

def record(reason):
    return {'x-death': [{'queue': 'dead', 'reason': reason, 'count': 1, 'exchange': 'dlx', 'routing-keys': ['in'],
                         'time': datetime.datetime(2026, 1, 1)}]}

print('no header:                 ', 'dead-lettered' if arrives(None) else 'gone')
print('brought "rejected" along:  ', 'dead-lettered' if arrives(record('rejected')) else 'gone')
print('brought "expired" along:   ', 'dead-lettered' if arrives(record('expired')) else 'gone')
print('brought "delivery_limit":  ', 'dead-lettered' if arrives(record('delivery_limit')) else 'gone')
PY
[ "$(grep -c dead-lettered "$work/out") $(grep -c gone "$work/out")" = '2 2' ] || changed "the cycle check behaves otherwise"
say "as found: a record that came with the message makes the broker drop it"
