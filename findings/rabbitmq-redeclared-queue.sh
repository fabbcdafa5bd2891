#!/usr/bin/env bash
# RabbitMQ 3.10: a quorum queue that is deleted and declared anew at once keeps its old consumer, and gives it messages that
# never reach it.
#
# Seen with RabbitMQ 3.10.8 (Debian 12), pika 1.4.4. One would expect the consumer to be cancelled, as it is on 4.0.5 and
# 4.3.6, or to go on. Instead it hears nothing, a passive declare counts it as attached, and the new queue hands it all that
# is published: 0 messages are ready, nothing arrives. A second consumer gets every other message. Only when the first one's
# connection ends the messages come out, behind those that were published after them. A monitor that looks at "consumers: 1,
# ready: 0" sees a healthy queue.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with pika==1.4.4
say "RabbitMQ $broker_version, pika 1.4.4"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import sys, time, pika
def connection():
    return pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
def consume(channel, into):
    channel.basic_consume('q', lambda channel, method, _, body: (into.append(body.decode()), channel.basic_ack(method.delivery_tag)))
def wait(*connections):
    for _ in range(8):
        for one in connections:
            one.process_data_events(0.25)
quorum = {'x-queue-type': 'quorum'}
old, operator, new = connection(), connection(), connection()
first, second, cancelled = [], [], []
channel = old.channel()
channel.add_on_cancel_callback(cancelled.append)
control = operator.channel()
control.confirm_delivery()
control.queue_declare('q', durable=True, arguments=quorum)
consume(channel, first)
control.basic_publish('', 'q', b'before')
wait(old)
print('before:', first)
control.queue_delete('q')
control.queue_declare('q', durable=True, arguments=quorum)
for number in range(4):
    control.basic_publish('', 'q', b'a%d' % number)
wait(old)
state = control.queue_declare('q', durable=True, passive=True).method
print('after:', first, 'cancelled', len(cancelled), '- ready', state.message_count, 'consumers', state.consumer_count)
consume(new.channel(), second)
for number in range(4):
    control.basic_publish('', 'q', b'b%d' % number)
wait(new, old)
print('a second consumer has', len(second), 'of the next four, the first', len(first) - 1, 'of all')
old.close()
wait(new)
print('the first one gone, the second has', len(second), 'of eight, the oldest in place', second.index('a0') + 1)
PY
diff - "$work/out" <<'TXT' || changed "the old consumer is treated otherwise"
before: ['before']
after: ['before'] cancelled 0 - ready 0 consumers 1
a second consumer has 2 of the next four, the first 0 of all
the first one gone, the second has 8 of eight, the oldest in place 3
TXT
say "as found: a consumer that is counted, given messages and never reached"
