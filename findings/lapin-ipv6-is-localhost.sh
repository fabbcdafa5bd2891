#!/usr/bin/env bash
# lapin connects to this machine when its URL names an IPv6 address, with the user and password that were meant for that
# address.
#
# Seen with lapin 4.12.3, amq-protocol-uri 10.6.3, pika 1.4.4, RabbitMQ 3.10.8 (Debian 12).
# amqp://user:password@[2001:db8::7]:5672/ is valid by RFC 3986 and RabbitMQ's URI specification. The port, the user and the
# virtual host are read from it, the host is not, and a host that is missing means localhost. One would expect an error, if
# IPv6 were not supported. So a worker beside a broker of its own (a test's, a sidecar's) reports that it is connected, and
# settles the wrong one's messages; without one the error is that localhost refuses.
cd "$(dirname "$0")"
. lib/debian.sh
rust_with 'lapin = { version = "=4.12.3", default-features = false, features = ["tokio"] }
amq-protocol-uri = "=10.6.3"
tokio = { version = "1", features = ["rt-multi-thread", "macros"] }' <<'RS'
#[tokio::main]
async fn main() {
    let url = std::env::args().nth(1).unwrap();
    let read = url.parse::<amq_protocol_uri::AMQPUri>().unwrap();
    println!("lapin: host {}", read.authority.host);
    let connection = lapin::Connection::connect(&url, lapin::ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.queue_declare("meant-for-another".into(), Default::default(), Default::default()).await.unwrap();
    connection.close(200, "".into()).await.unwrap();
}
RS
python_with pika==1.4.4
start_broker
say "RabbitMQ $broker_version on 127.0.0.1"
# An address out of the block for documentation: nobody has it.
url="amqp://guest:guest@[2001:db8::7]:$amqp_port/%2f"
{
    python -c 'import pika, sys; print("pika: host", pika.URLParameters(sys.argv[1]).host)' "$url"
    timeout 60 "$work/rust/run" "$url"
    say "queues on 127.0.0.1: $(rabbitmqctl -q list_queues name --no-table-headers)"
} | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "the address is read otherwise"
pika: host 2001:db8::7
lapin: host localhost
queues on 127.0.0.1: meant-for-another
TXT
say "as found: another broker than the one that was named"
