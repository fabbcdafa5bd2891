#!/usr/bin/env python3
"""A partner in one file: sign an update, publish it with a confirm, and wait for its outcome.

    python3 examples/partner.py body                      # print the signed body of the worked example
    pip install pika
    python3 examples/partner.py send amqps://northwind:...@mq.internal/settlement
    python3 examples/partner.py prove 'TEXT'              # sign what the operator's `settled key challenge` printed

Signing needs nothing but Python 3.8. It is written to be read: use a library for secp256k1 where speed or side
channels count. PARTNER_KEY (64 hexadecimal digits) is the key; without it, that of the worked example in
docs/partners.md, which is public.
"""

import hashlib
import hmac
import json
import os
import sys

# The curve secp256k1: y^2 = x^3 + 7 over the integers modulo P; G generates a group of N points.
P = 2**256 - 2**32 - 977
N = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
G = (
    0x79BE667EF9DCBBAC55A06295CE870B07029BFCDB2DCE28D959F2815B16F81798,
    0x483ADA7726A3C4655DA4FBFC0E1108A8FD17B448A68554199C47D08FFB10D4B8,
)


def add(a, b):
    """The sum of two points; None is the point at infinity."""
    if a is None or b is None:
        return a or b
    if a[0] == b[0]:
        if (a[1] + b[1]) % P == 0:
            return None
        slope = 3 * a[0] * a[0] * pow(2 * a[1], P - 2, P) % P
    else:
        slope = (b[1] - a[1]) * pow(b[0] - a[0], P - 2, P) % P
    x = (slope * slope - a[0] - b[0]) % P
    return x, (slope * (a[0] - x) - a[1]) % P


def multiply(k, point):
    total = None
    while k:
        if k & 1:
            total = add(total, point)
        point = add(point, point)
        k >>= 1
    return total


def nonces(key, digest):
    """The numbers k of RFC 6979: no two messages share one, and no source of chance is needed."""
    v, k = b"\x01" * 32, b"\x00" * 32
    seed = key.to_bytes(32, "big") + (int.from_bytes(digest, "big") % N).to_bytes(32, "big")
    for mark in (b"\x00", b"\x01"):
        k = hmac.new(k, v + mark + seed, hashlib.sha256).digest()
        v = hmac.new(k, v, hashlib.sha256).digest()
    while True:
        v = hmac.new(k, v, hashlib.sha256).digest()
        if 0 < int.from_bytes(v, "big") < N:
            yield int.from_bytes(v, "big")
        k = hmac.new(k, v + b"\x00", hashlib.sha256).digest()
        v = hmac.new(k, v, hashlib.sha256).digest()


def varint(number):
    for limit, mark, size in ((0xFD, b"", 1), (0x10000, b"\xfd", 2), (0x100000000, b"\xfe", 4)):
        if number < limit:
            return mark + number.to_bytes(size, "little")
    return b"\xff" + number.to_bytes(8, "little")


def sign(key, payload):
    """The compact recoverable signature of the payload, in hexadecimal."""
    text = payload.encode()
    message = b"\x18Bitcoin Signed Message:\n" + varint(len(text)) + text
    digest = hashlib.sha256(hashlib.sha256(message).digest()).digest()
    for k in nonces(key, digest):
        x, y = multiply(k, G)
        r = x % N
        s = pow(k, N - 2, N) * (int.from_bytes(digest, "big") + r * key) % N
        if r and s:
            break
    recovery = (y & 1) | (2 if x >= N else 0)
    if s > N // 2:  # The lower of the two: the other one is refused.
        s, recovery = N - s, recovery ^ 1
    return (bytes([27 + 4 + recovery]) + r.to_bytes(32, "big") + s.to_bytes(32, "big")).hex()


def public_key(key):
    x, y = multiply(key, G)
    return (bytes([2 + (y & 1)]) + x.to_bytes(32, "big")).hex()


def body(key, fields):
    """The body to publish. The payload is signed as the very text that travels in it."""
    payload = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    signed = {"payload": payload, "signature": sign(key, payload)}
    return json.dumps({**fields, **signed}, separators=(",", ":"), ensure_ascii=False)


ENTERPRISE = "northwind"

EXAMPLE = {
    "status": "cleared",
    "allocationId": "10764cd8-59b5-422a-93a6-681bae7e84bd",
    "amount": {"currency": "BTC", "quantity": "100000000"},
    "clientId": "9838fce3-c125-4af8-a775-a389f5ac26bf",
    "connectionId": "632e0bd6-9ab5-40c4-b1dd-a0c4bb819bc7",
    "partnersClientId": "cust-42",
    "partnersConnectionId": "conn-7",
    "partnersAllocationId": "alloc-1001",
    "nonce": "2026-11-20-000001",
}


def send(url, text, nonce):
    try:
        import pika
    except ImportError:
        print("to send, install pika: pip install pika", file=sys.stderr)
        return 2
    try:
        return converse(pika, url, text, nonce)
    except (pika.exceptions.AMQPError, OSError, ValueError) as why:
        # The URL is not repeated: it holds a password.
        said = type(why).__name__ + (": " + str(why) if str(why) and url not in str(why) else "")
        print("not sent, or the outcome is not known (" + said + "): check the URL, then send the same again", file=sys.stderr)
        return 1


def converse(pika, url, text, nonce):
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.confirm_delivery()
    # A queue of one's own, bound before anything is sent: what is told from now on is kept there.
    outcomes = ENTERPRISE + ".outcomes"
    channel.queue_declare(outcomes, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(outcomes, "settlement.events", "*.*." + ENTERPRISE)
    properties = pika.BasicProperties(
        content_type="application/json",
        delivery_mode=2,
        message_id=nonce,
        user_id=connection._impl.params.credentials.username,
    )
    # Returns once the broker has confirmed it, and raises if it does not.
    channel.basic_publish("settlement.updates", ENTERPRISE + ".allocation.update", text, properties)
    print("published, and confirmed by the broker", file=sys.stderr)
    digest = hashlib.sha256(text.encode()).hexdigest()
    for method, about, told in channel.consume(outcomes, inactivity_timeout=30):
        if method is None:
            print("nothing for 30 s: see 'When there is silence' in docs/partners.md", file=sys.stderr)
            return 1
        events = json.loads(told)
        # One event, or an array of them where the operator chose so.
        events = events if isinstance(events, list) else [events]
        channel.basic_ack(method.delivery_tag)
        for event in events:
            data = event["data"]
            # Asked for again under a new nonce, a settlement comes with the nonce that settled it.
            is_settlement_of_it = data.get("allocation", {}).get("id") == EXAMPLE["allocationId"]
            if data.get("nonce") == nonce or data.get("messageDigest") == digest or is_settlement_of_it:
                print(json.dumps(event, indent=2))
                if event["type"] != "update.parked":
                    channel.cancel()
                    connection.close()
                    return 0
    return 1


def main():
    secret = os.environ.get("PARTNER_KEY") or hashlib.sha256(b"settled: the partner of the README").hexdigest()
    try:
        key = int(secret, 16) if len(secret) == 64 else 0
    except ValueError:
        key = 0
    if not 0 < key < N:
        print("PARTNER_KEY must be the private key in 64 hexadecimal digits", file=sys.stderr)
        return 2
    print("public key", public_key(key), file=sys.stderr)
    text = body(key, EXAMPLE)
    if sys.argv[1:] == ["body"]:
        print(text, end="")
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "prove":
        print(sign(key, sys.argv[2]))
        return 0
    if len(sys.argv) == 3 and sys.argv[1] == "send":
        return send(sys.argv[2], text, EXAMPLE["nonce"])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
