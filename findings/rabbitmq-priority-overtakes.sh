#!/usr/bin/env bash
# A quorum queue hands out what it was given in order, until the broker is upgraded to 4.x: from then on a message whose
# priority is above 4 overtakes, though nobody declared the queue for priorities.
#
# Seen with RabbitMQ 3.10.8 (Debian 12) and 4.0.5 (Debian 13), pika 1.4.4. Priorities are asked for by an argument of the
# queue elsewhere (x-max-priority of classic queues), so one would expect the `priority` of a message to mean nothing to a
# queue without it, as on 3.10. On 4.0 the same declaration and the same messages come in another order: two of priority 5 and
# more for each one below. So a deposit and the payment out of it, sent in that order, change places with the upgrade if the
# payments' publisher has always set a priority that did nothing.
cd "$(dirname "$0")"
. lib/debian.sh
. lib/later.sh
python_with pika==1.4.4
start_later_broker
start_broker
cat >"$work/order.py" <<'PY'
import sys, time, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.confirm_delivery()
channel.queue_declare('q', durable=True, arguments={'x-queue-type': 'quorum'})
for number, priority in enumerate([None, 4, 9, 5, 0, 9]):
    channel.basic_publish('', 'q', f'{number}'.encode(), pika.BasicProperties(delivery_mode=2, priority=priority))
order = []
for _ in range(100):
    method, _, body = channel.basic_get('q', auto_ack=True)
    if method:
        order.append(body.decode())
    else:
        time.sleep(0.1)
    if len(order) == 6:
        break
print(sys.argv[2], 'priorities none 4 9 5 0 9, in the order', *order)
PY
python "$work/order.py" "$SETTINGS_URL" "$broker_version" | tee "$work/out"
python "$work/order.py" "amqp://guest:guest@127.0.0.1:$later_port/%2f" "$later_version" | tee -a "$work/out"
diff - "$work/out" <<'TXT' || changed "the order is another one"
3.10.8 priorities none 4 9 5 0 9, in the order 0 1 2 3 4 5
4.0.5 priorities none 4 9 5 0 9, in the order 2 3 0 5 1 4
TXT
say "as found: the same queue and messages, another order"
