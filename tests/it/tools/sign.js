// Signs as BitGo's SDK does (its coins' signMessage is this call): PAYLOAD with the private key PARTNER_KEY, 64 hex digits.
const { bip32utils } = require('@bitgo/secp256k1');
const bitcoin = { messagePrefix: '\u0018Bitcoin Signed Message:\n' };
const key = Buffer.from(process.env.PARTNER_KEY, 'hex');
process.stdout.write(bip32utils.signMessage(process.env.PAYLOAD, key, bitcoin).toString('hex'));
