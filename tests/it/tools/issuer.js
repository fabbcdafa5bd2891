// An issuer of OpenID Connect, by the library oidc-provider: `node issuer.js TOOLS` with its client and its people as JSON on
// stdin. It says where it is, as a line on stdout. People sign in with any password, on its own pages.
"use strict";
const crypto = require("crypto");
const fs = require("fs");
const http = require("http");
const path = require("path");
const [tools] = process.argv.slice(2);
const wish = JSON.parse(fs.readFileSync(0, "utf8"));

const key = (type, options, alg) => {
  const pair = crypto.generateKeyPairSync(type, options);
  return { ...pair.privateKey.export({ format: "jwk" }), use: "sig", alg, kid: alg };
};

(async () => {
  const { Provider } = await import(path.join(tools, "node_modules/oidc-provider/lib/index.js"));
  const server = http.createServer();
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [{
      client_id: wish.client,
      client_secret: wish.secret,
      redirect_uris: wish.redirects,
      id_token_signed_response_alg: wish.alg,
    }],
    jwks: { keys: [key("rsa", { modulusLength: 2048 }, "RS256"), key("ec", { namedCurve: "P-256" }, "ES256")] },
    cookies: { keys: [crypto.randomBytes(32).toString("hex")] },
    // What a scope gives stands in the ID token too.
    conformIdTokenClaims: false,
    claims: { openid: ["sub"], email: ["email", "email_verified"], groups: ["groups"] },
    pkce: { required: () => true },
    findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id, ...wish.people[id] }) }),
  });
  server.on("request", provider.callback());
  console.log(JSON.stringify({ issuer }));
})();
