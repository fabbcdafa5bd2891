#!/usr/bin/env bash
# amqp://host/ is another virtual host to lapin than to everyone else.
#
# Seen with lapin 4.12.3, pika 1.4.4, aio-pika 10.2.1, amqplib 2.3.1, rabbitmq-client 5.0.8, RabbitMQ 3.10.8 (Debian 12) with
# a virtual host whose name is empty beside the usual one. RabbitMQ's own URI specification says that a path that is "/" alone
# is the virtual host with the empty name; lapin does that, the others go to "/". So two programs with one URL in one variable
# publish and consume in different virtual hosts, each with success, and no message arrives; where there is no virtual host
# with an empty name, one of them is refused.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'lapin = { version = "=4.12.3", default-features = false, features = ["tokio"] }
tokio = { version = "1", features = ["rt-multi-thread", "macros"] }' <<'RS'
#[tokio::main]
async fn main() {
    let url = std::env::args().nth(1).unwrap();
    let connection = lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.queue_declare("lapin".into(), Default::default(), Default::default()).await.unwrap();
    connection.close(200, "".into()).await.unwrap();
}
RS
node_with amqplib@2.3.1 rabbitmq-client@5.0.8
python_with pika==1.4.4 aio-pika==10.2.1
start_broker
say "RabbitMQ $broker_version"
rabbitmqctl -q add_vhost ''
rabbitmqctl -q set_permissions -p '' guest '.*' '.*' '.*'
cat >"$work/declare.js" <<'JS'
const amqp = require('amqplib');
const { Connection } = require('rabbitmq-client');
(async () => {
  const first = await amqp.connect(process.argv[2]);
  await (await first.createChannel()).assertQueue('amqplib');
  await first.close();
  const second = new Connection(process.argv[2]);
  await second.queueDeclare({ queue: 'rabbitmq-client', durable: true });
  await second.close();
})();
JS
cat >"$work/declare.py" <<'PY'
import asyncio, sys, aio_pika, pika
pika.BlockingConnection(pika.URLParameters(sys.argv[1])).channel().queue_declare('pika', durable=True)
async def other():
    async with await aio_pika.connect(sys.argv[1]) as connection:
        await (await connection.channel()).declare_queue('aio-pika', durable=True)
asyncio.run(other())
PY
for path in / /%2f; do
    url=amqp://guest:guest@127.0.0.1:$amqp_port$path
    timeout 60 "$work/rust/run" "$url"
    (cd "$work" && timeout 60 node declare.js "$url")
    timeout 60 "$work/venv/bin/python" "$work/declare.py" "$url"
    for vhost in / ''; do
        queues=$(rabbitmqctl -q list_queues -p "$vhost" name --no-table-headers | sort | paste -sd ' ')
        say "amqp://host$path, virtual host \"$vhost\": ${queues:-none}"
        for queue in $queues; do rabbitmqctl -q delete_queue -p "$vhost" "$queue" >/dev/null; done
    done
done | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "URLs are read otherwise"
amqp://host/, virtual host "/": aio-pika amqplib pika rabbitmq-client
amqp://host/, virtual host "": lapin
amqp://host/%2f, virtual host "/": aio-pika amqplib lapin pika rabbitmq-client
amqp://host/%2f, virtual host "": none
TXT
say "as found: one URL, two places"
