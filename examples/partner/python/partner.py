"""A partner in Python: sign an update, publish it with a confirm, wait for its outcome.

    echo '{"status":"cleared","allocationId":"..", ..}' | BROKER_URL=amqps://.. ENTERPRISE_ID=northwind PARTNER_KEY=<hex> python partner.py

The fields stand in docs/partners.md. OWN_EXCHANGE=yes: the operator made an exchange and a queue for this partner.
It prints the outcome's event; exit 0: settled, 1: refused, 2: nothing was heard.
"""

import hashlib
import json
import os
import sys

import coincurve
import pika


def varint(number):
    for limit, mark, size in ((0xFD, b"", 1), (0x10000, b"\xfd", 2), (0x100000000, b"\xfe", 4)):
        if number < limit:
            return mark + number.to_bytes(size, "little")
    raise ValueError("too long")


def sign(key, payload):
    """The compact recoverable signature of a Bitcoin signed message: header, r, s."""
    text = payload.encode()
    message = b"\x18Bitcoin Signed Message:\n" + varint(len(text)) + text
    digest = hashlib.sha256(hashlib.sha256(message).digest()).digest()
    signature = key.sign_recoverable(digest, hasher=None)  # r, s, recovery id; s is the lower one
    return bytes([27 + 4 + signature[64]]).hex() + signature[:64].hex()


def signed(key, fields):
    """The body. The payload is signed as the very text that travels in it."""
    payload = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    body = {**fields, "payload": payload, "signature": sign(key, payload)}
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def events_of(content_type, body):
    told = json.loads(body)
    return told if content_type == "application/cloudevents-batch+json" else [told]


def is_about(event, fields, digest):
    """By nonce, by the bytes that were sent, or by what they are about: a settlement keeps the nonce that settled it."""
    data = event["data"]
    about = fields.get("allocationId") or fields.get("deallocationId")
    return (
        data.get("nonce") == fields["nonce"]
        or data.get("messageDigest") == digest
        or data.get("allocation", {}).get("id") == about.lower()
    )


def main():
    enterprise = os.environ["ENTERPRISE_ID"]
    key = coincurve.PrivateKey(bytes.fromhex(os.environ["PARTNER_KEY"]))
    fields = json.load(sys.stdin)
    body = signed(key, fields)
    digest = hashlib.sha256(body).hexdigest()
    kind = "allocation" if "allocationId" in fields else "deallocation"

    parameters = pika.URLParameters(os.environ["BROKER_URL"])
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    channel.confirm_delivery()
    exchange, outcomes = "settlement.updates." + enterprise, "settlement.outcomes." + enterprise
    if "OWN_EXCHANGE" not in os.environ:
        # A queue of one's own, bound before anything is sent: what is told from now on is kept there.
        exchange, outcomes = "settlement.updates", enterprise + ".outcomes"
        channel.queue_declare(outcomes, durable=True, arguments={"x-queue-type": "quorum"})
        channel.queue_bind(outcomes, "settlement.events", "*.*." + enterprise)
    properties = pika.BasicProperties(
        content_type="application/json",
        delivery_mode=2,
        message_id=fields["nonce"],
        user_id=parameters.credentials.username,
    )
    # Returns once the broker has confirmed it, and raises if it does not or if no queue takes it.
    channel.basic_publish(exchange, f"{enterprise}.{kind}.update", body, properties, mandatory=True)
    print("published, and confirmed by the broker", file=sys.stderr)

    code = 2
    for method, about, told in channel.consume(outcomes, inactivity_timeout=30):
        if method is None:
            print("nothing for 30 s: see 'When there is silence' in docs/partners.md", file=sys.stderr)
            break
        mine = [event for event in events_of(about.content_type, told) if is_about(event, fields, digest)]
        channel.basic_ack(method.delivery_tag)
        outcome = next((event for event in mine if event["type"] != "update.parked"), None)
        if outcome:
            print(json.dumps(outcome))
            code = 1 if outcome["type"] == "update.rejected" else 0
            break
    channel.cancel()
    connection.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
