#!/usr/bin/env bash
# rabbitmq-client (Node) hands over a parsed object instead of the body's bytes when a message's content_type is exactly
# application/json and it has no content_encoding; one property more, or another JSON media type, and the body is a Buffer.
#
# Seen with rabbitmq-client 5.0.8 on Node 20, RabbitMQ 3.10.8 (Debian 12). The bytes are gone then: a digest or a signature
# over the body can not be checked, and integers beyond 2^53, such as amounts in wei, have become other numbers. The same body
# with content_encoding utf-8 (which some publishers set by default), or as application/cloudevents+json, comes as bytes. So a
# subscriber that works with one publisher breaks with the next one, although both say the same.
cd "$(dirname "$0")"
. lib/debian.sh
start_broker
cd "$work" && npm init -y >/dev/null && npm install --silent rabbitmq-client@5.0.8 >/dev/null
say "RabbitMQ $broker_version, rabbitmq-client 5.0.8, node $(node --version)"
cat >bodies.js <<'JS'
const { Connection } = require('rabbitmq-client');
(async () => {
  const connection = new Connection(process.argv[2]);
  await connection.queueDeclare({ queue: 'q', durable: true });
  const publisher = connection.createPublisher({ confirm: true });
  const body = Buffer.from('{"quantity":340282366920938463463374607431768211456}');
  for (const properties of [
    { contentType: 'application/json' },
    { contentType: 'application/json', contentEncoding: 'utf-8' },
    { contentType: 'application/json; charset=utf-8' },
    { contentType: 'application/cloudevents+json' },
  ]) {
    await publisher.send({ routingKey: 'q', durable: true, ...properties }, body);
    const message = await connection.basicGet({ queue: 'q', noAck: true });
    const what = Buffer.isBuffer(message.body) ? 'bytes' : `${typeof message.body} ${JSON.stringify(message.body)}`;
    console.log(Object.values(properties).join(' + ') + ':', what);
  }
  await publisher.close();
  await connection.close();
})();
JS
node bodies.js "$SETTINGS_URL" | tee out
cat >expected <<'TXT'
application/json: object {"quantity":3.402823669209385e+38}
application/json + utf-8: bytes
application/json; charset=utf-8: bytes
application/cloudevents+json: bytes
TXT
diff expected out || changed "bodies are handed over otherwise"
say "as found: two properties decide whether a subscriber sees bytes or an object"
