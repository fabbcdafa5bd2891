#!/usr/bin/env bash
# aio-pika asks the broker to give back what no queue takes, gets it back, and lets publish() end like any other.
#
# Seen with aio-pika 10.2.1, RabbitMQ 3.10.8 (Debian 12). Its channels use confirms and its messages are mandatory without
# being told, and a refusal by a full queue is an exception. So one would expect that publish() ends without one only if the
# message is somewhere. For a routing key that no queue is bound to it returns a DeliveredMessage, whose `delivery` is a
# Basic.Return instead of a Basic.Ack: true as a condition, and not different from success unless the caller looks at its
# type. To raise, a channel must be opened with on_return_raises=True.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
python_with aio-pika==10.2.1
say "RabbitMQ $broker_version, aio-pika 10.2.1"
python - "$SETTINGS_URL" <<'PY' | tee "$work/out"
import asyncio, sys, aio_pika
async def main():
    async with await aio_pika.connect(sys.argv[1]) as connection:
        channel = await connection.channel()
        full = {'x-queue-type': 'quorum', 'x-max-length': 1, 'x-overflow': 'reject-publish'}
        await channel.declare_queue('full', durable=True, arguments=full)
        await channel.declare_queue('room', durable=True, arguments={'x-queue-type': 'quorum'})
        async def publish(channel, key):
            try:
                answer = await channel.default_exchange.publish(aio_pika.Message(b'one'), routing_key=key)
            except Exception as error:
                return type(error).__name__
            return f'{type(getattr(answer, "delivery", answer)).__name__}, {bool(answer)}'
        for _ in range(20):
            if (await publish(channel, 'full')).endswith('Error'):
                break
        print('room:', await publish(channel, 'room'))
        print('full:', await publish(channel, 'full'))
        print('nobody:', await publish(channel, 'nobody'))
        print('nobody, on_return_raises:', await publish(await connection.channel(on_return_raises=True), 'nobody'))
asyncio.run(main())
PY
diff - "$work/out" <<'TXT' || changed "what comes back is told otherwise"
room: Ack, True
full: DeliveryError
nobody: Return, True
nobody, on_return_raises: PublishError
TXT
say "as found: returned, and no error"
