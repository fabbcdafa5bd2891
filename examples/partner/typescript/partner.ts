// A partner in TypeScript: sign an update with BitGo's message library, publish it with a confirm, wait for its outcome.
//
//   npm ci && npx tsc
//   echo '{"status":"cleared","allocationId":"..", ..}' | BROKER_URL=amqps://.. ENTERPRISE_ID=northwind PARTNER_KEY=<hex> node partner.js
//
// The fields stand in docs/partners.md. OWN_EXCHANGE=yes: the operator made an exchange and a queue for this partner.
// It prints the outcome's event; exit 0: settled, 1: refused, 2: nothing was heard.

import { createHash } from 'node:crypto';
import { text } from 'node:stream/consumers';
import process from 'node:process';
import message from '@bitgo-forks/bitcoinjs-message';
import amqp, { type ConsumeMessage } from 'amqplib';

function setting(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`set ${name}: the head of this file says to what`);
  return value;
}

const [BROKER_URL, ENTERPRISE_ID, PARTNER_KEY] = [setting('BROKER_URL'), setting('ENTERPRISE_ID'), setting('PARTNER_KEY')];
const PATIENCE = 30_000;

/** What is signed; quantities are text, for no number of JavaScript holds them. */
interface Update {
  status: 'cleared' | 'released';
  allocationId?: string;
  deallocationId?: string;
  amount: { currency: string; quantity: string };
  clientId: string;
  connectionId: string;
  partnersClientId: string;
  partnersConnectionId: string;
  nonce: string;
  [more: string]: unknown;
}

/** What of an event is read here; there is more, and there will be. */
interface OutcomeEvent {
  type: string;
  data: { nonce?: string; messageDigest?: string; allocation?: { id: string }; [more: string]: unknown };
}

/** The body. The payload is signed as the very text that travels in it. */
function signed(update: Update): Buffer {
  const payload = JSON.stringify(update);
  // The header says that the key is compressed: 31 or 32.
  const signature = message.sign(payload, Buffer.from(PARTNER_KEY, 'hex'), true).toString('hex');
  return Buffer.from(JSON.stringify({ ...update, payload, signature }));
}

/** By nonce, by the bytes that were sent, or by what they are about: a settlement keeps the nonce that settled it. */
function isAbout({ data }: OutcomeEvent, update: Update, digest: string): boolean {
  const id = (update.allocationId ?? update.deallocationId)?.toLowerCase();
  return data.nonce === update.nonce || data.messageDigest === digest || (!!id && data.allocation?.id === id);
}

/** One event, or an array of them where the operator chose so. */
function eventsOf(told: ConsumeMessage): OutcomeEvent[] {
  const read = JSON.parse(told.content.toString()) as OutcomeEvent | OutcomeEvent[];
  return Array.isArray(read) ? read : [read];
}

async function main(): Promise<number> {
  const update = JSON.parse(await text(process.stdin)) as Update;
  const body = signed(update);
  const digest = createHash('sha256').update(body).digest('hex');
  const kind = update.allocationId ? 'allocation' : 'deallocation';

  const connection = await amqp.connect(BROKER_URL);
  const channel = await connection.createConfirmChannel();
  let [exchange, outcomes] = [`settlement.updates.${ENTERPRISE_ID}`, `settlement.outcomes.${ENTERPRISE_ID}`];
  if (!process.env.OWN_EXCHANGE) {
    // A queue of one's own, bound before anything is sent: what is told from now on is kept there.
    [exchange, outcomes] = ['settlement.updates', `${ENTERPRISE_ID}.outcomes`];
    await channel.assertQueue(outcomes, { durable: true, arguments: { 'x-queue-type': 'quorum' } });
    await channel.bindQueue(outcomes, 'settlement.events', `*.*.${ENTERPRISE_ID}`);
  }

  const outcome = new Promise<OutcomeEvent | undefined>((resolve, reject) => {
    setTimeout(() => resolve(undefined), PATIENCE).unref();
    const hear = (told: ConsumeMessage | null): void => {
      if (!told) return resolve(undefined);
      const mine = eventsOf(told).filter((event) => isAbout(event, update, digest));
      channel.ack(told);
      const last = mine.find((event) => event.type !== 'update.parked');
      if (last) resolve(last);
    };
    channel.consume(outcomes, hear).catch(reject);
  });

  // What no queue takes comes back before it is confirmed.
  channel.once('return', () => {
    throw new Error('no queue takes it: run `settled topology`');
  });
  channel.publish(exchange, `${ENTERPRISE_ID}.${kind}.update`, body, {
    contentType: 'application/json',
    persistent: true,
    mandatory: true,
    messageId: update.nonce,
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
