"""The settlement worker as a Python engineer would write it: aio-pika and asyncpg, a message at a time, 16 at once.

For comparison only, see ../README.md. Steps and names follow the Rust per-message worker, benches/bench/per_message.rs.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
import uuid
from collections import namedtuple
from contextlib import suppress
from datetime import datetime, timedelta, timezone

import aio_pika
import asyncpg
import orjson
import uvloop
from coincurve import PublicKey
from pamqp import encode

HANDLERS = 16
PREFETCH = 256
ATTEMPTS = 8
STOP_SECONDS = 30

BODY_MAX = 262_144
PROPERTIES_MAX = 16_384
DEPTH_MAX = 16
NONCE_MAX = 256
EXTERNAL_ID_MAX = 1024
REJECT_REASON_MAX = 16_384
PARK_DEADLINE = timedelta(minutes=15)
PARK_FIRST_RETRY = timedelta(milliseconds=500)
PARK_MAX_PER_PARTNER = 10_000
NAMESPACE = uuid.UUID("6f1d0c52-0e0b-5c7e-9a53-3c1c8a2d7f10")
GROUP_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141

# Reason: class, and whether it is final.
REASONS = {
    "message_too_large": (400, True),
    "malformed_message": (400, True),
    "invalid_field": (400, True),
    "unknown_partner": (401, False),
    "sender_mismatch": (403, False),
    "malformed_signature": (401, True),
    "signature_mismatch": (401, False),
    "payload_mismatch": (400, True),
    "nonce_reused": (409, True),
    "policy_contradiction": (400, False),
    "partner_inactive": (403, False),
    "allocation_not_found": (404, False),
    "not_permitted": (403, True),
    "allocation_mismatch": (409, True),
    "already_settled": (409, True),
}

LOAD_ALLOCATIONS = """
    SELECT a.id, a.type, a.status, a.currency, a.quantity::text AS quantity, a.connection_id, a.client_id,
           a.client_external_id, a.initiated_by, a.notes, a.reason, a.retriable, a.partner_external_id, a.evaluation_id,
           a.pending_approval_id, a.policy_result, a.settled_nonce, a.created_at, a.updated_at,
           a.client_funds, a.connection_funds,
           c.enterprise_id, c.partners_client_id, c.partners_connection_id
    FROM settled.allocations AS a
    JOIN settled.connections AS c ON c.connection_id = a.connection_id
    WHERE a.id = ANY ($1::uuid[])
    ORDER BY a.id
    FOR NO KEY UPDATE OF a"""
LOAD_RECEIPTS = """
    SELECT r.key, r.payload_digest, r.verdict, r.reason, r.allocation_id, r.public_key, p.key IS NOT NULL AS waits
    FROM settled.receipts AS r
    LEFT JOIN settled.parked AS p ON p.key = r.key
    WHERE r.key = ANY ($1::uuid[])
    ORDER BY r.key
    FOR NO KEY UPDATE OF r"""
LOAD_PARTNER = """
    SELECT t.now, p.enterprise_id, p.broker_user, p.suspended_at IS NOT NULL AS suspended,
           p.async_allocations, p.async_deallocations, k.public_key
    FROM (SELECT date_trunc('milliseconds', clock_timestamp()) AS now) AS t
    LEFT JOIN settled.partners AS p ON p.enterprise_id = $1
    LEFT JOIN settled.partner_keys AS k
      ON k.enterprise_id = p.enterprise_id
     AND k.revoked_at IS NULL
     AND k.valid_from <= clock_timestamp()
     AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())"""
LOCK_PARKING = "SELECT pg_advisory_xact_lock(7236102, hashtext($1::text))"
COUNT_PARKED = "SELECT count(*) FROM settled.parked WHERE enterprise_id = $1"
UPDATE_ALLOCATION = """
    UPDATE settled.allocations
    SET status = $2, reason = $3, retriable = false, partner_external_id = $4, evaluation_id = $5,
        pending_approval_id = $6, policy_result = $7, settled_nonce = $8, updated_at = $9
    WHERE id = $1
      AND status = 'reserved'"""
INSERT_RECEIPT = """
    INSERT INTO settled.receipts (
        key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id, public_key,
        first_seen, last_seen, batch_id
    )
    VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11, $12)"""
UPDATE_RECEIPT = """
    UPDATE settled.receipts
    SET message_digest = $2, verdict = $3, reason = $4, allocation_id = $5, event_id = $6, public_key = $7,
        last_seen = $8,
        batch_id = CASE WHEN (verdict, event_id) IS DISTINCT FROM ($3, $6) THEN $9 ELSE batch_id END
    WHERE key = $1"""
TOUCH_RECEIPT = "UPDATE settled.receipts SET last_seen = $2 WHERE key = $1"
INSERT_TRANSFER = """
    INSERT INTO settled.transfers (
        subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
        created_at
    )
    VALUES ($1, 1, $2, $3, $4, $5::text::numeric(78, 0), $6, $7, $8, $9, $10)"""
UPDATE_FUNDS = """
    UPDATE settled.funds
    SET available = available + $2::text::numeric,
        held = held + $3::text::numeric,
        allocated = allocated + $4::text::numeric
    WHERE id = $1"""
PARK = """
    INSERT INTO settled.parked (
        key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at, until,
        attempts, due_at
    )
    VALUES ($1, $2, $3, $4, $5, $6, 1, $7, $8, $9, $10, 0, $11)"""
INSERT_PARKING = "INSERT INTO settled.parkings (key, allocation_id, step, at) VALUES ($1, $2, 'parked', $3)"

# A fault of two tasks that met: a deadlock, a lock timeout, or a row that the other wrote first.
PASSES = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
)


class Refused(Exception):
    """A message that is refused: reason and detail."""

    def __init__(self, reason, detail):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# Bytes to facts -------------------------------------------------------------------------------------------------------

ROUTING_KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})\.(allocation|deallocation)\.update")
CONTENT_TYPE = re.compile(r"application/json([ \t]*;[ \t]*charset=(utf-8|\"utf-8\")[ \t]*)?", re.IGNORECASE)
CURRENCY = re.compile(r"[A-Za-z0-9:._-]{1,64}")
QUANTITY = re.compile(r"[0-9]+")
UUID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}")
SIGNATURE = re.compile(r"[0-9a-fA-F]{130}")

Number = namedtuple("Number", "text")


def unique(pairs):
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("has the same key twice in one object")
    return members


def no_constant(_):
    raise ValueError("is not well-formed JSON")


# Numbers keep their literal text: they are compared by it.
DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_float=Number, parse_int=Number, parse_constant=no_constant
)


def read_json(text):
    """One document; a ValueError says why not, and follows "the body"."""
    if text.startswith("\ufeff"):
        raise ValueError("begins with a byte-order mark")
    try:
        value = DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("is not well-formed JSON") from error
    # Only a text with so many brackets can be too deep, and only an escape can be half of a pair.
    if text.count("{") + text.count("[") > DEPTH_MAX and depth(value) > DEPTH_MAX:
        raise ValueError(f"is nested deeper than {DEPTH_MAX}")
    if "\\ud" in text or "\\uD" in text:
        try:
            orjson.dumps(value)
        except TypeError as error:
            raise ValueError("has a lone surrogate in a string") from error
    return value


def depth(value):
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def sha256(data):
    return hashlib.sha256(data).digest()


def parse_uuid(text):
    return text.lower() if UUID.fullmatch(text) else None


def parse_policy(text):
    lower = text.lower()
    return lower if lower in ("approved", "rejected") else None


def require(holder, name, full_name=None):
    value = holder.get(name, require)
    if value is require:
        raise Refused("invalid_field", f"{full_name or name}: is missing")
    return value


def text_of(value, name):
    if not isinstance(value, str):
        raise Refused("invalid_field", f"{name}: must be a string")
    if "\0" in value:
        raise Refused("invalid_field", f"{name}: must not contain U+0000")
    return value


def bounded(value, name, most):
    text = text_of(value, name)
    if not 1 <= len(text.encode()) <= most:
        raise Refused("invalid_field", f"{name}: must be 1 to {most} bytes")
    return text


def uuid_of(value, name):
    found = parse_uuid(text_of(value, name))
    if found is None:
        raise Refused("invalid_field", f"{name}: must be a UUID of 36 characters, 8-4-4-4-12")
    return found


class Update:
    """The partner's message, decoded."""

    def __init__(self, body, enterprise_id, kind):
        self.enterprise_id, self.kind = enterprise_id, kind
        partners_id = "partnersAllocationId" if kind == "allocation" else "partnersDeallocationId"
        self.id = uuid_of(require(body, kind + "Id"), kind + "Id")
        amount = require(body, "amount")
        if not isinstance(amount, dict):
            raise Refused("invalid_field", "amount: must be an object")
        self.currency = text_of(require(amount, "currency", "amount.currency"), "amount.currency")
        if not CURRENCY.fullmatch(self.currency):
            raise Refused("invalid_field", "amount.currency: must be 1 to 64 bytes of [A-Za-z0-9:._-]")
        self.quantity = text_of(require(amount, "quantity", "amount.quantity"), "amount.quantity")
        if not QUANTITY.fullmatch(self.quantity):
            raise Refused("invalid_field", "amount.quantity: must be decimal digits")
        if self.quantity[0] == "0":
            raise Refused("invalid_field", "amount.quantity: must be at least 1 and have no leading zeros")
        if len(self.quantity) > 78 or int(self.quantity) >= 1 << 256:
            raise Refused("invalid_field", "amount.quantity: must be at most 2^256-1")
        self.client_id = uuid_of(require(body, "clientId"), "clientId")
        self.connection_id = uuid_of(require(body, "connectionId"), "connectionId")
        self.partners_client_id = bounded(require(body, "partnersClientId"), "partnersClientId", EXTERNAL_ID_MAX)
        self.partners_connection_id = bounded(
            require(body, "partnersConnectionId"), "partnersConnectionId", EXTERNAL_ID_MAX
        )
        self.partners_id = bounded(require(body, partners_id), partners_id, EXTERNAL_ID_MAX)
        self.status = text_of(require(body, "status"), "status")
        if self.status not in ("cleared", "released"):
            raise Refused("invalid_field", "status: must be cleared or released")
        self.nonce = bounded(require(body, "nonce"), "nonce", NONCE_MAX)
        self.reject_reason = None
        if self.status == "released":
            self.reject_reason = bounded(require(body, "rejectReason"), "rejectReason", REJECT_REASON_MAX)
        elif "rejectReason" in body:
            raise Refused("invalid_field", "rejectReason: must be absent when the status is cleared")
        self.evaluation_id = self.pending_approval_id = self.policy_result = None
        if "evaluationId" in body:
            self.evaluation_id = bounded(body["evaluationId"], "evaluationId", EXTERNAL_ID_MAX)
        if "pendingApprovalId" in body:
            self.pending_approval_id = bounded(body["pendingApprovalId"], "pendingApprovalId", EXTERNAL_ID_MAX)
        if "policyResult" in body:
            self.policy_result = parse_policy(text_of(body["policyResult"], "policyResult"))
            if self.policy_result is None:
                raise Refused("invalid_field", "policyResult: must be approved or rejected")
        self.payload = text_of(require(body, "payload"), "payload")
        if not self.payload:
            raise Refused("invalid_field", "payload: must not be empty")
        self.signature = text_of(require(body, "signature"), "signature")


def varint(number):
    if number < 0xFD:
        return bytes([number])
    if number <= 0xFFFF:
        return b"\xfd" + number.to_bytes(2, "little")
    return b"\xfe" + number.to_bytes(4, "little")


def signer(payload, signature):
    """The key that made the signature, None where no point can be recovered; Refused if it is malformed."""

    def malformed(detail):
        return Refused("malformed_signature", f"signature: {detail}")

    if signature[:2] in ("0x", "0X"):
        raise malformed("must be bare hexadecimal, without 0x")
    if not SIGNATURE.fullmatch(signature):
        raise malformed("must be exactly 130 hexadecimal characters: header, r, s")
    raw = bytes.fromhex(signature)
    if not 31 <= raw[0] <= 34:
        if 27 <= raw[0] <= 30:
            raise malformed("the header must be 31 to 34: 27 to 30 are for uncompressed keys")
        raise malformed("the header must be 31 to 34: 27 + 4 + recovery id")
    r, s = int.from_bytes(raw[1:33], "big"), int.from_bytes(raw[33:], "big")
    if not 1 <= r < GROUP_ORDER:
        raise malformed("r must be at least 1 and less than the order of the group")
    if s < 1:
        raise malformed("s must be at least 1")
    if s > GROUP_ORDER // 2:
        raise malformed("s must be at most half of the order of the group (low S)")
    digest = sha256(sha256(b"\x18Bitcoin Signed Message:\n" + varint(len(payload)) + payload))
    try:
        return PublicKey.from_signature_and_message(raw[1:] + bytes([raw[0] - 31]), digest, hasher=None).format()
    except Exception:  # noqa: BLE001 - coincurve raises a bare Exception where there is no such point
        return None


# How a named field of payload and body is compared, and whether it must be signed.
def same(left, right):
    return left == right


def same_read(read):
    def equal(left, right):
        if not (isinstance(left, str) and isinstance(right, str)):
            return False
        value = read(left)
        return value is not None and value == read(right)

    return equal


same_uuid, same_policy = same_read(parse_uuid), same_read(parse_policy)


def named_fields(kind, partners_id):
    return {
        kind + "Id": (same_uuid, True),
        "amount": (same, True),
        "clientId": (same_uuid, True),
        "connectionId": (same_uuid, True),
        "partnersClientId": (same, True),
        "partnersConnectionId": (same, True),
        partners_id: (same, True),
        "status": (same, True),
        "nonce": (same, True),
        "rejectReason": (same, True),
        "evaluationId": (same, False),
        "pendingApprovalId": (same, False),
        "policyResult": (same_policy, False),
    }


NAMED = {
    "allocation": named_fields("allocation", "partnersAllocationId"),
    "deallocation": named_fields("deallocation", "partnersDeallocationId"),
}


def disagreement(payload, body, update):
    """Where the signed text and the body differ; None if they agree."""
    named = NAMED[update.kind]
    for name, (equal, must_be_signed) in named.items():
        signed, said = payload.get(name, same), body.get(name, same)
        if signed is same:
            if said is not same and must_be_signed:
                return f"{name}: is in the body, but not in the payload"
        elif said is same:
            return f"{name}: is in the payload, but not in the body"
        elif not equal(signed, said):
            return f"{name}: differs between the payload and the body"
    for key, signed in payload.items():
        if key in named or (key in body and body[key] == signed):
            continue
        if key == "enterpriseId":
            if signed != update.enterprise_id:
                return "enterpriseId: differs between the payload and the routing key"
            continue
        return "an undocumented key of the payload is not in the body, or has another value there"
    return None


def receipt_key(enterprise_id, nonce):
    return uuid.UUID(bytes=sha256(enterprise_id.encode() + b"\0" + nonce.encode())[:16])


class Facts:
    """All that a message tells by itself."""

    def __init__(self, message):
        self.digest = sha256(message.body)
        self.enterprise_id = self.update = self.refusal = None
        address = ROUTING_KEY.fullmatch(message.routing_key)
        if address:
            self.enterprise_id = address[1]
        try:
            self.read(message, address)
        except Refused as refusal:
            self.update, self.refusal = None, refusal

    def read(self, message, address):
        if len(message.body) > BODY_MAX:
            detail = f"the body has {len(message.body)} bytes, at most {BODY_MAX} are allowed"
            raise Refused("message_too_large", detail)
        size = properties_size(message)
        if size > PROPERTIES_MAX:
            detail = f"properties and headers have {size} bytes, at most {PROPERTIES_MAX} are allowed"
            raise Refused("message_too_large", detail)
        if not address:
            detail = (
                "the routing key must be <enterpriseId>.allocation.update or <enterpriseId>.deallocation.update"
            )
            raise Refused("malformed_message", detail)
        if message.content_type and not CONTENT_TYPE.fullmatch(message.content_type):
            detail = "content_type must be application/json, with no charset but utf-8"
            raise Refused("malformed_message", detail)
        if message.content_encoding not in (None, "", "identity"):
            raise Refused("malformed_message", "content_encoding must be absent, empty or identity")
        try:
            body = read_json(message.body.decode())
        except UnicodeDecodeError as error:
            raise Refused("malformed_message", f"the body is not UTF-8 (from byte {error.start})") from error
        except ValueError as error:
            raise Refused("malformed_message", f"the body {error}") from error
        if not isinstance(body, dict):
            raise Refused("malformed_message", "the body is not a JSON object")
        update = self.update = Update(body, address[1], address[2])
        payload = update.payload.encode()
        self.payload_digest = sha256(payload)
        self.signed_nonce, self.signed_ids, self.mismatch = None, [], None
        try:
            signed = read_json(update.payload)
            if not isinstance(signed, dict):
                raise ValueError("is not a JSON object")
        except ValueError as error:
            self.mismatch = f"the payload {error}"
        else:
            with suppress(Refused, KeyError):
                self.signed_nonce = bounded(signed["nonce"], "nonce", NONCE_MAX)
            for name in ("allocationId", "deallocationId"):
                with suppress(Refused, KeyError):
                    self.signed_ids.append(uuid_of(signed[name], name))
            self.mismatch = disagreement(signed, body, update)
        self.key, self.malformed = None, None
        try:
            self.key = signer(payload, update.signature)
        except Refused as refusal:
            self.malformed = refusal


def properties_size(message):
    texts = (
        message.content_type, message.content_encoding, message.correlation_id, message.reply_to,
        message.message_id, message.type, message.user_id, message.app_id,
    )
    size = sum(len(text) + 1 for text in texts if text)
    headers = {name: value for name, value in message.headers.items() if name != "x-delivery-count"}
    return size + (len(encode.field_table(headers)) if headers else 0)


# Judgement ------------------------------------------------------------------------------------------------------------


def rfc3339(time):
    return time.astimezone(timezone.utc).isoformat(timespec="milliseconds")[:-6] + "Z"


def event_id(name):
    return str(uuid.uuid5(NAMESPACE, name))


def settlement_event(allocation):
    """From the record alone: every copy is identical."""
    kind = f"{allocation['type']}.{allocation['status']}"
    view = {
        "id": str(allocation["id"]),
        "amount": {"currency": allocation["currency"], "quantity": allocation["quantity"]},
        "connectionId": str(allocation["connection_id"]),
        "clientExternalId": allocation["client_external_id"],
        "partnerExternalId": allocation["partner_external_id"],
        "initiatedBy": allocation["initiated_by"],
        "notes": allocation["notes"],
        "createdAt": rfc3339(allocation["created_at"]),
        "updatedAt": rfc3339(allocation["updated_at"]),
        "retriable": allocation["retriable"],
        "evaluationId": allocation["evaluation_id"],
        "pendingApprovalId": allocation["pending_approval_id"],
        "policyResult": allocation["policy_result"],
        "reason": allocation["reason"],
        "status": allocation["status"],
        "type": allocation["type"],
    }
    for name in ("partnerExternalId", "notes", "evaluationId", "pendingApprovalId", "policyResult"):
        if view[name] is None:
            del view[name]
    return {
        "specversion": "1.0",
        "id": event_id(f"{kind}|{view['id']}"),
        "source": "/settled",
        "type": kind,
        "subject": view["id"],
        "time": view["updatedAt"],
        "datacontenttype": "application/json",
        "data": {
            "allocation": view,
            "enterpriseId": allocation["enterprise_id"],
            "clientId": str(allocation["client_id"]),
            "nonce": allocation["settled_nonce"],
        },
    }


def refusal_id(kind, message, facts, reason):
    return event_id(f"{kind}|{message.routing_key}|{facts.digest.hex()}|{reason}")


def refusal_event(kind, message, facts, reason, detail, now, until=None):
    code, final = REASONS[reason]
    update = facts.update
    event = {
        "specversion": "1.0",
        "id": refusal_id(kind, message, facts, reason),
        "source": "/settled",
        "type": kind,
    }
    if update:
        event["subject"] = update.id
    event["time"] = rfc3339(now)
    event["datacontenttype"] = "application/json"
    data = event["data"] = {
        "enterpriseId": facts.enterprise_id,
        "reason": reason,
        "class": code,
        "final": final,
        "detail": detail,
    }
    if update:
        data["allocationId"] = update.id
        data["nonce"] = update.nonce
    data["messageDigest"] = facts.digest.hex()
    if message.message_id is not None:
        data["messageId"] = message.message_id
    if until is not None:
        data["parkedUntil"] = rfc3339(until)
    return event


def mismatch_with(allocation, update):
    """The field in which the record differs."""
    partners_id = "partnersAllocationId" if update.kind == "allocation" else "partnersDeallocationId"
    settled_as = allocation["partner_external_id"]
    fields = (
        ("amount.currency", allocation["currency"] == update.currency),
        ("amount.quantity", allocation["quantity"] == update.quantity),
        ("clientId", str(allocation["client_id"]) == update.client_id),
        ("connectionId", str(allocation["connection_id"]) == update.connection_id),
        ("partnersClientId", allocation["partners_client_id"] == update.partners_client_id),
        ("partnersConnectionId", allocation["partners_connection_id"] == update.partners_connection_id),
        (partners_id, settled_as is None or settled_as == update.partners_id),
    )
    return next((name for name, equal in fields if not equal), None)


class Judge:
    """One transaction: load, decide, write. What it came to: the event (None: none is due), reason and detail."""

    def __init__(self, db, message, facts):
        self.db, self.message, self.facts, self.update = db, message, facts, facts.update
        self.batch = uuid.uuid4()

    async def judge(self):
        """The event that says what came of it, and the refusal if it was one."""
        try:
            return await self.walk(), None
        except Refused as refusal:
            event = refusal_event(
                "update.rejected", self.message, self.facts, refusal.reason, refusal.detail, self.now
            )
            return event, refusal

    async def walk(self):
        update, facts = self.update, self.facts
        ids = {update.id, *facts.signed_ids}
        rows = await self.db.fetch(LOAD_ALLOCATIONS, ids)
        allocations = {str(row["id"]): row for row in rows}
        self.key = receipt_key(update.enterprise_id, update.nonce)
        nonce = facts.signed_nonce or update.nonce
        signed_key = self.key if nonce == update.nonce else receipt_key(update.enterprise_id, nonce)
        rows = await self.db.fetch(LOAD_RECEIPTS, {self.key, signed_key})
        receipts = {row["key"]: row for row in rows}
        parked_count = 0
        if update.id not in allocations:
            await self.db.fetchval(LOCK_PARKING, update.enterprise_id)
            parked_count = await self.db.fetchval(COUNT_PARKED, update.enterprise_id)
        partner = await self.db.fetch(LOAD_PARTNER, update.enterprise_id)
        self.now = partner[0]["now"]

        settled = self.settled_before(receipts.get(signed_key), allocations)
        if settled:
            await self.db.execute(TOUCH_RECEIPT, signed_key, self.now)
            return settlement_event(settled)
        self.prove(partner)
        receipt = receipts.get(self.key)
        if receipt and receipt["payload_digest"] != facts.payload_digest:
            raise Refused("nonce_reused", "nonce: this partner used it with another payload")
        contradicts = update.status == "cleared" and update.policy_result == "rejected"
        if receipt and receipt["waits"] and not contradicts:
            return None
        if contradicts:
            detail = "policyResult: rejected contradicts the status cleared"
            await self.refuse(receipt, "policy_contradiction", detail)
        inactive = self.inactive(partner[0])
        if inactive:
            await self.refuse(receipt, "partner_inactive", inactive)
        allocation = allocations.get(update.id)
        if allocation is None:
            return await self.park(receipt, parked_count)
        if allocation["enterprise_id"] != update.enterprise_id:
            await self.refuse(receipt, "not_permitted", "the id belongs to another partner's connection")
        if allocation["type"] != update.kind:
            await self.refuse(receipt, "not_permitted", f"{update.kind}Id: the id is of the other type")
        field = mismatch_with(allocation, update)
        if field:
            await self.refuse(receipt, "allocation_mismatch", f"{field}: differs from the record")
        if allocation["status"] == update.status:
            event = settlement_event(allocation)
            await self.put_receipt(receipt, "duplicate", None, event["id"])
            return event
        if allocation["status"] != "reserved":
            await self.refuse(receipt, "already_settled", f"it is {allocation['status']} already")
        return await self.settle(receipt, dict(allocation))

    def settled_before(self, receipt, allocations):
        if receipt is None or receipt["verdict"] != "settled":
            return None
        facts = self.facts
        if receipt["payload_digest"] != facts.payload_digest or receipt["public_key"] != facts.key:
            return None
        return allocations.get(str(receipt["allocation_id"]))

    def prove(self, partner):
        if partner[0]["enterprise_id"] is None:
            raise Refused("unknown_partner", "no partner of this enterprise id is registered")
        user = partner[0]["broker_user"]
        if user is not None and self.message.user_id != user:
            detail = "the user_id property is not the broker user that this partner is bound to"
            raise Refused("sender_mismatch", detail)
        if self.facts.malformed:
            raise self.facts.malformed
        if self.facts.key is None:
            detail = "no public key can be recovered from the signature and the payload"
            raise Refused("signature_mismatch", detail)
        if all(row["public_key"] != self.facts.key for row in partner):
            detail = "the signature was made by no key of the partner that is valid now"
            raise Refused("signature_mismatch", detail)
        if self.facts.mismatch:
            raise Refused("payload_mismatch", self.facts.mismatch)

    def inactive(self, partner):
        if partner["suspended"]:
            return "the partner is suspended"
        if not partner[f"async_{self.update.kind}s"]:
            return f"asynchronous {self.update.kind}s are not enabled for the partner"
        return None

    async def refuse(self, receipt, reason, detail):
        kind = refusal_id("update.rejected", self.message, self.facts, reason)
        await self.put_receipt(receipt, "rejected", reason, kind)
        raise Refused(reason, detail)

    async def put_receipt(self, earlier, verdict, reason, event):
        update, facts = self.update, self.facts
        # A receipt never leaves 'settled' or a final reason.
        if earlier and (earlier["verdict"] == "settled" or REASONS.get(earlier["reason"], (0, False))[1]):
            await self.db.execute(TOUCH_RECEIPT, self.key, self.now)
        elif earlier:
            await self.db.execute(
                UPDATE_RECEIPT, self.key, facts.digest, verdict, reason, update.id, event, facts.key, self.now, self.batch
            )
        else:
            await self.db.execute(
                INSERT_RECEIPT, self.key, update.enterprise_id, update.nonce, facts.payload_digest, facts.digest,
                verdict, reason, update.id, event, facts.key, self.now, self.batch,
            )

    async def park(self, receipt, count):
        update, message = self.update, self.message
        reason = "allocation_not_found"
        if count >= PARK_MAX_PER_PARTNER:
            detail = "no allocation of this id, and too many of this partner's messages wait already"
            await self.refuse(receipt, reason, detail)
        until = self.now + PARK_DEADLINE
        detail = "no allocation of this id is reserved yet; it will be judged again"
        event = refusal_event("update.parked", message, self.facts, reason, detail, self.now, until)
        await self.put_receipt(receipt, "parked", reason, event["id"])
        await self.db.execute(
            PARK, self.key, update.enterprise_id, update.nonce, update.id, message.exchange or "", message.routing_key,
            properties_text(message), message.body, self.now, until, self.now + PARK_FIRST_RETRY,
        )
        await self.db.execute(INSERT_PARKING, self.key, update.id, self.now)
        return event

    async def settle(self, receipt, allocation):
        db, update, now = self.db, self.update, self.now
        allocation.update(
            status=update.status, reason=update.reject_reason, retriable=False, partner_external_id=update.partners_id,
            evaluation_id=update.evaluation_id, pending_approval_id=update.pending_approval_id,
            policy_result=update.policy_result, settled_nonce=update.nonce, updated_at=now,
        )
        event = settlement_event(allocation)
        done = await db.execute(
            UPDATE_ALLOCATION, update.id, update.status, update.reject_reason, update.partners_id,
            update.evaluation_id, update.pending_approval_id, update.policy_result, update.nonce, now,
        )
        if done != "UPDATE 1":
            raise RuntimeError("an allocation left its state under our lock")
        await self.put_receipt(receipt, "settled", None, event["id"])
        to_partner = (update.kind == "allocation") == (update.status == "cleared")
        client, connection = allocation["client_funds"], allocation["connection_funds"]
        # Four accounts a row of funds: external, available, held, allocated.
        debit, credit = connection * 4 + 2, connection * 4 + 3 if to_partner else client * 4 + 1
        await db.execute(
            INSERT_TRANSFER, update.id, update.status, debit, credit, update.quantity, self.key, update.payload,
            bytes.fromhex(update.signature), self.batch, now,
        )
        # Last, and in the order of their numbers: some funds are hot, and no two tasks may wait for each other.
        paid = "-" + update.quantity
        if to_partner:
            changes = [(connection, "0", paid, update.quantity)]
        else:
            changes = sorted([(client, update.quantity, "0", "0"), (connection, "0", paid, "0")])
        for funds, available, held, allocated in changes:
            await db.execute(UPDATE_FUNDS, funds, available, held, allocated)
        return event


def properties_text(message):
    """Properties and headers as the worker keeps them, as far as these types tell them apart."""

    def value(header):
        if isinstance(header, bool):
            return {"Boolean": header}
        if isinstance(header, int):
            return {"LongLongInt": header}
        if isinstance(header, dict):
            return {"Table": {name: value(inner) for name, inner in header.items()}}
        if isinstance(header, list):
            return {"Array": [value(inner) for inner in header]}
        raw = header if isinstance(header, bytes) else str(header).encode()
        return {"LongString": raw.hex()}

    kept = {
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": {name: value(header) for name, header in sorted(message.headers.items())} or None,
        "delivery_mode": message.delivery_mode and int(message.delivery_mode),
        "priority": message.priority,
        "correlation_id": message.correlation_id,
        "reply_to": message.reply_to,
        "message_id": message.message_id,
        "user_id": message.user_id,
        "app_id": message.app_id,
    }
    return json.dumps({name: text for name, text in kept.items() if text is not None}, separators=(",", ":"))


# Publishing -----------------------------------------------------------------------------------------------------------

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
DROPPED = re.compile(r"CC|BCC|x-delivery-count|x-death|(x-first-death-|x-last-death-|settled-).*", re.DOTALL)


def event_message(message, event):
    trace = message.headers.get("traceparent")
    valid = isinstance(trace, str) and TRACEPARENT.fullmatch(trace)
    return aio_pika.Message(
        orjson.dumps(event),
        content_type="application/cloudevents+json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=event["id"],
        headers={"traceparent": trace} if valid else None,
    )


def dead_letter(message, facts, refusal, event):
    headers = {name: value for name, value in message.headers.items() if not DROPPED.fullmatch(name)}
    code, final = REASONS[refusal.reason]
    if message.user_id is not None:
        headers["settled-origin-user-id"] = message.user_id
    if message.expiration is not None:
        headers["settled-origin-expiration"] = str(int(message.expiration * 1000))
    headers |= {
        "settled-reason": refusal.reason,
        "settled-class": code,
        "settled-final": final,
        "settled-detail": refusal.detail,
        "settled-digest": facts.digest.hex(),
        "settled-failed-at": event["time"],
        "settled-origin-exchange": message.exchange or "",
        "settled-origin-routing-key": message.routing_key,
    }
    return aio_pika.Message(
        message.body,
        headers=headers,
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        priority=message.priority,
        correlation_id=message.correlation_id,
        reply_to=message.reply_to,
        message_id=message.message_id,
        timestamp=message.timestamp,
        type=message.type,
        app_id=message.app_id,
    )


class Worker:
    def __init__(self, events, dead):
        self.events, self.dead = events, dead
        self.waiting = asyncio.Queue()

    async def handle(self, db):
        while True:
            message = await self.waiting.get()
            if message is None:
                return
            await self.settle(db, message)

    async def settle(self, db, message):
        facts = Facts(message)
        refusal = facts.refusal
        if refusal:
            now = datetime.now(timezone.utc)
            event = refusal_event("update.rejected", message, facts, refusal.reason, refusal.detail, now)
        else:
            event, refusal = await self.judge(db, message, facts)
        publishing = []
        if event:
            key = event["type"] if facts.enterprise_id is None else f"{event['type']}.{facts.enterprise_id}"
            publishing.append(self.events.publish(event_message(message, event), key, mandatory=False))
        # The broker itself dead-letters what is too large.
        too_large = refusal is not None and refusal.reason == "message_too_large"
        if refusal and not too_large:
            dead = dead_letter(message, facts, refusal, event)
            publishing.append(self.dead.publish(dead, message.routing_key, mandatory=True))
        if len(publishing) == 1:
            await publishing[0]
        else:
            await asyncio.gather(*publishing)
        if too_large:
            await message.reject(requeue=False)
        else:
            await message.ack()

    async def judge(self, db, message, facts):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with db.transaction():
                    return await Judge(db, message, facts).judge()
            except PASSES:
                if attempt == ATTEMPTS:
                    raise


async def main():
    database, broker = os.environ.get("SETTLED_DATABASE_URL"), os.environ.get("SETTLED_BROKER_URL")
    if not database or not broker:
        sys.exit("set SETTLED_DATABASE_URL and SETTLED_BROKER_URL")
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    # One for each handler: asyncpg's pool asks the server to reset a connection whenever it comes back.
    settings = {"application_name": "per-message python", "statement_timeout": "10s", "lock_timeout": "5s"}
    databases = await asyncio.gather(*(asyncpg.connect(database, server_settings=settings) for _ in range(HANDLERS)))
    connection = await aio_pika.connect(broker, client_properties={"connection_name": "per-message python"})
    publishing = await connection.channel(publisher_confirms=True, on_return_raises=True)
    worker = Worker(
        await publishing.get_exchange("settlement.events", ensure=False),
        await publishing.get_exchange("settlement.dead", ensure=False),
    )
    intake = await connection.channel()
    await intake.set_qos(PREFETCH)
    queue = await intake.get_queue("settlement.updates")
    handlers = [asyncio.create_task(worker.handle(db)) for db in databases]
    tag = await queue.consume(worker.waiting.put)
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([stopped, *handlers], return_when=asyncio.FIRST_COMPLETED)
    if stopped not in done:
        # A handler ends by itself only with an error: the rest is the supervisor's, nothing is lost.
        for handler in done:
            handler.result()
    await queue.cancel(tag)
    # What was handed out but not begun goes back to the queue with the connection.
    while not worker.waiting.empty():
        worker.waiting.get_nowait()
    for _ in handlers:
        worker.waiting.put_nowait(None)
    async with asyncio.timeout(STOP_SECONDS):
        await asyncio.gather(*handlers)
        await connection.close()
        await asyncio.gather(*(db.close() for db in databases))


if __name__ == "__main__":
    uvloop.run(main())
