#!/usr/bin/env bash
# ethers recovers the wrong signer from half of all 64-byte signatures, and never says that they are not complete.
#
# Seen with ethers 6.17.0, secp256k1 5.0.2 (the binding of libsecp256k1) on Node 20. 64 bytes, r and s, are what libsecp256k1,
# noble, coincurve and Rust's secp256k1 call a compact signature. ethers takes 64 bytes for those of EIP-2098, which keep the
# parity in the highest bit of s. That bit is never set in a low s, so the parity reads as 0, which is right for one half. One
# would expect an error, as for 63 bytes, or a signature to belong to its signer always. So a check written with ethers
# accepts a partner's first message and finds a stranger's address in the next one.
cd "$(dirname "$0")"
. lib/debian.sh
node_with ethers@6.17.0 secp256k1@5.0.2
cat >"$work/recover.js" <<'JS'
const { createHash } = require('crypto');
const { ethers } = require('ethers');
const secp256k1 = require('secp256k1');
const sha256 = (text) => createHash('sha256').update(text).digest();
const key = sha256('key');
const address = ethers.computeAddress(new ethers.SigningKey(key).publicKey);
const whose = (digest, bytes) => {
  try {
    return ethers.recoverAddress(digest, '0x' + Buffer.from(bytes).toString('hex')) === address ? 'signer' : 'stranger';
  } catch { return 'refused'; }
};
const count = { compact: {}, 'with v': {}, '63 bytes': {} };
for (let number = 0; number < 400; number++) {
  const digest = sha256(`message ${number}`);
  const { signature, recid } = secp256k1.ecdsaSign(digest, key);
  if (!secp256k1.ecdsaVerify(signature, digest, secp256k1.publicKeyCreate(key))) throw new Error('not a signature');
  for (const [form, bytes] of [['compact', signature], ['with v', [...signature, 27 + recid]], ['63 bytes', signature.slice(1)]]) {
    const answer = whose(digest, bytes);
    count[form][answer] = (count[form][answer] ?? 0) + 1;
  }
}
for (const form in count) console.log(form + ':', JSON.stringify(count[form]));
JS
(cd "$work" && node recover.js) | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "signers are recovered otherwise"
compact: {"signer":202,"stranger":198}
with v: {"signer":400}
63 bytes: {"refused":400}
TXT
say "as found: one key, and half of its signatures are somebody else's"
