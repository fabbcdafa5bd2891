#!/usr/bin/env bash
# amqplib (Node): waitForConfirms() succeeds after the broker refused everything, if the refusal came before it was called;
# and a header with a negative decimal arrives as a large positive one.
#
# Seen with amqplib 2.3.1 on Node 20, RabbitMQ 3.10.8 (Debian 12), pika 1.4.4. It rejects when a publication that is still
# unconfirmed is nacked, so a test with a loop of publish and wait sees it work. A program that publishes, does something else
# for half a second and then waits is told that all is well; one would expect the refusal to be kept until somebody asks. Only
# a callback given to publish() hears of it each time. And where pika, aio-pika and rabbitmq-client write and read the decimal
# type with a sign, amqplib reads its digits without: a fee of -1.5 is 429496728.1.
cd "$(dirname "$0")"
. lib/debian.sh
node_with amqplib@2.3.1
python_with pika==1.4.4
start_broker
say "RabbitMQ $broker_version, amqplib 2.3.1, node $(node --version)"
cat >"$work/publish.js" <<'JS'
const amqp = require('amqplib');
(async () => {
  const connection = await amqp.connect(process.argv[2]);
  const channel = await connection.createConfirmChannel();
  await channel.assertQueue('full', { durable: true, arguments: { 'x-queue-type': 'quorum', 'x-max-length': 1, 'x-overflow': 'reject-publish' } });
  const publish = (callback) => channel.sendToQueue('full', Buffer.from('one'), { persistent: true }, callback);
  const wait = () => channel.waitForConfirms().then(() => 'succeeds', () => 'fails');
  let filled = false;
  while (!filled) filled = (publish(), await wait()) === 'fails';
  publish();
  console.log('waiting at once:', await wait());
  publish((error) => console.log('callback:', error ? 'refused' : 'taken'));
  await new Promise((done) => setTimeout(done, 500));
  console.log('waiting half a second later:', await wait());
  await connection.close();
})();
JS
cat >"$work/read.js" <<'JS'
const amqp = require('amqplib');
(async () => {
  const connection = await amqp.connect(process.argv[2]);
  const channel = await connection.createChannel();
  console.log('-1.5:', JSON.stringify((await channel.get('fees', { noAck: true })).properties.headers.fee.value));
  await connection.close();
})();
JS
(cd "$work" && node publish.js "$SETTINGS_URL") | tee "$work/out"
python - "$SETTINGS_URL" <<'PY'
import decimal, sys, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.queue_declare('fees', durable=True)
channel.basic_publish('', 'fees', b'one', pika.BasicProperties(headers={'fee': decimal.Decimal('-1.5')}))
channel.connection.close()
PY
(cd "$work" && node read.js "$SETTINGS_URL") | tee -a "$work/out"
diff - "$work/out" <<'TXT' || changed "refusals are kept, or decimals have a sign"
waiting at once: fails
callback: refused
waiting half a second later: succeeds
-1.5: {"places":1,"digits":4294967281}
TXT
say "as found: a refusal that nobody waited for is no refusal"
