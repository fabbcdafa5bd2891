#!/usr/bin/env bash
# RabbitMQ's AMQP 1.0: 3.10 answers a transfer that no queue takes with "accepted", 4.0 with "released"; to a full queue 3.10
# answers nothing at all. And text that is sent as text is not what an AMQP 0-9-1 consumer gets.
#
# Seen with RabbitMQ 3.10.8 (Debian 12, its plugin) and 4.0.5 (Debian 13), rhea 3.0.5 and amqplib 2.3.1 on Node 20. "accepted"
# is what a sender waits for before it forgets a message, and AMQP 1.0 has no flag like `mandatory` by which it could ask for
# more. rhea sends a string or an object as a typed value, as its examples do. A subscriber on AMQP 0-9-1 gets the value's
# encoding as the body (9 bytes for "text", with property type = amqp-1.0), so a digest or signature over the text fails. Only
# data sections arrive as they are.
cd "$(dirname "$0")"
. lib/debian.sh
. lib/later.sh
node_with rhea@3.0.5 amqplib@2.3.1
start_later_broker
export plugins='rabbitmq_amqp1_0'
start_broker
cat >"$work/send.js" <<'JS'
const rhea = require('rhea'), amqp = require('amqplib');
const [, , port, version, exchange, queue] = process.argv;
const send = (address, body) => new Promise((resolve) => {
  const container = rhea.create_container();
  const connection = container.connect({ port: +port, host: '127.0.0.1', username: 'guest', password: 'guest', reconnect: false });
  container.on('disconnected', () => {});
  const end = (outcome) => { clearTimeout(timer); connection.close(); resolve(outcome); };
  const timer = setTimeout(() => end('no answer in 5 s'), 5000);
  container.once('sendable', (context) => context.sender.send({ body, durable: true }));
  for (const outcome of ['accepted', 'rejected', 'released', 'modified', 'sender_error']) container.on(outcome, () => end(outcome));
  connection.open_sender(address);
});
(async () => {
  const connection = await amqp.connect(`amqp://guest:guest@127.0.0.1:${port}/%2f`);
  const channel = await connection.createConfirmChannel();
  const full = { 'x-queue-type': 'quorum', 'x-max-length': 1, 'x-overflow': 'reject-publish' };
  await channel.assertQueue('full', { durable: true, arguments: full });
  await channel.assertQueue('q', { durable: true, arguments: { 'x-queue-type': 'quorum' } });
  await channel.assertExchange('nobody', 'direct', { durable: true });
  for (let number = 0; number < 4; number++) channel.sendToQueue('full', Buffer.from('one'));
  await channel.waitForConfirms().catch(() => {});
  const bytes = (text) => rhea.message.data_section(Buffer.from(text));
  console.log(version, 'no queue:', await send(exchange + 'nobody/key', bytes('text')));
  console.log(version, 'full queue:', await send(queue + 'full', bytes('text')));
  for (const [name, body] of [['text', 'text'], ['data', bytes('text')]]) {
    await send(queue + 'q', body);
    const { content, properties } = await channel.get('q', { noAck: true });
    console.log(version, name + ':', content.toString('hex'), properties.type ?? 'no type');
  }
  await connection.close();
  process.exit();
})();
JS
(
    cd "$work"
    timeout 120 node send.js "$amqp_port" "$broker_version" /exchange/ /amq/queue/
    timeout 120 node send.js "$later_port" "$later_version" /exchanges/ /queues/
) | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "outcomes or bodies are others"
3.10.8 no queue: accepted
3.10.8 full queue: no answer in 5 s
3.10.8 text: 005377a10474657874 amqp-1.0
3.10.8 data: 74657874 binary
4.0.5 no queue: released
4.0.5 full queue: rejected
4.0.5 text: 005377a10474657874 amqp-1.0
4.0.5 data: 74657874 no type
TXT
say "as found: accepted, and gone"
