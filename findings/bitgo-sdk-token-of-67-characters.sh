#!/usr/bin/env bash
# BitGo's SDK sends an access token as it is, unless it happens to have 67 characters: then its hash goes instead, and every
# answer of 200 becomes an error 511 that no server sent.
#
# Seen with @bitgo/sdk-api 1.86.0 and @bitgo/sdk-hmac 1.9.0 on Node 20. A token is taken for one of the older kind, a plain
# bearer token, by `length !== 67 && indexOf('v2x') !== 0`. So any other issuer's token of 67 characters (a prefix of three and
# 64 hex digits, say) is never sent: the server sees `Bearer <SHA-256 of it>` and answers 401, or, if it does not look, does
# what was asked, and the caller is told `invalid response HMAC`, status 511, because the answer has no header hmac. Nothing
# says that the length decided it. One would expect the prefix `v2x` to, which every newer token has.
cd "$(dirname "$0")"
. lib/debian.sh
node_with @bitgo/sdk-api@1.86.0 @bitgo/sdk-core@37.7.0 @bitgo/unspents@0.51.6 cbor-extract@2.2.2
cat >"$work/ask.js" <<'JS'
const http = require('http');
const { createHash } = require('crypto');
const { BitGoAPI } = require('@bitgo/sdk-api');
let sent;
const server = http.createServer((request, response) => {
  sent = request.headers.authorization;
  response.setHeader('content-type', 'application/json');
  response.end('{"done":true}');
});
server.listen(0, '127.0.0.1', async () => {
  const customRootURI = `http://127.0.0.1:${server.address().port}`;
  for (const length of [40, 66, 67, 68]) {
    const token = 'tk_' + 'a'.repeat(length - 3);
    const bitgo = new BitGoAPI({ customRootURI, accessToken: token, clientConstants: {} });
    const told = await bitgo.put(bitgo.microservicesUrl('/do')).send({}).result().then(JSON.stringify, (error) => `${error.status} ${error.message}`);
    const hash = createHash('sha256').update(token).digest('hex');
    console.log(`${length}: ${{ [`Bearer ${token}`]: 'the token', [`Bearer ${hash}`]: 'its hash' }[sent]} is sent, 200 is answered, the caller has ${told}`);
  }
  server.close();
});
JS
(cd "$work" && node ask.js) | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "the length decides otherwise"
40: the token is sent, 200 is answered, the caller has {"done":true}
66: the token is sent, 200 is answered, the caller has {"done":true}
67: its hash is sent, 200 is answered, the caller has 511 invalid response HMAC
68: the token is sent, 200 is answered, the caller has {"done":true}
TXT
say "as found: what was done is told as an error"
