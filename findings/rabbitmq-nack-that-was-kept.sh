#!/usr/bin/env bash
# RabbitMQ: a publication that the broker refuses (basic.nack) may have been taken, for good; so trying again doubles it.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4, and the same on 4.0.5 and 4.3.6. One would expect a nack to mean that
# nothing was taken, as an error from a database does. Here an exchange leads to two queues, and one of them is full
# (max-length with overflow reject-publish): the publisher hears "nack", the other queue has the message all the same, and has
# it once more for each time that a publisher does as it is told and tries again. With tx instead of confirms it is the other
# way round: commit is answered with commit-ok, and the full queue has nothing.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
def channel():
    return pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
confirmed = channel()
confirmed.confirm_delivery()
confirmed.exchange_declare('payments', 'fanout', durable=True)
confirmed.queue_declare('books', durable=True, arguments={'x-queue-type': 'quorum'})
confirmed.queue_declare('archive', durable=True, arguments={
    'x-queue-type': 'quorum', 'x-max-length': 1, 'x-overflow': 'reject-publish'})
waiting = lambda queue: confirmed.queue_declare(queue, passive=True).method.message_count
def publish(exchange, key):
    try:
        confirmed.basic_publish(exchange, key, b'one', pika.BasicProperties(delivery_mode=2))
        return 'ack'
    except pika.exceptions.NackError:
        return 'nack'
while publish('', 'archive') == 'ack':
    pass
full = waiting('archive')
for queue in ['books', 'archive']:
    confirmed.queue_bind(queue, 'payments')
print('one payment, tried four times:', *[publish('payments', '') for _ in range(4)])
time.sleep(1)
print('books:', waiting('books'), 'archive:', waiting('archive') - full, 'more')
transactional = channel()
transactional.tx_select()
transactional.basic_publish('', 'archive', b'two', pika.BasicProperties(delivery_mode=2))
print('tx into the full queue:', type(transactional.tx_commit().method).__name__)
time.sleep(1)
print('archive:', waiting('archive') - full, 'more')
PY
diff - "$work/out" <<'TXT' || changed "refusals mean something else"
one payment, tried four times: nack nack nack nack
books: 4 archive: 0 more
tx into the full queue: CommitOk
archive: 0 more
TXT
say "as found: what was refused is there four times, what was committed is not there"
