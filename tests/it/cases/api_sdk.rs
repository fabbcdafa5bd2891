//! `settled api` and BitGo's published SDK, with only the host changed: its keys, its signature, its HTTP client, on the
//! partner's side and on the client's.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};
use uuid::Uuid;

use super::{
    api_reads::{ROOT, add_client, token},
    examples::{example, fields, installed},
    pages::root,
};
use crate::kit::{
    api::Api,
    partner::Partner,
    support::{PATIENCE, Place, said, until},
};

const PARTNER: &str = "partner/bitgo";
const PASSPHRASE: &str = "correct horse battery staple";

/// A partner who has what BitGo gives: a key pair, whose private half is kept encrypted.
struct User {
    pub_key: String,
    encrypted_prv: String,
}

impl User {
    /// With a new key, made and encrypted by the SDK.
    async fn new() -> Self {
        let (code, made) = answer_of(example(PARTNER, &["new-key"]).env("WALLET_PASSPHRASE", PASSPHRASE), "").await;
        assert_eq!(code, Some(0), "{made}");
        let text = |name: &str| made[name].as_str().expect("a text").to_owned();
        let (pub_key, encrypted_prv) = (text("pub"), text("encryptedPrv"));
        assert!(pub_key.starts_with("xpub") && !encrypted_prv.contains("xprv"));
        Self { pub_key, encrypted_prv }
    }

    /// Sends an update of acme; the exit code and the answer.
    async fn sends(&self, api: &Api, token: &str, fields: &Value) -> (Option<i32>, Value) {
        let mut command = example(PARTNER, &[]);
        command
            .env("API_URL", format!("http://{}", api.address()))
            .env("API_TOKEN", token)
            .env("ENTERPRISE_ID", "acme")
            .env("ENCRYPTED_PRV", &self.encrypted_prv)
            .env("WALLET_PASSPHRASE", PASSPHRASE);
        answer_of(&mut command, &fields.to_string()).await
    }
}

/// Runs a program that prints one answer; its exit code too.
async fn answer_of(command: &mut Command, input: &str) -> (Option<i32>, Value) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("node runs where npm did");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).await.expect("it reads");
    drop(stdin);
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output())
        .await
        .expect("it ends")
        .expect("an exit");
    let answer = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    (output.status.code(), answer)
}

/// A partner acme, known by the SDK's public key, with connection and funds.
async fn acme(place: &Place, user: &User) -> Partner {
    let partner = Partner::new("acme");
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "A partner"];
    place.succeed(&add).await;
    let add = ["key", "add", "--enterprise-id", "acme", "--public-key", &user.pub_key];
    place.succeed(&add).await;
    place.connect_partner(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    partner
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_with_bitgos_sdk_settles() {
    if !installed(PARTNER, "api_sdk::a_partner_with_bitgos_sdk_settles") {
        return;
    }
    let place = Place::new("api_sdk_partner").await;
    let (user, stranger) = tokio::join!(User::new(), User::new());
    let partner = acme(&place, &user).await;
    let reservations = [
        partner.allocation("BTC", "10"),
        partner.allocation("BTC", "20"),
        partner.allocation("BTC", "30"),
    ];
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let token = token(&place, "acme", "partner", &[]).await;
    let [first, second, third] = &reservations;

    let cleared = fields(&partner, first, "cleared");
    for _ in 0..2 {
        let (code, answer) = user.sends(&api, &token, &cleared).await;
        let allocation = &answer["allocation"];
        assert_eq!((code, &allocation["status"]), (Some(0), &json!("cleared")), "{answer}");
        assert_eq!(allocation["id"], cleared["allocationId"]);
        assert_eq!(allocation["partnerExternalId"], cleared["partnersAllocationId"]);
    }
    let mut released = fields(&partner, second, "released");
    released["rejectReason"] = json!("余额不足 — \"no\"");
    let (code, answer) = user.sends(&api, &token, &released).await;
    let allocation = &answer["allocation"];
    assert_eq!((code, &allocation["status"]), (Some(0), &json!("released")), "{answer}");
    assert_eq!(allocation["reason"], released["rejectReason"]);

    // Back again, of what was allocated.
    let back = partner.deallocation("BTC", "4");
    place.reserve(std::slice::from_ref(&back)).await;
    let (code, answer) = user.sends(&api, &token, &fields(&partner, &back, "cleared")).await;
    let allocation = &answer["allocation"];
    assert_eq!(
        (code, &allocation["type"]),
        (Some(0), &json!("deallocation")),
        "{answer}"
    );

    // What is refused is an error to the SDK, and keeps its name.
    let cleared = fields(&partner, third, "cleared");
    let (code, answer) = stranger.sends(&api, &token, &cleared).await;
    assert_eq!(
        (code, &answer["name"]),
        (Some(1), &json!("signature_mismatch")),
        "{answer}"
    );
    let mut wrong = cleared.clone();
    wrong["amount"]["quantity"] = json!("31");
    wrong["nonce"] = json!("another");
    let (code, answer) = user.sends(&api, &token, &wrong).await;
    assert_eq!(
        (code, &answer["name"]),
        (Some(1), &json!("allocation_mismatch")),
        "{answer}"
    );
    let (code, answer) = user.sends(&api, "stl_nobody", &cleared).await;
    assert_eq!((code, &answer["name"]), (Some(2), &json!("unauthorized")), "{answer}");

    // What waits is no error, and nothing that is done either.
    let early = partner.allocation("BTC", "40");
    let (code, answer) = user.sends(&api, &token, &fields(&partner, &early, "cleared")).await;
    assert_eq!((code, &answer["state"]), (Some(2), &json!("parked")), "{answer}");
    place.reserve(std::slice::from_ref(&early)).await;
    let receipt = answer["receipt"].as_str().expect("an address");
    until("it settles", PATIENCE, async || {
        (api.get(receipt, &token).await.body["verdict"] == "settled").then_some(())
    })
    .await;

    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
    let list = api.get(&format!("{ROOT}/acme/partners/allocations"), &token).await;
    let list = list.ok()["allocations"].as_array().expect("a list").iter();
    let mut statuses: Vec<&str> = list.map(|one| one["status"].as_str().expect("a status")).collect();
    statuses.sort_unstable();
    assert_eq!(statuses, ["cleared", "cleared", "cleared", "released", "reserved"]);
    api.stop().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// What the SDK's `TradingNetwork` asks. It sends the parameters of a list in the body of a GET.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_bitgos_sdk_sees_its_allocations() {
    if !installed(PARTNER, "api_sdk::a_client_with_bitgos_sdk_sees_its_allocations") {
        return;
    }
    let place = Place::new("api_sdk_client").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations: Vec<_> = (0..3).map(|_| partner.allocation("BTC", "10")).collect();
    for reservation in &reservations {
        place.reserve(std::slice::from_ref(reservation)).await;
    }
    let ids: Vec<String> = reservations.iter().map(|one| one.id.to_string()).collect();
    add_client(&place, partner.client, "fund").await;
    let worker = place.ready_worker(&[]).await;
    place.publish(&[partner.cleared(&reservations[1])]).await;
    place.rest().await;
    let api = Api::start(&place, &[]).await;
    let token = token(&place, "fund", "client", &[]).await;
    let unknown = Uuid::new_v4();
    let calls = json!([
        ["getAllocations"],
        ["getAllocations", {"statuses": ["reserved"], "pageSize": 1}],
        ["getAllocations", {"statuses": ["reserved"], "prevId": ids[0]}],
        ["getAllocations", {"types": ["deallocation"]}],
        ["getAllocationById", {"allocationId": ids[1]}],
        ["getAllocations", {"partnerIds": ["acme"]}],
        ["getAllocationById", {"allocationId": unknown}],
    ]);
    let mut command = Command::new("node");
    command
        .arg(root().join("tests/it/tools/sdk_client.js"))
        .arg(calls.to_string())
        .env("NODE_PATH", format!("{}/node_modules", sdk().await))
        .env("API_URL", format!("http://{}", api.address()))
        .env("API_TOKEN", &token)
        .env("ENTERPRISE_ID", "fund");
    let (code, answers) = answer_of(&mut command, "").await;
    assert_eq!(code, Some(0), "{answers}");
    let listed = |call: usize| -> Vec<&str> {
        let list = answers[call]["answer"]["allocations"].as_array();
        let list = list.unwrap_or_else(|| panic!("{call}: {answers}")).iter();
        list.map(|one| one["id"].as_str().expect("an id")).collect()
    };
    assert_eq!(listed(0), ids);
    assert_eq!(listed(1), ids[..1]);
    assert_eq!(listed(2), ids[2..]);
    assert_eq!(listed(3), [""; 0]);
    assert_eq!(answers[4]["answer"]["allocation"]["status"], "cleared", "{answers}");
    // What is not known is refused, there as in the query.
    for (call, status, name) in [(5, 400, "invalid_request"), (6, 404, "not_found")] {
        let refused = &answers[call];
        let found = (&refused["status"], &refused["error"]["name"]);
        assert_eq!(found, (&json!(status), &json!(name)), "{answers}");
    }
    api.stop().await;
    place.settle_up(worker).await;
}

/// Where the SDK is.
async fn sdk() -> String {
    let program = root().join("dev/examples");
    let output = Command::new(program).args(["where", PARTNER]).output().await;
    let output = output.expect("it says where");
    String::from_utf8(output.stdout).expect("a path").trim().to_owned()
}
