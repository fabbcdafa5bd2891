#!/usr/bin/env bash
# The same two lines of JavaScript sign another thing after an update of @noble/curves from 1 to 2, and refuse every signature
# that they accepted before.
#
# Seen with @noble/curves 1.9.7 and 2.4.0, @noble/secp256k1 2.3.0 and 3.2.0, secp256k1 5.0.2 (the binding of libsecp256k1) on
# Node 20. sign() and verify() take 32 bytes; the old ones take them for a digest, as libsecp256k1 does, the new ones for a
# message that they hash once more (prehash: true). No error, no warning, no other type: verify() answers false, for correct
# signatures by correct keys, and what is signed anew nobody else accepts. One would expect a function that is given 32 bytes
# where it wants a message of any length to need another name.
cd "$(dirname "$0")"
. lib/debian.sh
node_with old@npm:@noble/curves@1.9.7 new@npm:@noble/curves@2.4.0 small-old@npm:@noble/secp256k1@2.3.0 small-new@npm:@noble/secp256k1@3.2.0 secp256k1@5.0.2
cat >"$work/verify.mjs" <<'JS'
import { createHash } from 'crypto';
import { secp256k1 as old } from 'old/secp256k1';
import { secp256k1 as current } from 'new/secp256k1.js';
import * as smallOld from 'small-old';
import * as smallNew from 'small-new';
import native from 'secp256k1';
const digest = createHash('sha256').update('message').digest();
const key = createHash('sha256').update('key').digest();
const publicKey = native.publicKeyCreate(key);
const { signature } = native.ecdsaSign(digest, key);
console.log('curves 1.9.7:', old.verify(signature, digest, publicKey));
console.log('curves 2.4.0:', current.verify(signature, digest, publicKey));
console.log('curves 2.4.0 with prehash: false:', current.verify(signature, digest, publicKey, { prehash: false }));
console.log('secp256k1 2.3.0:', smallOld.verify(signature, digest, publicKey));
console.log('secp256k1 3.2.0:', await smallNew.verifyAsync(signature, digest, publicKey));
console.log('libsecp256k1 of what curves 2.4.0 signs:', native.ecdsaVerify(current.sign(digest, key), digest, publicKey));
JS
(cd "$work" && node verify.mjs) | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "32 bytes mean something else"
curves 1.9.7: true
curves 2.4.0: false
curves 2.4.0 with prehash: false: true
secp256k1 2.3.0: true
secp256k1 3.2.0: false
libsecp256k1 of what curves 2.4.0 signs: false
TXT
say "as found: what verified does not verify"
