#!/usr/bin/env bash
# amqplib (Node) turns a Date in a message's headers into an empty table, without a word; and reads a 64-bit integer header
# as the nearest number that JavaScript has.
#
# Seen with amqplib 2.3.1 on Node 20, RabbitMQ 3.10.8 (Debian 12). AMQP 0-9-1 has a type for times, the library reads it (as
# {"!": "timestamp", value}), and one would expect a Date to be written as one, as ISO text, or refused as other values are
# (a function is). A subscriber that compares a 64-bit header, such as a sequence number, gets another number: 9007199254740993
# arrives as 9007199254740992, with no sign that it is not exact.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
cd "$work" && npm init -y >/dev/null && npm install --silent amqplib@2.3.1 >/dev/null
python3 -m venv "$work/venv" && "$work/venv/bin/pip" -q install pika==1.4.4
say "RabbitMQ $broker_version, amqplib 2.3.1, node $(node --version)"
cat >headers.js <<'JS'
const amqp = require('amqplib');
(async () => {
  const connection = await amqp.connect(process.argv[2]);
  const channel = await connection.createConfirmChannel();
  await channel.assertQueue('q', { durable: true });
  channel.publish('', 'q', Buffer.from('one'), { headers: { 'failed-at': new Date('2026-11-20T08:15:02Z') } });
  await channel.waitForConfirms();
  console.log('Date:', JSON.stringify((await channel.get('q', { noAck: true })).properties.headers));
  try {
    channel.publish('', 'q', Buffer.from('one'), { headers: { f: () => 1 } });
    console.log('function: taken');
  } catch (error) { console.log('function: refused'); }
  await connection.close();
})();
JS
node headers.js "$SETTINGS_URL" | tee out
"$work/venv/bin/python" - "$SETTINGS_URL" <<'PY'
import sys, pika
channel = pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel()
channel.basic_publish('', 'q', b'one', pika.BasicProperties(headers={'sequence': 9007199254740993}))
channel.connection.close()
PY
cat >read.js <<'JS'
const amqp = require('amqplib');
(async () => {
  const connection = await amqp.connect(process.argv[2]);
  const channel = await connection.createChannel();
  console.log('9007199254740993:', (await channel.get('q', { noAck: true })).properties.headers.sequence);
  await connection.close();
})();
JS
node read.js "$SETTINGS_URL" | tee -a out
printf '%s\n' 'Date: {"failed-at":{}}' 'function: refused' '9007199254740993: 9007199254740992' | diff - out || changed "headers are written or read otherwise"
say "as found: the time is lost without an error, the large integer is another one"
