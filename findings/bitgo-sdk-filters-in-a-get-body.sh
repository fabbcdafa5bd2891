#!/usr/bin/env bash
# BitGo's SDK asks for lists with GET and puts the filters into the body of the request, so that whoever reads addresses answers
# with everything.
#
# Seen with @bitgo/sdk-core 37.7.0 and @bitgo/sdk-api 1.86.0 on Node 20. TradingNetwork.getAllocations({statuses}), and every
# other get of that class, is bitgo.get(url).send(params): superagent serialises that as JSON, with a Content-Type, and leaves
# the address as it is. HTTP gives the body of a GET no meaning (RFC 9110, 9.3.1): servers, caches and proxies may drop it,
# refuse the request, or take two different questions for the same one. Even a question for one thing by its id has a body, {}.
# One would expect a query, as bitgo.get(url).query(params) writes it. A server made from the types of the SDK alone answers
# `getAllocations({ statuses: ['reserved'] })` with what is cleared, too.
cd "$(dirname "$0")"
. lib/debian.sh
node_with @bitgo/sdk-api@1.86.0 @bitgo/sdk-core@37.7.0 @bitgo/unspents@0.51.6 cbor-extract@2.2.2
cat >"$work/ask.js" <<'JS'
const http = require('http');
const { BitGoAPI } = require('@bitgo/sdk-api');
const { coins, Wallet } = require('@bitgo/sdk-core');
const server = http.createServer(async (request, response) => {
  let body = '';
  for await (const piece of request) body += piece;
  console.log(request.method, request.url, body || 'without a body');
  response.setHeader('content-type', 'application/json');
  response.end('{}');
});
server.listen(0, '127.0.0.1', async () => {
  const customRootURI = `http://127.0.0.1:${server.address().port}`;
  const bitgo = new BitGoAPI({ customRootURI, accessToken: 'token', clientConstants: {} });
  bitgo.register('ofc', coins.Ofc.createInstance);
  const wallet = new Wallet(bitgo, bitgo.coin('ofc'), { id: 'w', enterprise: 'e', keys: [] });
  const network = wallet.toTradingAccount().toNetwork();
  await network.getAllocations({ statuses: ['reserved'], pageSize: 1 });
  await network.getAllocationById({ allocationId: 'a' });
  await bitgo.get(bitgo.microservicesUrl('/a/query')).query({ statuses: 'reserved' }).result();
  server.close();
});
JS
(cd "$work" && node ask.js) | tee "$work/out"
diff - "$work/out" <<'TXT' || changed "the filters are elsewhere"
GET /api/network/v1/enterprises/e/clients/allocations {"statuses":["reserved"],"pageSize":1}
GET /api/network/v1/enterprises/e/clients/allocations/a {}
GET /a/query?statuses=reserved without a body
TXT
say "as found: the address asks for everything"
