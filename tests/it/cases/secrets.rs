//! What is searched for in everything that programs write, and that it is found in every form; the kit does so for all tests.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde_json::json;

use uuid::Uuid;

use super::api_reads::{ROOT, token};
use crate::kit::{
    amqp::Message,
    api::Api,
    auditor::Expect,
    console::Console,
    partner::Partner,
    secrets,
    support::{COLLECTS, PATIENCE, Place, until, with_partner},
};

#[test]
fn a_leak_is_found_in_every_form() {
    let partner = Partner::new("leaky");
    let message = partner.cleared(&partner.allocation("BTC", "5"));
    secrets::message(&message);
    secrets::password("correct-horse");
    secrets::of_pages("of-one-session");
    let body = String::from_utf8(message.body.clone()).expect("text");
    let fields: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    let (payload, signature) = (
        fields["payload"].as_str().expect("text"),
        fields["signature"].as_str().expect("text"),
    );
    let line = |said: &str| format!("{{\"level\":\"trace\",\"message\":\"x\",\"of\":{said}}}\n");
    for leak in [
        line(&body),
        line(&json!(body).to_string()),
        line(&json!(json!(body).to_string()).to_string()),
        line(payload),
        line(&json!(payload).to_string()),
        line(&hex::encode(&body)),
        line(&hex::encode_upper(payload)),
        line(&BASE64_STANDARD.encode(&body)),
        line(&format!("{:?}", body.as_bytes())),
        line(&format!("{body:?}")),
        line(&json!(signature).to_string()),
        line("\"postgres://u:correct-horse@h/d\""),
        line(&json!(hex::encode(partner.key.to_secret_bytes())).to_string()),
        line("\"form_token=of-one-session\""),
    ] {
        assert!(!secrets::found(&leak).is_empty(), "{leak}");
    }
    let harmless = line(&json!({"nonce": fields["nonce"], "allocationId": fields["allocationId"]}).to_string());
    assert_eq!(secrets::found(&harmless), Vec::<String>::new());
}

/// Messages of every fate, with everything said at trace: log, metrics, readiness, complaints and audit hold none of their words.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_written_holds_a_word_of_a_message_or_a_password() {
    let (place, partner) = with_partner("secrets", "1000").await;
    let reservations: Vec<_> = (0..4).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let worker = place
        .ready_worker(&[&COLLECTS[..], &[("SETTLED_LOG__LEVEL", "trace")]].concat())
        .await;
    let settles = partner.cleared(&reservations[0]);
    let stranger = Partner::new("nobody");
    let wrong = partner
        .draft(&reservations[1], "cleared")
        .set("clientId", stranger.client.to_string());
    let messages: Vec<Message> = vec![
        settles.clone(),
        settles.expecting(Expect::Any),
        partner.released(&reservations[2]),
        wrong.message(Expect::Refused("allocation_mismatch")),
        stranger
            .draft(&stranger.allocation("BTC", "1"), "cleared")
            .message(Expect::Refused("unknown_partner")),
        partner
            .draft(&reservations[3], "cleared")
            .signed_by(stranger.key)
            .message(Expect::Refused("signature_mismatch")),
        Message::new(
            "acme.allocation.update",
            "{\"not an update, and long enough to be told from others\":1}",
            Expect::Refused("invalid_field"),
        ),
        Message::new(
            "acme.allocation.update",
            "{\"not even JSON, and long enough to be told from others\":",
            Expect::Refused("malformed_message"),
        ),
    ];
    place.publish(&messages).await;
    place.rest().await;
    // Ten lines of trace at the least, or nothing was tried.
    until("it says much", PATIENCE, async || {
        let traced = worker.lines().iter().filter(|line| line["level"] == "TRACE").count();
        (traced > 10).then_some(())
    })
    .await;
    for path in ["/metrics", "/readyz", "/livez"] {
        let (_, text) = worker.get(path).await.expect("an answer");
        secrets::check(path, &text);
    }
    // Looking at bodies is written down, and the bodies are not.
    assert!(place.run(&["dead-letters", "export"]).await.status.success());
    pages_and_answers(&place, &partner).await;
    place.settle_up(worker).await;
}

/// The console's pages and the API's answers tell of what was sent and refused, and hold none of it; the kit searches each.
async fn pages_and_answers(place: &Place, partner: &Partner) {
    let console = Console::start(place, &[("SETTLED_LOG__LEVEL", "trace")]).await;
    let visitor = console.sign_in().await;
    let (db, letter) = (
        place.db().await,
        "SELECT id FROM settled.dead_letters WHERE reason = 'allocation_mismatch'",
    );
    let letter = until("its letter is collected", PATIENCE, async || {
        let row = db.query_opt(letter, &[]).await.expect("letters");
        row.map(|row| row.get::<_, Uuid>(0))
    })
    .await;
    let letter = format!("/letters/{letter}");
    let pages = [
        "/",
        "/groups",
        "/letters",
        "/plans",
        "/runs",
        "/timeline",
        "/partners",
        "/partners/acme",
        "/ledger",
        "/ledger/check",
        "/outbox",
        "/audit",
        "/doctor",
        "/sessions",
        &letter,
    ];
    for path in pages {
        let page = console.get(&visitor, path).await;
        assert_eq!(page.status, 200, "{path}: {page:?}");
        let found = secrets::found(&page.text.replace(&visitor.token, ""));
        assert_eq!(found, Vec::<String>::new(), "{path} shows what nobody asked for");
    }
    console.stop().await;

    let partners = token(place, &partner.enterprise, "partner", &[]).await;
    let api = Api::start(place, &[]).await;
    let root = format!("{ROOT}/{}", partner.enterprise);
    for path in ["partners/allocations", "partners/balances", "receipts"] {
        let answer = api.get(&format!("{root}/{path}"), &partners).await;
        assert!(answer.status < 500, "{path}: {answer:?}");
    }
    let refused = api
        .get(&format!("{root}/partners/balances"), "a-token-of-nobody-at-all")
        .await;
    assert_eq!(refused.status, 401, "{refused:?}");
    api.stop().await;
}
