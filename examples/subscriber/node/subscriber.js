// @ts-check
// A subscriber in Node: every settlement counted once, however often it is told.
//
//   BROKER_URL=amqps://.. STORE=postgres://.. node subscriber.js QUEUE
//
// It reads both formats with the official CloudEvents SDK, and keeps the ids that it has seen in the same PostgreSQL database,
// and in the same transaction, as what it does with an event. STOP_AFTER=N ends it after N messages.

import process from 'node:process';
import amqp from 'amqplib';
import { HTTP } from 'cloudevents';
import pg from 'pg';

/** @param {string} name */
function setting(name) {
  const value = process.env[name];
  if (!value) throw new Error(`set ${name}: the head of this file says to what`);
  return value;
}

const [BROKER_URL, STORE, STOP_AFTER] = [setting('BROKER_URL'), setting('STORE'), process.env.STOP_AFTER ?? '0'];

const SCHEMA = `
  CREATE SCHEMA IF NOT EXISTS subscriber;
  CREATE TABLE IF NOT EXISTS subscriber.seen (id uuid PRIMARY KEY);
  CREATE TABLE IF NOT EXISTS subscriber.allocated (
    connection_id uuid, currency text, quantity numeric NOT NULL, PRIMARY KEY (connection_id, currency)
  )`;

// What a connection's allocated funds change by. PostgreSQL adds them up: a JavaScript number would round them.
/** @type {Record<string, string>} */
const SIGNS = { 'allocation.cleared': '', 'deallocation.cleared': '-' };

/** The events of a message, one or an array of them. The SDK has no binding for AMQP: its one for HTTP reads the same two
 * formats, each by its content type.
 * @param {amqp.ConsumeMessage} told */
function eventsOf(told) {
  const headers = { 'content-type': told.properties.contentType };
  const read = HTTP.toEvent({ headers, body: told.content.toString() });
  return Array.isArray(read) ? read : [read];
}

/** What this program does with an event, once. False: it was seen before.
 * @param {pg.Client} store @param {any} event */
async function take(store, event) {
  const { rowCount } = await store.query('INSERT INTO subscriber.seen VALUES ($1) ON CONFLICT DO NOTHING', [event.id]);
  if (!rowCount) return false;
  const sign = SIGNS[event.type];
  if (sign !== undefined) {
    const { connectionId, amount } = event.data.allocation;
    await store.query(
      `INSERT INTO subscriber.allocated AS a VALUES ($1, $2, $3::numeric)
       ON CONFLICT (connection_id, currency) DO UPDATE SET quantity = a.quantity + excluded.quantity`,
      [connectionId, amount.currency, sign + amount.quantity],
    );
  }
  return true;
}

/** All of a message in one transaction.
 * @param {pg.Client} store @param {amqp.ConsumeMessage} told */
async function takeAll(store, told) {
  await store.query('BEGIN');
  for (const event of eventsOf(told)) {
    const word = (await take(store, event)) ? 'new' : 'seen before';
    console.log(event.type, event.id, word);
  }
  await store.query('COMMIT');
}

const queue = process.argv[2] ?? '';
const store = new pg.Client(STORE);
await store.connect();
await store.query(SCHEMA);
const connection = await amqp.connect(BROKER_URL);
const channel = await connection.createChannel();
await channel.assertQueue(queue, { durable: true, arguments: { 'x-queue-type': 'quorum' } });
await channel.bindQueue(queue, 'settlement.events', '#');
// One at a time: the transaction of each ends before the next begins.
await channel.prefetch(1);
let left = Number(STOP_AFTER);
await new Promise((resolve, reject) => {
  channel.consume(queue, (told) => {
    if (!told) return resolve(undefined);
    // Acknowledged once it is committed: until then it comes again as a whole.
    takeAll(store, told).then(() => {
      channel.ack(told);
      if (--left === 0) resolve(undefined);
    }, reject);
  });
});
await channel.close();
await connection.close();
await store.end();
