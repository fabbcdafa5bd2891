"""A subscriber in Python: every settlement counted once, however often it is told.

    BROKER_URL=amqps://.. STORE=settled.sqlite python subscriber.py QUEUE

It reads both formats with the official CloudEvents SDK, and keeps the ids that it has seen in the same SQLite database, and
in the same transaction, as what it does with an event. STOP_AFTER=N ends it after N messages; else it runs until it is killed.
"""

import json
import os
import sqlite3
import sys

import pika
from cloudevents.core.bindings.rabbitmq import RabbitMQMessage, from_rabbitmq_event

SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"

SCHEMA = """
CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS allocated (
    connection_id TEXT, currency TEXT, quantity TEXT, PRIMARY KEY (connection_id, currency)
);
"""

# What a connection's allocated funds change by. Money is counted with Python's integers: they do not round.
SIGNS = {"allocation.cleared": 1, "deallocation.cleared": -1}


def events_of(content_type, body):
    """The events of a message. The SDK reads no batches over AMQP: that is a private profile, each of whose members is one."""
    bodies = [body]
    if content_type == BATCH:
        bodies = [json.dumps(event).encode() for event in json.loads(body)]
    elif content_type != SINGLE:
        raise ValueError(f"no event: {content_type}")
    return [from_rabbitmq_event(RabbitMQMessage(headers={}, content_type=SINGLE, body=body)) for body in bodies]


def take(store, event):
    """What this program does with an event, once. False: it was seen before."""
    new = store.execute("INSERT OR IGNORE INTO seen VALUES (?)", [event.get_id()]).rowcount
    sign = SIGNS.get(event.get_type(), 0)
    if new and sign:
        allocation = event.get_data()["allocation"]
        where = [allocation["connectionId"], allocation["amount"]["currency"]]
        row = store.execute("SELECT quantity FROM allocated WHERE connection_id = ? AND currency = ?", where).fetchone()
        quantity = int(row[0] if row else 0) + sign * int(allocation["amount"]["quantity"])
        store.execute("INSERT OR REPLACE INTO allocated VALUES (?, ?, ?)", [*where, str(quantity)])
    return bool(new)


def main():
    queue = sys.argv[1]
    left = int(os.environ.get("STOP_AFTER", 0))
    store = sqlite3.connect(os.environ.get("STORE", "settled.sqlite"))
    store.executescript(SCHEMA)
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["BROKER_URL"]))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(queue, "settlement.events", "#")
    channel.basic_qos(prefetch_count=100)
    for method, about, body in channel.consume(queue):
        # All of a message in one transaction, and only then is it acknowledged: until then it comes again as a whole.
        with store:
            for event in events_of(about.content_type, body):
                word = "new" if take(store, event) else "seen before"
                print(event.get_type(), event.get_id(), word, flush=True)
        channel.basic_ack(method.delivery_tag)
        left -= 1
        if left == 0:
            break
    channel.cancel()
    connection.close()


if __name__ == "__main__":
    main()
