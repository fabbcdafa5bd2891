// A client whose program is BitGo's SDK, with another host (API_URL, API_TOKEN, ENTERPRISE_ID): asks what its TradingNetwork asks.
//   NODE_PATH=.. node sdk_client.js '[["getAllocations",{"statuses":["reserved"]}]]'
// Prints for each call what came of it: {"answer"} or {"status", "error"}.
const { BitGoAPI } = require('@bitgo/sdk-api');
const { coins, Wallet } = require('@bitgo/sdk-core');

const { API_URL, API_TOKEN, ENTERPRISE_ID } = process.env;
const bitgo = new BitGoAPI({ customRootURI: API_URL, accessToken: API_TOKEN, clientConstants: {} });
bitgo.register('ofc', coins.Ofc.createInstance);
const wallet = new Wallet(bitgo, bitgo.coin('ofc'), { id: 'trading', enterprise: ENTERPRISE_ID, keys: [] });
const network = wallet.toTradingAccount().toNetwork();

const answers = JSON.parse(process.argv[2]).map(([call, parameters]) =>
  network[call](parameters).then(
    (answer) => ({ answer }),
    (error) => ({ status: error.status, error: error.result }),
  ),
);
Promise.all(answers).then((all) => console.log(JSON.stringify(all)));
