// @ts-check
// A partner whose client is BitGo's SDK, with another host: the trading account's user key signs, the SDK's HTTP client sends.
//
//   echo '{"status":"cleared","allocationId":"..", ..}' | API_URL=https://oes.example API_TOKEN=stl_.. ENTERPRISE_ID=northwind \
//     ENCRYPTED_PRV='{"iv":..}' WALLET_PASSPHRASE=.. node partner.js
//   WALLET_PASSPHRASE=.. node partner.js new-key
//
// The fields stand in docs/partners.md. It prints the answer; exit 0: settled, 1: refused, 2: not known yet, send the same again.
// new-key prints a key as BitGo keeps one: `pub` is for the operator, `encryptedPrv` for you.

import { text } from 'node:stream/consumers';
import process from 'node:process';
import { BitGoAPI } from '@bitgo/sdk-api';
import { coins, Wallet } from '@bitgo/sdk-core';

const { API_URL = 'http://localhost:9465', API_TOKEN = '', ENTERPRISE_ID = '' } = process.env;
const { ENCRYPTED_PRV = '', WALLET_PASSPHRASE = '' } = process.env;

const bitgo = new BitGoAPI({
  customRootURI: API_URL,
  accessToken: API_TOKEN,
  // Without these it asks the host for BitGo's constants, which nobody needs here.
  clientConstants: {},
});
bitgo.register('ofc', coins.Ofc.createInstance);

/** Signs with the user key, here: nothing of it is sent anywhere.
 * @param {string} payload */
async function sign(payload) {
  // BitGo has a longer record of a trading account. To sign, the SDK needs no more of it.
  const wallet = new Wallet(bitgo, bitgo.coin('ofc'), { id: 'trading', enterprise: ENTERPRISE_ID, keys: [] });
  const prv = await bitgo.decrypt({ input: ENCRYPTED_PRV, password: WALLET_PASSPHRASE });
  // With the passphrase instead of the key it would ask the host for the encrypted key, which only BitGo has.
  return wallet.toTradingAccount().signPayload({ payload, prv });
}

/** @param {Record<string, any>} fields */
async function update(fields) {
  const kind = 'allocationId' in fields ? 'allocations' : 'deallocations';
  const url = bitgo.microservicesUrl(`/api/network/v1/enterprises/${ENTERPRISE_ID}/partners/${kind}`);
  // Once, so that what is signed is the very text that travels.
  const payload = JSON.stringify(fields);
  const signature = await sign(payload);
  // An object: what is a string already the SDK would send as a form.
  return bitgo.put(url).set('enterprise-id', ENTERPRISE_ID).send({ ...fields, payload, signature }).result();
}

async function main() {
  if (process.argv[2] === 'new-key') {
    const { pub, prv = '' } = bitgo.coin('ofc').keychains().create();
    console.log(JSON.stringify({ pub, encryptedPrv: bitgo.encrypt({ input: prv, password: WALLET_PASSPHRASE }) }));
    return 0;
  }
  try {
    const answer = await update(JSON.parse(await text(process.stdin)));
    console.log(JSON.stringify(answer));
    // 202 is no error to the SDK: the update waits, and `receipt` says where to ask for it.
    return answer.allocation ? 0 : 2;
  } catch (error) {
    // An ApiResponseError has what was answered in `result`.
    const refusal = /** @type {any} */ (error).result;
    if (!refusal?.name) throw error;
    console.log(JSON.stringify(refusal));
    // Only what was judged says whether that is final.
    return refusal.context?.final === undefined ? 2 : 1;
  }
}

process.exitCode = await main().catch((error) => {
  console.error(error.message);
  return 2;
});
