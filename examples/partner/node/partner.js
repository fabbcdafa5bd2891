// @ts-check
// A partner in Node: sign an update with BitGo's message library, publish it with a confirm, wait for its outcome.
//
//   echo '{"status":"cleared","allocationId":"..", ..}' | BROKER_URL=amqps://.. ENTERPRISE_ID=northwind PARTNER_KEY=<hex> node partner.js
//
// The fields stand in docs/partners.md. OWN_EXCHANGE=yes: the operator made an exchange and a queue for this partner.
// It prints the outcome's event; exit 0: settled, 1: refused, 2: nothing was heard.

import { createHash } from 'node:crypto';
import { text } from 'node:stream/consumers';
import process from 'node:process';
import message from '@bitgo-forks/bitcoinjs-message';
import amqp from 'amqplib';

/** @param {string} name */
function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`set ${name}: the head of this file says to what`);
  return value;
}

const [BROKER_URL, ENTERPRISE_ID, PARTNER_KEY] = ['BROKER_URL', 'ENTERPRISE_ID', 'PARTNER_KEY'].map(setting);
const PATIENCE = 30_000;

/** The body. The payload is signed as the very text that travels in it.
 * @param {Record<string, any>} fields */
function signed(fields) {
  const payload = JSON.stringify(fields);
  // The header says that the key is compressed: 31 or 32.
  const signature = message.sign(payload, Buffer.from(PARTNER_KEY, 'hex'), true).toString('hex');
  return Buffer.from(JSON.stringify({ ...fields, payload, signature }));
}

/** By nonce, by the bytes that were sent, or by what they are about: a settlement keeps the nonce that settled it.
 * @param {any} event @param {Record<string, any>} fields @param {string} digest */
function isAbout({ data }, fields, digest) {
  const id = (fields.allocationId ?? fields.deallocationId).toLowerCase();
  return data.nonce === fields.nonce || data.messageDigest === digest || data.allocation?.id === id;
}

/** @param {any} told */
function eventsOf(told) {
  const read = JSON.parse(told.content.toString());
  return told.properties.contentType === 'application/cloudevents-batch+json' ? read : [read];
}

async function main() {
  const fields = JSON.parse(await text(process.stdin));
  const body = signed(fields);
  const digest = createHash('sha256').update(body).digest('hex');
  const kind = 'allocationId' in fields ? 'allocation' : 'deallocation';

  const connection = await amqp.connect(BROKER_URL);
  const channel = await connection.createConfirmChannel();
  let [exchange, outcomes] = [`settlement.updates.${ENTERPRISE_ID}`, `settlement.outcomes.${ENTERPRISE_ID}`];
  if (!process.env.OWN_EXCHANGE) {
    // A queue of one's own, bound before anything is sent: what is told from now on is kept there.
    [exchange, outcomes] = ['settlement.updates', `${ENTERPRISE_ID}.outcomes`];
    await channel.assertQueue(outcomes, { durable: true, arguments: { 'x-queue-type': 'quorum' } });
    await channel.bindQueue(outcomes, 'settlement.events', `*.*.${ENTERPRISE_ID}`);
  }

  /** @type {Promise<any>} */
  const outcome = new Promise((resolve) => {
    setTimeout(() => resolve(undefined), PATIENCE).unref();
    channel.consume(outcomes, (told) => {
      if (!told) return resolve(undefined);
      const mine = eventsOf(told).filter((/** @type {any} */ event) => isAbout(event, fields, digest));
      channel.ack(told);
      const last = mine.find((/** @type {any} */ event) => event.type !== 'update.parked');
      if (last) resolve(last);
    });
  });

  // What no queue takes comes back before it is confirmed.
  channel.once('return', () => {
    throw new Error('no queue takes it: run `settled topology`');
  });
  channel.publish(exchange, `${ENTERPRISE_ID}.${kind}.update`, body, {
    contentType: 'application/json',
    persistent: true,
    mandatory: true,
    messageId: fields.nonce,
    userId: decodeURIComponent(new URL(BROKER_URL).username),
  });
  await channel.waitForConfirms();
  console.error('published, and confirmed by the broker');

  const event = await outcome;
  if (event) console.log(JSON.stringify(event));
  else console.error("nothing for 30 s: see 'When there is silence' in docs/partners.md");
  await channel.close();
  await connection.close();
  return !event ? 2 : event.type === 'update.rejected' ? 1 : 0;
}

process.exitCode = await main();
