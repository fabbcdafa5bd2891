// The settlement worker as a Node engineer would write it: amqplib and pg, a message at a time, 16 at once.
//
// For comparison only, see ../README.md. Steps and names follow the Rust per-message worker, benches/bench/per_message.rs.

import { createHash, randomUUID } from "node:crypto";
import { createRequire } from "node:module";
import amqp from "amqplib";
import pg from "pg";

// Its pure fallback is many times slower, and would be what is measured.
const secp256k1 = createRequire(import.meta.url)("secp256k1/bindings");

const HANDLERS = 16;
const PREFETCH = 256;
const ATTEMPTS = 8;
const STOP_MS = 30_000;
const SESSION = { application_name: "per-message node", statement_timeout: 10_000, lock_timeout: 5_000 };

const BODY_MAX = 262_144;
const PROPERTIES_MAX = 16_384;
const DEPTH_MAX = 16;
const NONCE_MAX = 256;
const EXTERNAL_ID_MAX = 1024;
const REJECT_REASON_MAX = 16_384;
const PARK_DEADLINE_MS = 15 * 60_000;
const PARK_FIRST_RETRY_MS = 500;
const PARK_MAX_PER_PARTNER = 10_000n;
const NAMESPACE = Buffer.from("6f1d0c520e0b5c7e9a533c1c8a2d7f10", "hex");
const GROUP_ORDER = Buffer.from("fffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141", "hex");
const HALF_ORDER = Buffer.from("7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0", "hex");
const ZERO = Buffer.alloc(32);

// Reason: class, and whether it is final.
const REASONS = {
  message_too_large: [400, true],
  malformed_message: [400, true],
  invalid_field: [400, true],
  unknown_partner: [401, false],
  sender_mismatch: [403, false],
  malformed_signature: [401, true],
  signature_mismatch: [401, false],
  payload_mismatch: [400, true],
  nonce_reused: [409, true],
  policy_contradiction: [400, false],
  partner_inactive: [403, false],
  allocation_not_found: [404, false],
  not_permitted: [403, true],
  allocation_mismatch: [409, true],
  already_settled: [409, true],
};

// A name makes it a prepared statement, kept by each connection.
const sql = (name, text) => ({ name, text });
const LOAD_ALLOCATIONS = sql("load_allocations", `
  SELECT a.id, a.type, a.status, a.currency, a.quantity::text AS quantity, a.connection_id, a.client_id,
         a.client_external_id, a.initiated_by, a.notes, a.reason, a.retriable, a.partner_external_id, a.evaluation_id,
         a.pending_approval_id, a.policy_result, a.settled_nonce, a.created_at, a.updated_at,
         a.client_funds, a.connection_funds,
         c.enterprise_id, c.partners_client_id, c.partners_connection_id
  FROM settled.allocations AS a
  JOIN settled.connections AS c ON c.connection_id = a.connection_id
  WHERE a.id = ANY ($1::uuid[])
  ORDER BY a.id
  FOR NO KEY UPDATE OF a`);
const LOAD_RECEIPTS = sql("load_receipts", `
  SELECT r.key, r.payload_digest, r.verdict, r.reason, r.allocation_id, r.public_key, p.key IS NOT NULL AS waits
  FROM settled.receipts AS r
  LEFT JOIN settled.parked AS p ON p.key = r.key
  WHERE r.key = ANY ($1::uuid[])
  ORDER BY r.key
  FOR NO KEY UPDATE OF r`);
const LOAD_PARTNER = sql("load_partner", `
  SELECT t.now, p.enterprise_id, p.broker_user, p.suspended_at IS NOT NULL AS suspended,
         p.async_allocations, p.async_deallocations, k.public_key
  FROM (SELECT date_trunc('milliseconds', clock_timestamp()) AS now) AS t
  LEFT JOIN settled.partners AS p ON p.enterprise_id = $1
  LEFT JOIN settled.partner_keys AS k
    ON k.enterprise_id = p.enterprise_id
   AND k.revoked_at IS NULL
   AND k.valid_from <= clock_timestamp()
   AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())`);
const LOCK_PARKING = sql("lock_parking", "SELECT pg_advisory_xact_lock(7236102, hashtext($1::text))");
const COUNT_PARKED = sql("count_parked", "SELECT count(*) FROM settled.parked WHERE enterprise_id = $1");
const UPDATE_ALLOCATION = sql("update_allocation", `
  UPDATE settled.allocations
  SET status = $2, reason = $3, retriable = false, partner_external_id = $4, evaluation_id = $5,
      pending_approval_id = $6, policy_result = $7, settled_nonce = $8, updated_at = $9
  WHERE id = $1
    AND status = 'reserved'`);
const INSERT_RECEIPT = sql("insert_receipt", `
  INSERT INTO settled.receipts (
      key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id, public_key,
      first_seen, last_seen, batch_id
  )
  VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $11, $12)`);
const UPDATE_RECEIPT = sql("update_receipt", `
  UPDATE settled.receipts
  SET message_digest = $2, verdict = $3, reason = $4, allocation_id = $5, event_id = $6, public_key = $7,
      last_seen = $8,
      batch_id = CASE WHEN (verdict, event_id) IS DISTINCT FROM ($3, $6) THEN $9 ELSE batch_id END
  WHERE key = $1`);
const TOUCH_RECEIPT = sql("touch_receipt", "UPDATE settled.receipts SET last_seen = $2 WHERE key = $1");
const INSERT_TRANSFER = sql("insert_transfer", `
  INSERT INTO settled.transfers (
      subject_id, step, event, debit_account, credit_account, amount, receipt_key, payload, signature, batch_id,
      created_at
  )
  VALUES ($1, 1, $2, $3, $4, $5::text::numeric(78, 0), $6, $7, $8, $9, $10)`);
const UPDATE_FUNDS = sql("update_funds", `
  UPDATE settled.funds
  SET available = available + $2::text::numeric,
      held = held + $3::text::numeric,
      allocated = allocated + $4::text::numeric
  WHERE id = $1`);
const PARK = sql("park", `
  INSERT INTO settled.parked (
      key, enterprise_id, nonce, allocation_id, exchange, routing_key, format, properties, body, parked_at, until,
      attempts, due_at
  )
  VALUES ($1, $2, $3, $4, $5, $6, 1, $7, $8, $9, $10, 0, $11)`);
const INSERT_PARKING = sql(
  "insert_parking", "INSERT INTO settled.parkings (key, allocation_id, step, at) VALUES ($1, $2, 'parked', $3)");

// A fault of two tasks that met: a deadlock, a serialization failure, a lock timeout, or a row that the other wrote first.
const PASSES = new Set(["40P01", "40001", "55P03", "23505"]);

class Refused extends Error {
  constructor(reason, detail) {
    super(reason);
    this.reason = reason;
    this.detail = detail;
  }
}

const invalid = (name, sentence) => new Refused("invalid_field", `${name}: ${sentence}`);

// Bytes to facts ------------------------------------------------------------------------------------------------------

const ROUTING_KEY = /^([A-Za-z0-9][A-Za-z0-9_-]{0,63})\.(allocation|deallocation)\.update$/;
const CONTENT_TYPE = /^application\/json([ \t]*;[ \t]*charset=(utf-8|"utf-8")[ \t]*)?$/i;
const CURRENCY = /^[A-Za-z0-9:._-]{1,64}$/;
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

// A number is its literal text: numbers are compared by it.
class Numeral {
  constructor(text) {
    this.text = text;
  }
}

class NotJson extends Error {}

// One document, objects as maps. JSON.parse alone keeps the last of two equal keys and forgets how a number was written.
function readJson(text) {
  if (text.charCodeAt(0) === 0xfeff) throw new NotJson("begins with a byte-order mark");
  try {
    JSON.parse(text);
  } catch {
    throw new NotJson("is not well-formed JSON");
  }
  return new Reader(text).value(1);
}

// Reads what JSON.parse has found well-formed.
class Reader {
  constructor(text) {
    this.text = text;
    this.at = 0;
  }

  // The next character that is not white space.
  next() {
    for (;;) {
      const code = this.text.charCodeAt(this.at);
      if (code !== 32 && code !== 10 && code !== 13 && code !== 9) return code;
      this.at += 1;
    }
  }

  value(depth) {
    switch (this.next()) {
      case 0x7b:
        return this.object(depth);
      case 0x5b:
        return this.array(depth);
      case 0x22:
        return this.string();
      default:
        return this.scalar();
    }
  }

  object(depth) {
    if (depth > DEPTH_MAX) throw new NotJson(`is nested deeper than ${DEPTH_MAX}`);
    const members = new Map();
    this.at += 1;
    if (this.next() === 0x7d) {
      this.at += 1;
      return members;
    }
    for (;;) {
      this.next();
      const key = this.string();
      if (members.has(key)) throw new NotJson("has the same key twice in one object");
      this.next();
      this.at += 1;
      members.set(key, this.value(depth + 1));
      const code = this.next();
      this.at += 1;
      if (code === 0x7d) return members;
    }
  }

  array(depth) {
    if (depth > DEPTH_MAX) throw new NotJson(`is nested deeper than ${DEPTH_MAX}`);
    const elements = [];
    this.at += 1;
    if (this.next() === 0x5d) {
      this.at += 1;
      return elements;
    }
    for (;;) {
      elements.push(this.value(depth + 1));
      const code = this.next();
      this.at += 1;
      if (code === 0x5d) return elements;
    }
  }

  string() {
    const begin = this.at;
    let end = this.text.indexOf('"', begin + 1);
    let escape = this.text.indexOf("\\", begin + 1);
    if (escape === -1 || escape > end) {
      this.at = end + 1;
      return this.text.slice(begin + 1, end);
    }
    end = escape;
    while (this.text[end] !== '"') end += this.text[end] === "\\" ? 2 : 1;
    this.at = end + 1;
    const text = JSON.parse(this.text.slice(begin, end + 1));
    if (!text.isWellFormed()) throw new NotJson("has a lone surrogate in a string");
    return text;
  }

  scalar() {
    const begin = this.at;
    while (this.at < this.text.length && !",]} \n\r\t".includes(this.text[this.at])) this.at += 1;
    const text = this.text.slice(begin, this.at);
    switch (text) {
      case "true":
        return true;
      case "false":
        return false;
      case "null":
        return null;
      default:
        return new Numeral(text);
    }
  }
}

function equal(left, right) {
  if (left instanceof Map) {
    if (!(right instanceof Map) || left.size !== right.size) return false;
    for (const [key, value] of left) if (!right.has(key) || !equal(value, right.get(key))) return false;
    return true;
  }
  if (Array.isArray(left)) {
    return Array.isArray(right) && left.length === right.length && left.every((value, at) => equal(value, right[at]));
  }
  if (left instanceof Numeral) return right instanceof Numeral && left.text === right.text;
  return left === right;
}

const sha256 = (data) => createHash("sha256").update(data).digest();
const parseUuid = (text) => (UUID.test(text) ? text.toLowerCase() : null);

function parsePolicy(text) {
  const lower = text.toLowerCase();
  return lower === "approved" || lower === "rejected" ? lower : null;
}

function required(object, name, fullName = name) {
  const value = object.get(name);
  if (value === undefined) throw invalid(fullName, "is missing");
  return value;
}

function textOf(value, name) {
  if (typeof value !== "string") throw invalid(name, "must be a string");
  if (value.includes("\0")) throw invalid(name, "must not contain U+0000");
  return value;
}

function bounded(value, name, most) {
  const text = textOf(value, name);
  if (text === "" || Buffer.byteLength(text) > most) throw invalid(name, `must be 1 to ${most} bytes`);
  return text;
}

function uuidOf(value, name) {
  const found = parseUuid(textOf(value, name));
  if (found === null) throw invalid(name, "must be a UUID of 36 characters, 8-4-4-4-12");
  return found;
}

const partnersIdField = (kind) => (kind === "allocation" ? "partnersAllocationId" : "partnersDeallocationId");

function decode(body, enterpriseId, kind) {
  const update = { enterpriseId, kind, rejectReason: null, evaluationId: null, pendingApprovalId: null, policyResult: null };
  update.id = uuidOf(required(body, `${kind}Id`), `${kind}Id`);
  const amount = required(body, "amount");
  if (!(amount instanceof Map)) throw invalid("amount", "must be an object");
  update.currency = textOf(required(amount, "currency", "amount.currency"), "amount.currency");
  if (!CURRENCY.test(update.currency)) throw invalid("amount.currency", "must be 1 to 64 bytes of [A-Za-z0-9:._-]");
  update.quantity = textOf(required(amount, "quantity", "amount.quantity"), "amount.quantity");
  if (!/^[0-9]+$/.test(update.quantity)) throw invalid("amount.quantity", "must be decimal digits");
  if (update.quantity[0] === "0") throw invalid("amount.quantity", "must be at least 1 and have no leading zeros");
  if (update.quantity.length > 78 || BigInt(update.quantity) >= 1n << 256n) {
    throw invalid("amount.quantity", "must be at most 2^256-1");
  }
  update.clientId = uuidOf(required(body, "clientId"), "clientId");
  update.connectionId = uuidOf(required(body, "connectionId"), "connectionId");
  for (const name of ["partnersClientId", "partnersConnectionId"]) {
    update[name] = bounded(required(body, name), name, EXTERNAL_ID_MAX);
  }
  const partnersId = partnersIdField(kind);
  update.partnersId = bounded(required(body, partnersId), partnersId, EXTERNAL_ID_MAX);
  update.status = textOf(required(body, "status"), "status");
  if (update.status !== "cleared" && update.status !== "released") {
    throw invalid("status", "must be cleared or released");
  }
  update.nonce = bounded(required(body, "nonce"), "nonce", NONCE_MAX);
  if (update.status === "released") {
    update.rejectReason = bounded(required(body, "rejectReason"), "rejectReason", REJECT_REASON_MAX);
  } else if (body.has("rejectReason")) {
    throw invalid("rejectReason", "must be absent when the status is cleared");
  }
  for (const name of ["evaluationId", "pendingApprovalId"]) {
    if (body.has(name)) update[name] = bounded(body.get(name), name, EXTERNAL_ID_MAX);
  }
  if (body.has("policyResult")) {
    update.policyResult = parsePolicy(textOf(body.get("policyResult"), "policyResult"));
    if (update.policyResult === null) throw invalid("policyResult", "must be approved or rejected");
  }
  update.payload = textOf(required(body, "payload"), "payload");
  if (update.payload === "") throw invalid("payload", "must not be empty");
  update.signature = textOf(required(body, "signature"), "signature");
  return update;
}

const MAGIC = Buffer.from("\x18Bitcoin Signed Message:\n");

function varint(number) {
  if (number < 0xfd) return Buffer.from([number]);
  const bytes = Buffer.alloc(number <= 0xffff ? 3 : 5);
  if (number <= 0xffff) {
    bytes[0] = 0xfd;
    bytes.writeUInt16LE(number, 1);
  } else {
    bytes[0] = 0xfe;
    bytes.writeUInt32LE(number, 1);
  }
  return bytes;
}

// The key that made the signature, null where no point can be recovered; throws if it is malformed.
function signer(payload, signature) {
  const malformed = (detail) => new Refused("malformed_signature", `signature: ${detail}`);
  if (/^0x/i.test(signature)) throw malformed("must be bare hexadecimal, without 0x");
  if (!/^[0-9a-fA-F]{130}$/.test(signature)) {
    throw malformed("must be exactly 130 hexadecimal characters: header, r, s");
  }
  const bytes = Buffer.from(signature, "hex");
  const header = bytes[0];
  if (header >= 27 && header <= 30) {
    throw malformed("the header must be 31 to 34: 27 to 30 are for uncompressed keys");
  }
  if (header < 31 || header > 34) throw malformed("the header must be 31 to 34: 27 + 4 + recovery id");
  const [r, s] = [bytes.subarray(1, 33), bytes.subarray(33)];
  if (r.equals(ZERO) || r.compare(GROUP_ORDER) >= 0) {
    throw malformed("r must be at least 1 and less than the order of the group");
  }
  if (s.equals(ZERO)) throw malformed("s must be at least 1");
  if (s.compare(HALF_ORDER) > 0) throw malformed("s must be at most half of the order of the group (low S)");
  const digest = sha256(sha256(Buffer.concat([MAGIC, varint(payload.length), payload])));
  try {
    return Buffer.from(secp256k1.ecdsaRecover(bytes.subarray(1), header - 31, digest, true));
  } catch {
    return null;
  }
}

const equalRead = (read) => (left, right) => {
  if (typeof left !== "string" || typeof right !== "string") return false;
  const value = read(left);
  return value !== null && value === read(right);
};

// Field: how payload and body are compared, and whether it must be signed.
const namedFields = (kind) =>
  new Map([
    [`${kind}Id`, [equalRead(parseUuid), true]],
    ["amount", [equal, true]],
    ["clientId", [equalRead(parseUuid), true]],
    ["connectionId", [equalRead(parseUuid), true]],
    ["partnersClientId", [equal, true]],
    ["partnersConnectionId", [equal, true]],
    [partnersIdField(kind), [equal, true]],
    ["status", [equal, true]],
    ["nonce", [equal, true]],
    ["rejectReason", [equal, true]],
    ["evaluationId", [equal, false]],
    ["pendingApprovalId", [equal, false]],
    ["policyResult", [equalRead(parsePolicy), false]],
  ]);
const NAMED = { allocation: namedFields("allocation"), deallocation: namedFields("deallocation") };

// Where the signed text and the body differ; null if they agree.
function disagreement(payload, body, update) {
  const named = NAMED[update.kind];
  for (const [name, [equals, mustBeSigned]] of named) {
    const [signed, said] = [payload.get(name), body.get(name)];
    if (signed === undefined) {
      if (said !== undefined && mustBeSigned) return `${name}: is in the body, but not in the payload`;
    } else if (said === undefined) {
      return `${name}: is in the payload, but not in the body`;
    } else if (!equals(signed, said)) {
      return `${name}: differs between the payload and the body`;
    }
  }
  for (const [key, signed] of payload) {
    if (named.has(key) || (body.has(key) && equal(signed, body.get(key)))) continue;
    if (key !== "enterpriseId") {
      return "an undocumented key of the payload is not in the body, or has another value there";
    }
    if (signed !== update.enterpriseId) return "enterpriseId: differs between the payload and the routing key";
  }
  return null;
}

const hyphenated = (bytes) => bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");

function receiptKey(enterpriseId, nonce) {
  return hyphenated(sha256(`${enterpriseId}\0${nonce}`).subarray(0, 16));
}

// All that a message tells by itself.
function factsOf(message) {
  const routingKey = message.fields.routingKey;
  const address = ROUTING_KEY.exec(routingKey);
  const facts = {
    digest: sha256(message.content).toString("hex"),
    enterpriseId: address ? address[1] : null,
    update: null,
    refusal: null,
  };
  try {
    read(message, address, facts);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    facts.update = null;
    facts.refusal = error;
  }
  return facts;
}

function read(message, address, facts) {
  const { content, properties } = message;
  if (content.length > BODY_MAX) {
    const detail = `the body has ${content.length} bytes, at most ${BODY_MAX} are allowed`;
    throw new Refused("message_too_large", detail);
  }
  const size = propertiesSize(properties);
  if (size > PROPERTIES_MAX) {
    const detail = `properties and headers have ${size} bytes, at most ${PROPERTIES_MAX} are allowed`;
    throw new Refused("message_too_large", detail);
  }
  const malformed = (detail) => new Refused("malformed_message", detail);
  if (!address) {
    throw malformed(
      "the routing key must be <enterpriseId>.allocation.update or <enterpriseId>.deallocation.update");
  }
  if (properties.contentType && !CONTENT_TYPE.test(properties.contentType)) {
    throw malformed("content_type must be application/json, with no charset but utf-8");
  }
  if (properties.contentEncoding && properties.contentEncoding !== "identity") {
    throw malformed("content_encoding must be absent, empty or identity");
  }
  let text;
  try {
    text = UTF8.decode(content);
  } catch {
    throw malformed("the body is not UTF-8");
  }
  let body;
  try {
    body = readJson(text);
  } catch (error) {
    if (!(error instanceof NotJson)) throw error;
    throw malformed(`the body ${error.message}`);
  }
  if (!(body instanceof Map)) throw malformed("the body is not a JSON object");
  const update = decode(body, address[1], address[2]);
  facts.update = update;
  const payload = Buffer.from(update.payload);
  facts.payloadDigest = sha256(payload);
  facts.signedNonce = null;
  facts.signedIds = [];
  facts.mismatch = null;
  try {
    const signed = readJson(update.payload);
    if (!(signed instanceof Map)) throw new NotJson("is not a JSON object");
    facts.signedNonce = whereValid(() => bounded(required(signed, "nonce"), "nonce", NONCE_MAX));
    for (const name of ["allocationId", "deallocationId"]) {
      const id = whereValid(() => uuidOf(required(signed, name), name));
      if (id !== null) facts.signedIds.push(id);
    }
    facts.mismatch = disagreement(signed, body, update);
  } catch (error) {
    if (!(error instanceof NotJson)) throw error;
    facts.mismatch = `the payload ${error.message}`;
  }
  facts.key = null;
  facts.malformed = null;
  try {
    facts.key = signer(payload, update.signature);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    facts.malformed = error;
  }
}

function whereValid(reading) {
  try {
    return reading();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return null;
  }
}

function propertiesSize(properties) {
  const texts = [
    properties.contentType, properties.contentEncoding, properties.correlationId, properties.replyTo,
    properties.expiration, properties.messageId, properties.type, properties.userId, properties.appId,
    properties.clusterId,
  ];
  const short = texts.reduce((sum, text) => sum + (text === undefined ? 0 : Buffer.byteLength(text) + 1), 0);
  const { "x-delivery-count": _, ...headers } = properties.headers ?? {};
  return short + valueSize(headers);
}

// Bytes of a header's value on the wire, near enough: amqplib does not say which integer it was.
function valueSize(value) {
  if (typeof value === "string") return Buffer.byteLength(value) + 5;
  if (Buffer.isBuffer(value)) return value.length + 5;
  if (Array.isArray(value)) return value.reduce((sum, inner) => sum + valueSize(inner), 5);
  if (value !== null && typeof value === "object") {
    return Object.entries(value).reduce((sum, [name, inner]) => sum + name.length + 1 + valueSize(inner), 5);
  }
  return typeof value === "number" ? 9 : 2;
}

// Judgement -----------------------------------------------------------------------------------------------------------

function eventId(name) {
  const bytes = createHash("sha1").update(NAMESPACE).update(name).digest().subarray(0, 16);
  bytes[6] = (bytes[6] & 0x0f) | 0x50;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  return hyphenated(bytes);
}

const orAbsent = (value) => value ?? undefined;

// From the record alone: every copy is identical.
function settlementEvent(allocation) {
  const type = `${allocation.type}.${allocation.status}`;
  const updatedAt = allocation.updated_at.toISOString();
  return {
    specversion: "1.0",
    id: eventId(`${type}|${allocation.id}`),
    source: "/settled",
    type,
    subject: allocation.id,
    time: updatedAt,
    datacontenttype: "application/json",
    data: {
      allocation: {
        id: allocation.id,
        amount: { currency: allocation.currency, quantity: allocation.quantity },
        connectionId: allocation.connection_id,
        clientExternalId: allocation.client_external_id,
        partnerExternalId: orAbsent(allocation.partner_external_id),
        initiatedBy: allocation.initiated_by,
        notes: orAbsent(allocation.notes),
        createdAt: allocation.created_at.toISOString(),
        updatedAt,
        retriable: allocation.retriable,
        evaluationId: orAbsent(allocation.evaluation_id),
        pendingApprovalId: orAbsent(allocation.pending_approval_id),
        policyResult: orAbsent(allocation.policy_result),
        reason: allocation.reason,
        status: allocation.status,
        type: allocation.type,
      },
      enterpriseId: allocation.enterprise_id,
      clientId: allocation.client_id,
      nonce: allocation.settled_nonce,
    },
  };
}

const refusalId = (type, message, facts, reason) =>
  eventId(`${type}|${message.fields.routingKey}|${facts.digest}|${reason}`);

function refusalEvent(type, message, facts, reason, detail, now, until) {
  const [code, final] = REASONS[reason];
  const update = facts.update;
  return {
    specversion: "1.0",
    id: refusalId(type, message, facts, reason),
    source: "/settled",
    type,
    subject: update?.id,
    time: now.toISOString(),
    datacontenttype: "application/json",
    data: {
      enterpriseId: facts.enterpriseId,
      reason,
      class: code,
      final,
      detail,
      allocationId: update?.id,
      nonce: update?.nonce,
      messageDigest: facts.digest,
      messageId: message.properties.messageId,
      parkedUntil: until?.toISOString(),
    },
  };
}

// The field in which the record differs.
function mismatchWith(allocation, update) {
  const settledAs = allocation.partner_external_id;
  const fields = [
    ["amount.currency", allocation.currency === update.currency],
    ["amount.quantity", allocation.quantity === update.quantity],
    ["clientId", allocation.client_id === update.clientId],
    ["connectionId", allocation.connection_id === update.connectionId],
    ["partnersClientId", allocation.partners_client_id === update.partnersClientId],
    ["partnersConnectionId", allocation.partners_connection_id === update.partnersConnectionId],
    [partnersIdField(update.kind), settledAs === null || settledAs === update.partnersId],
  ];
  return fields.find(([, same]) => !same)?.[0];
}

// One transaction's work: load, decide, write.
class Judge {
  constructor(db, message, facts) {
    this.db = db;
    this.message = message;
    this.facts = facts;
    this.update = facts.update;
    this.batch = randomUUID();
  }

  async run(statement, ...values) {
    return await this.db.query({ ...statement, values });
  }

  // The event that says what came of it (null: none is due), and the refusal if it was one.
  async judge() {
    try {
      return { event: await this.walk(), refusal: null };
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const event = refusalEvent(
        "update.rejected", this.message, this.facts, error.reason, error.detail, this.now);
      return { event, refusal: error };
    }
  }

  async walk() {
    const { update, facts } = this;
    const ids = [...new Set([update.id, ...facts.signedIds])];
    const allocations = new Map();
    for (const row of (await this.run(LOAD_ALLOCATIONS, ids)).rows) allocations.set(row.id, row);
    this.key = receiptKey(update.enterpriseId, update.nonce);
    const signedKey = receiptKey(update.enterpriseId, facts.signedNonce ?? update.nonce);
    const keys = [...new Set([this.key, signedKey])];
    const receipts = new Map();
    for (const row of (await this.run(LOAD_RECEIPTS, keys)).rows) receipts.set(row.key, row);
    let parkedCount = 0n;
    if (!allocations.has(update.id)) {
      await this.run(LOCK_PARKING, update.enterpriseId);
      parkedCount = BigInt((await this.run(COUNT_PARKED, update.enterpriseId)).rows[0].count);
    }
    const partner = (await this.run(LOAD_PARTNER, update.enterpriseId)).rows;
    this.now = partner[0].now;

    const settled = this.settledBefore(receipts.get(signedKey), allocations);
    if (settled) {
      await this.run(TOUCH_RECEIPT, signedKey, this.now);
      return settlementEvent(settled);
    }
    this.prove(partner);
    const receipt = receipts.get(this.key);
    if (receipt && !receipt.payload_digest.equals(facts.payloadDigest)) {
      throw new Refused("nonce_reused", "nonce: this partner used it with another payload");
    }
    const contradicts = update.status === "cleared" && update.policyResult === "rejected";
    if (receipt?.waits && !contradicts) return null;
    if (contradicts) {
      const detail = "policyResult: rejected contradicts the status cleared";
      return await this.refuse(receipt, "policy_contradiction", detail);
    }
    const inactive = this.inactive(partner[0]);
    if (inactive) return await this.refuse(receipt, "partner_inactive", inactive);
    const allocation = allocations.get(update.id);
    if (!allocation) return await this.park(receipt, parkedCount);
    if (allocation.enterprise_id !== update.enterpriseId) {
      return await this.refuse(receipt, "not_permitted", "the id belongs to another partner's connection");
    }
    if (allocation.type !== update.kind) {
      return await this.refuse(receipt, "not_permitted", `${update.kind}Id: the id is of the other type`);
    }
    const field = mismatchWith(allocation, update);
    if (field) return await this.refuse(receipt, "allocation_mismatch", `${field}: differs from the record`);
    if (allocation.status === update.status) {
      const event = settlementEvent(allocation);
      await this.putReceipt(receipt, "duplicate", null, event.id);
      return event;
    }
    if (allocation.status !== "reserved") {
      return await this.refuse(receipt, "already_settled", `it is ${allocation.status} already`);
    }
    return await this.settle(receipt, allocation);
  }

  settledBefore(receipt, allocations) {
    const { facts } = this;
    if (receipt?.verdict !== "settled" || !receipt.payload_digest.equals(facts.payloadDigest)) return undefined;
    if (facts.key === null || !receipt.public_key.equals(facts.key)) return undefined;
    return allocations.get(receipt.allocation_id);
  }

  prove(partner) {
    const { facts } = this;
    if (partner[0].enterprise_id === null) {
      throw new Refused("unknown_partner", "no partner of this enterprise id is registered");
    }
    const user = partner[0].broker_user;
    if (user !== null && this.message.properties.userId !== user) {
      const detail = "the user_id property is not the broker user that this partner is bound to";
      throw new Refused("sender_mismatch", detail);
    }
    if (facts.malformed) throw facts.malformed;
    if (facts.key === null) {
      const detail = "no public key can be recovered from the signature and the payload";
      throw new Refused("signature_mismatch", detail);
    }
    if (!partner.some((row) => row.public_key?.equals(facts.key))) {
      const detail = "the signature was made by no key of the partner that is valid now";
      throw new Refused("signature_mismatch", detail);
    }
    if (facts.mismatch) throw new Refused("payload_mismatch", facts.mismatch);
  }

  inactive(partner) {
    if (partner.suspended) return "the partner is suspended";
    const { kind } = this.update;
    return partner[`async_${kind}s`] ? null : `asynchronous ${kind}s are not enabled for the partner`;
  }

  async refuse(receipt, reason, detail) {
    const id = refusalId("update.rejected", this.message, this.facts, reason);
    await this.putReceipt(receipt, "rejected", reason, id);
    throw new Refused(reason, detail);
  }

  async putReceipt(earlier, verdict, reason, event) {
    const { update, facts, key, now, batch } = this;
    const digest = Buffer.from(facts.digest, "hex");
    // A receipt never leaves 'settled' or a final reason.
    if (earlier && (earlier.verdict === "settled" || REASONS[earlier.reason]?.[1])) {
      await this.run(TOUCH_RECEIPT, key, now);
    } else if (earlier) {
      await this.run(UPDATE_RECEIPT, key, digest, verdict, reason, update.id, event, facts.key, now, batch);
    } else {
      await this.run(
        INSERT_RECEIPT, key, update.enterpriseId, update.nonce, facts.payloadDigest, digest, verdict, reason,
        update.id, event, facts.key, now, batch);
    }
  }

  async park(receipt, count) {
    const { update, message, now } = this;
    const reason = "allocation_not_found";
    if (count >= PARK_MAX_PER_PARTNER) {
      const detail = "no allocation of this id, and too many of this partner's messages wait already";
      return await this.refuse(receipt, reason, detail);
    }
    const later = (milliseconds) => new Date(now.getTime() + milliseconds);
    const until = later(PARK_DEADLINE_MS);
    const detail = "no allocation of this id is reserved yet; it will be judged again";
    const event = refusalEvent("update.parked", message, this.facts, reason, detail, now, until);
    await this.putReceipt(receipt, "parked", reason, event.id);
    await this.run(
      PARK, this.key, update.enterpriseId, update.nonce, update.id, message.fields.exchange, message.fields.routingKey,
      propertiesText(message.properties), message.content, now, until, later(PARK_FIRST_RETRY_MS));
    await this.run(INSERT_PARKING, this.key, update.id, now);
    return event;
  }

  async settle(receipt, allocation) {
    const { update, now, batch } = this;
    const settled = {
      ...allocation,
      status: update.status,
      reason: update.rejectReason,
      retriable: false,
      partner_external_id: update.partnersId,
      evaluation_id: update.evaluationId,
      pending_approval_id: update.pendingApprovalId,
      policy_result: update.policyResult,
      settled_nonce: update.nonce,
      updated_at: now,
    };
    const event = settlementEvent(settled);
    const updated = await this.run(
      UPDATE_ALLOCATION, update.id, update.status, update.rejectReason, update.partnersId, update.evaluationId,
      update.pendingApprovalId, update.policyResult, update.nonce, now);
    if (updated.rowCount !== 1) throw new Error("an allocation left its state under our lock");
    await this.putReceipt(receipt, "settled", null, event.id);
    const toPartner = (update.kind === "allocation") === (update.status === "cleared");
    const client = BigInt(allocation.client_funds);
    const connection = BigInt(allocation.connection_funds);
    // Four accounts a row of funds: external, available, held, allocated.
    const debit = connection * 4n + 2n;
    const credit = toPartner ? connection * 4n + 3n : client * 4n + 1n;
    await this.run(
      INSERT_TRANSFER, update.id, update.status, debit, credit, update.quantity, this.key, update.payload,
      Buffer.from(update.signature, "hex"), batch, now);
    // Last, and in the order of their numbers: some funds are hot, and no two tasks may wait for each other.
    const paid = `-${update.quantity}`;
    const changes = toPartner
      ? [[connection, "0", paid, update.quantity]]
      : [[client, update.quantity, "0", "0"], [connection, "0", paid, "0"]];
    changes.sort(([left], [right]) => (left < right ? -1 : 1));
    for (const change of changes) await this.run(UPDATE_FUNDS, ...change);
    return event;
  }
}

// Properties and headers as the worker keeps them, as far as amqplib tells their types apart.
function propertiesText(properties) {
  const kept = (value) => {
    if (typeof value === "boolean") return { Boolean: value };
    if (typeof value === "number") return Number.isInteger(value) ? { LongLongInt: value } : { Double: value };
    if (Array.isArray(value)) return { Array: value.map(kept) };
    if (value !== null && typeof value === "object" && !Buffer.isBuffer(value)) {
      return { Table: Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, kept(inner)])) };
    }
    return { LongString: Buffer.from(value ?? "").toString("hex") };
  };
  const headers = properties.headers && Object.entries(properties.headers).sort();
  return JSON.stringify({
    content_type: properties.contentType,
    content_encoding: properties.contentEncoding,
    headers: headers && Object.fromEntries(headers.map(([name, value]) => [name, kept(value)])),
    delivery_mode: properties.deliveryMode,
    priority: properties.priority,
    correlation_id: properties.correlationId,
    reply_to: properties.replyTo,
    expiration: properties.expiration,
    message_id: properties.messageId,
    timestamp: properties.timestamp,
    kind: properties.type,
    user_id: properties.userId,
    app_id: properties.appId,
    cluster_id: properties.clusterId,
  });
}

// Publishing ----------------------------------------------------------------------------------------------------------

const TRACEPARENT = /^00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}$/;
const DROPPED = /^(CC|BCC|x-delivery-count|x-death|x-first-death-.*|x-last-death-.*|settled-.*)$/s;

// The broker's confirm, as a promise.
function published(channel, exchange, routingKey, body, options) {
  return new Promise((resolve, reject) => {
    channel.publish(exchange, routingKey, body, options, (error) => (error ? reject(error) : resolve()));
  });
}

function publishEvent(channel, message, facts, event) {
  const key = facts.enterpriseId === null ? event.type : `${event.type}.${facts.enterpriseId}`;
  const trace = message.properties.headers?.traceparent;
  return published(channel, "settlement.events", key, Buffer.from(JSON.stringify(event)), {
    contentType: "application/cloudevents+json",
    persistent: true,
    messageId: event.id,
    headers: typeof trace === "string" && TRACEPARENT.test(trace) ? { traceparent: trace } : undefined,
  });
}

function publishDeadLetter(channel, message, facts, refusal, event) {
  const { userId, expiration, ...properties } = message.properties;
  const headers = Object.fromEntries(
    Object.entries(properties.headers ?? {}).filter(([name]) => !DROPPED.test(name)));
  const [code, final] = REASONS[refusal.reason];
  if (userId !== undefined) headers["settled-origin-user-id"] = userId;
  if (expiration !== undefined) headers["settled-origin-expiration"] = expiration;
  Object.assign(headers, {
    "settled-reason": refusal.reason,
    "settled-class": { "!": "long", value: code },
    "settled-final": final,
    "settled-detail": refusal.detail,
    "settled-digest": facts.digest,
    "settled-failed-at": event.time,
    "settled-origin-exchange": message.fields.exchange,
    "settled-origin-routing-key": message.fields.routingKey,
  });
  const options = { ...properties, headers, persistent: true, deliveryMode: 2, mandatory: true };
  return published(channel, "settlement.dead", message.fields.routingKey, message.content, options);
}

class Worker {
  constructor(publishing) {
    this.publishing = publishing;
    this.waiting = [];
    this.idle = [];
    this.stopping = false;
  }

  put(message) {
    const idle = this.idle.shift();
    if (idle) idle(message);
    else this.waiting.push(message);
  }

  // What was handed out but not begun goes back to the queue with the connection.
  stop() {
    this.stopping = true;
    this.waiting = [];
    for (const idle of this.idle.splice(0)) idle(null);
  }

  async next() {
    if (this.stopping) return null;
    return this.waiting.shift() ?? (await new Promise((resolve) => this.idle.push(resolve)));
  }

  async work(db, intake) {
    for (let message = await this.next(); message; message = await this.next()) {
      await this.settle(db, intake, message);
    }
  }

  async settle(db, intake, message) {
    const facts = factsOf(message);
    let { refusal } = facts;
    let event;
    if (refusal) {
      event = refusalEvent("update.rejected", message, facts, refusal.reason, refusal.detail, new Date());
    } else {
      ({ event, refusal } = await judge(db, message, facts));
    }
    // The broker itself dead-letters what is too large.
    const tooLarge = refusal?.reason === "message_too_large";
    await Promise.all([
      event && publishEvent(this.publishing, message, facts, event),
      refusal && !tooLarge && publishDeadLetter(this.publishing, message, facts, refusal, event),
    ]);
    if (tooLarge) intake.reject(message, false);
    else intake.ack(message);
  }
}

async function judge(db, message, facts) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      await db.query("BEGIN");
      const judged = await new Judge(db, message, facts).judge();
      await db.query("COMMIT");
      return judged;
    } catch (error) {
      if (attempt === ATTEMPTS || !PASSES.has(error.code)) throw error;
      await db.query("ROLLBACK");
    }
  }
}

async function main() {
  const { SETTLED_DATABASE_URL: database, SETTLED_BROKER_URL: broker } = process.env;
  if (!database || !broker) throw new Error("set SETTLED_DATABASE_URL and SETTLED_BROKER_URL");
  const databases = Array.from(
    { length: HANDLERS },
    () => new pg.Client({ connectionString: database, ...SESSION }));
  await Promise.all(databases.map((db) => db.connect()));
  const connection = await amqp.connect(broker, { clientProperties: { connection_name: "per-message node" } });
  const publishing = await connection.createConfirmChannel();
  const intake = await connection.createChannel();
  await intake.prefetch(PREFETCH);
  const worker = new Worker(publishing);
  const broken = new Promise((_, reject) => {
    for (const part of [connection, publishing, intake, ...databases]) part.on("error", reject);
    publishing.on("return", () => reject(new Error("no queue takes dead letters")));
  });
  const stopped = new Promise((resolve) => {
    for (const name of ["SIGTERM", "SIGINT"]) process.on(name, resolve);
  });
  const handlers = Promise.all(databases.map((db) => worker.work(db, intake)));
  const { consumerTag } = await intake.consume("settlement.updates", (message) => worker.put(message), { noAck: false });
  await Promise.race([stopped, broken, handlers]);
  await intake.cancel(consumerTag);
  worker.stop();
  // A handler that hangs would hold up the exit; what it did not acknowledge comes again.
  setTimeout(() => process.exit(1), STOP_MS).unref();
  await Promise.race([handlers, broken]);
  await connection.close();
  await Promise.all(databases.map((db) => db.end()));
}

try {
  await main();
  process.exit(0);
} catch (error) {
  console.error(`the per-message worker broke off: ${error.message}`);
  process.exit(1);
}
