//! `settled api`: updates by HTTP, end to end, with a real worker, broker and database; and everything that may be in the way.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use super::api_reads::{ROOT, token};
use crate::kit::{
    amqp::Message,
    api::{Answer, Api, read_answer},
    auditor::{Expect, Reservation, Sent},
    command::{ask_in, run_in},
    partner::{Draft, Partner, new_key},
    proxy::Proxy,
    support::{PATIENCE, Place, address, get, until, userinfo, with_address},
};

/// The largest body.
const BODY_MAX: usize = 262_144;

/// A place with a registered partner whose client has funds.
pub(super) async fn place_of(test: &str, partner: &Partner) -> Place {
    let place = Place::new(test).await;
    place.register(partner).await;
    place.deposit(partner, "BTC", "1000000").await;
    place
}

pub(super) async fn reserved(place: &Place, partner: &Partner, count: usize) -> Vec<Reservation> {
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "10")).collect();
    place.reserve(&reservations).await;
    reservations
}

pub(super) fn path_of(message: &Message) -> String {
    let mut parts = message.routing_key.split('.');
    let (enterprise, kind) = (parts.next().expect("an enterprise"), parts.next().expect("a kind"));
    format!("{ROOT}/{enterprise}/partners/{kind}s")
}

/// Sends a message's body by HTTP. It counts among what was sent, unless it was not taken.
pub(super) async fn put(place: &Place, api: &Api, token: &str, message: &Message) -> Answer {
    let answer = api.ask("PUT", &path_of(message), token, &message.body).await;
    if answer.status != 503 {
        place.story().sent.push(Sent {
            routing_key: message.routing_key.clone(),
            body: message.body.clone(),
            expect: message.expect,
        });
    }
    answer
}

/// The settled event's allocation is what was answered.
async fn as_shown(place: &Place, answer: &Answer, id: Uuid) {
    let shown = place.json(&["allocation", "show", &id.to_string()]).await;
    assert_eq!(*answer.ok(), shown);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_settles_and_is_answered_with_its_allocation() {
    let partner = Partner::new("acme");
    let place = place_of("api_settles", &partner).await;
    let reservations = reserved(&place, &partner, 3).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;

    let cleared = partner.cleared(&reservations[0]);
    let first = put(&place, &api, &acme, &cleared).await;
    as_shown(&place, &first, reservations[0].id).await;
    assert_eq!(first.body["allocation"]["status"], "cleared");
    // The same bytes again, and the same with another nonce: the same answer, and nothing moves.
    let again = put(&place, &api, &acme, &cleared).await;
    assert_eq!(again.ok(), first.ok());
    let another = put(&place, &api, &acme, &partner.cleared(&reservations[0])).await;
    assert_eq!(another.ok(), first.ok());

    let released = put(&place, &api, &acme, &partner.released(&reservations[1])).await;
    as_shown(&place, &released, reservations[1].id).await;
    assert_eq!(
        released.body["allocation"]["reason"],
        "insufficient funds at the custodian"
    );

    let back = partner.deallocation("BTC", "4");
    place.reserve(std::slice::from_ref(&back)).await;
    let answer = put(&place, &api, &acme, &partner.cleared(&back)).await;
    as_shown(&place, &answer, back.id).await;
    assert_eq!(answer.body["allocation"]["type"], "deallocation");

    // The bytes are the message's, and it carries who published it. White space is the partner's.
    let draft = partner.draft(&reservations[2], "cleared");
    let spaced = format!(
        "\n {}  ",
        String::from_utf8(draft.message(Expect::Settles).body).expect("text")
    );
    let message = Message::new(&draft.routing_key(), spaced, Expect::Settles);
    put(&place, &api, &acme, &message).await.ok();
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_has_its_class_and_the_reason_for_a_name() {
    let partner = Partner::new("acme");
    let place = place_of("api_refuses", &partner).await;
    let other = Partner::new("beta");
    place.register(&other).await;
    place.deposit(&other, "BTC", "100").await;
    let others = other.allocation("BTC", "5");
    place.reserve(std::slice::from_ref(&others)).await;
    let reservations = reserved(&place, &partner, 4).await;
    // Nothing waits for its allocation here, so that what has none is refused at once.
    let worker = place.ready_worker(&[("SETTLED_PARK__MAX_PER_PARTNER", "0")]).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let beta = token(&place, "beta", "partner", &[]).await;
    let cleared = |at: usize| partner.draft(&reservations[at], "cleared");
    put(
        &place,
        &api,
        &acme,
        &cleared(0).set("nonce", "used").message(Expect::Settles),
    )
    .await
    .ok();

    let mut wrong_text = cleared(1);
    wrong_text
        .fields
        .set("amount", json!({"currency": "BTC", "quantity": "11"}));
    let mut mixed = cleared(1).message(Expect::Refused("payload_mismatch"));
    mixed.body = String::from_utf8(mixed.body)
        .expect("text")
        .replacen("\"quantity\":\"10\"", "\"quantity\":\"12\"", 1)
        .into_bytes();
    let nowhere = partner.allocation("BTC", "10");
    let payload = cleared(1).fields.text();
    let cases: Vec<(&str, u16, bool, Message)> = vec![
        (
            "nonce_reused",
            409,
            true,
            cleared(1).set("nonce", "used").message(Expect::Any),
        ),
        (
            "already_settled",
            409,
            true,
            partner.draft(&reservations[0], "released").message(Expect::Any),
        ),
        ("allocation_mismatch", 409, true, wrong_text.message(Expect::Any)),
        ("payload_mismatch", 400, true, mixed),
        (
            "policy_contradiction",
            400,
            false,
            cleared(1).set("policyResult", "rejected").message(Expect::Any),
        ),
        (
            "signature_mismatch",
            401,
            false,
            cleared(1).signed_by(new_key()).message(Expect::Any),
        ),
        (
            "malformed_signature",
            401,
            true,
            cleared(1).message_signed(&payload, "00", Expect::Any),
        ),
        (
            "allocation_not_found",
            404,
            false,
            partner.draft(&nowhere, "cleared").message(Expect::Any),
        ),
        (
            "not_permitted",
            403,
            true,
            Draft {
                key: partner.key,
                ..partner.draft(&others, "cleared")
            }
            .message(Expect::Any),
        ),
    ];
    for (name, status, is_final, message) in cases {
        let message = message.expecting(Expect::Refused(name));
        // Twice: the second is told in the words of the first.
        for _ in 0..2 {
            let answer = put(&place, &api, &acme, &message).await;
            assert_eq!(answer.refusal(status), name, "{answer:?}");
            let context = &answer.body["context"];
            assert_eq!(context["final"], is_final, "{answer:?}");
            assert!(
                context["advice"].as_str().is_some_and(|advice| !advice.is_empty()),
                "{answer:?}"
            );
            // A sentence of its own, with nothing of the body but what it names.
            assert_eq!(answer.body["error"], context["detail"], "{answer:?}");
        }
    }
    place.json(&["partner", "suspend", "--enterprise-id", "beta"]).await;
    let message = other
        .draft(&others, "cleared")
        .message(Expect::Refused("partner_inactive"));
    let answer = put(&place, &api, &beta, &message).await;
    assert_eq!(answer.refusal(403), "partner_inactive");
    place.rest().await;

    // What can be seen to be wrong is refused without being published: no dead letter, no event.
    let before = place.dead.seen().len();
    let body = cleared(2).message(Expect::Any).body;
    let text = String::from_utf8(body.clone()).expect("text");
    let path = format!("{ROOT}/acme/partners/allocations");
    let typed = |kind: &'static str| [("content-type", kind)];
    for (name, headers, body) in [
        ("malformed_message", typed("text/plain"), body.clone()),
        (
            "malformed_message",
            typed("application/json; charset=latin-1"),
            body.clone(),
        ),
        ("malformed_message", [("content-encoding", "gzip")], body.clone()),
        ("malformed_message", typed("application/json"), Vec::new()),
        ("malformed_message", typed("application/json"), b"{".to_vec()),
        ("malformed_message", typed("application/json"), b"[]".to_vec()),
        ("malformed_message", typed("application/json"), b"\xff\xfe".to_vec()),
        (
            "malformed_message",
            typed("application/json"),
            text.replacen('{', "{\"status\":\"cleared\",", 1).into_bytes(),
        ),
        ("invalid_field", typed("application/json"), b"{}".to_vec()),
        (
            "invalid_field",
            typed("application/json"),
            text.replacen("\"10\"", "10", 1).into_bytes(),
        ),
        (
            "invalid_field",
            typed("application/json"),
            text.replacen("allocationId", "deallocationId", 1).into_bytes(),
        ),
    ] {
        let bearer = format!("Bearer {acme}");
        let headers = [&[("authorization", bearer.as_str())], &headers[..]].concat();
        let answer = api.ask_with("PUT", &path, &headers, &body).await;
        assert_eq!(answer.refusal(400), name, "{answer:?}");
        assert_eq!(answer.body["context"]["final"], true);
    }
    // Who may not ask is told so before its body is looked at.
    for (token, status) in [("", 401), (acme.as_str(), 403)] {
        let answer = api
            .ask("PUT", &format!("{ROOT}/beta/partners/allocations"), token, b"{")
            .await;
        answer.refusal(status);
    }
    place.rest().await;
    assert_eq!(place.dead.seen().len(), before);
    let said = api.said();
    assert!(!said.contains(&acme) && !said.contains(payload.as_str()), "{said}");
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_answered_202_with_its_receipt() {
    let partner = Partner::new("acme");
    let place = place_of("api_waits", &partner).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let later = partner.allocation("BTC", "10");
    let message = partner
        .draft(&later, "cleared")
        .set("nonce", "a/b")
        .message(Expect::Settles);
    let mut receipts = Vec::new();
    // The second copy brings no event, and is answered all the same.
    for _ in 0..2 {
        let answer = put(&place, &api, &acme, &message).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        assert_eq!(
            (&answer.body["state"], &answer.body["nonce"]),
            (&json!("parked"), &json!("a/b"))
        );
        assert_eq!(answer.header("location"), answer.body["receipt"].as_str());
        receipts.push(answer.body["receipt"].as_str().expect("an address").to_owned());
    }
    let receipt = api.get(&receipts[0], &acme).await;
    assert_eq!(receipt.ok()["verdict"], "parked");
    assert_eq!(
        (&receipt.body["reason"], &receipt.body["class"]),
        (&json!("allocation_not_found"), &json!(404))
    );
    place.reserve(std::slice::from_ref(&later)).await;
    until("it settles", PATIENCE, async || {
        (api.get(&receipts[0], &acme).await.body["verdict"] == "settled").then_some(())
    })
    .await;
    // The same bytes are now answered with the allocation.
    let answer = put(&place, &api, &acme, &message).await;
    as_shown(&place, &answer, later.id).await;
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_worker_away_the_queue_has_it() {
    let partner = Partner::new("acme");
    let place = place_of("api_no_worker", &partner).await;
    let reservations = reserved(&place, &partner, 2).await;
    let api = Api::start(&place, &[("SETTLED_API__WAIT", "300ms")]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let began = Instant::now();
    let answer = put(&place, &api, &acme, &partner.cleared(&reservations[0])).await;
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(
        (answer.status, &answer.body["state"]),
        (202, &json!("accepted")),
        "{answer:?}"
    );
    let receipt = answer.header("location").expect("an address").to_owned();
    assert_eq!(api.get(&receipt, &acme).await.refusal(404), "not_found");
    assert_eq!(place.line().depth("settlement.updates").await, 1);
    let worker = place.ready_worker(&[]).await;
    let answer = until("the receipt is there", PATIENCE, async || {
        let answer = api.get(&receipt, &acme).await;
        (answer.status == 200).then_some(answer)
    })
    .await;
    assert_eq!(
        (&answer.body["verdict"], &answer.body["allocationId"]),
        (&json!("settled"), &json!(reservations[0].id))
    );
    api.stop().await;
    place.settle_up(worker).await;
}

/// Two at once with one nonce: the same bytes are answered alike, other bytes are refused, and it settles once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_at_once_with_one_nonce_settle_once() {
    let partner = Partner::new("acme");
    let place = place_of("api_twice", &partner).await;
    let reservations = reserved(&place, &partner, 21).await;
    let worker = place.ready_worker(&[]).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &["--rate", "1000"]).await;
    for pair in reservations[..20].chunks(2) {
        let nonce = Uuid::new_v4().to_string();
        let same = partner
            .draft(&pair[0], "cleared")
            .set("nonce", nonce.as_str())
            .message(Expect::Settles);
        let (one, two) = tokio::join!(put(&place, &api, &acme, &same), put(&place, &api, &acme, &same));
        assert_eq!(one.ok(), two.ok());
        let nonce = Uuid::new_v4().to_string();
        let left = partner
            .draft(&pair[1], "cleared")
            .set("nonce", nonce.as_str())
            .message(Expect::Any);
        let right = partner
            .draft(&pair[1], "released")
            .set("nonce", nonce.as_str())
            .message(Expect::Any);
        let (one, two) = tokio::join!(put(&place, &api, &acme, &left), put(&place, &api, &acme, &right));
        let mut statuses = [one.status, two.status];
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 409], "{one:?} {two:?}");
        let refused = if one.status == 409 { &one } else { &two };
        assert_eq!(refused.refusal(409), "nonce_reused");
    }
    api.stop().await;
    place.settle_up(worker).await;
}

/// The API's login is believed for a partner that is bound to a broker user, where the worker is told so, and only that login.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bound_partner_is_believed_through_the_api_and_no_other_way() {
    let place = Place::new("api_bound").await;
    let partner = Partner::new("acme");
    place.register_with(&partner, &["--broker-user", "acme-user"]).await;
    place.deposit(&partner, "BTC", "1000").await;
    let reservations = reserved(&place, &partner, 3).await;
    let login = userinfo(&place.broker_url).0.to_owned();
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;

    // Nobody told this worker: what the API publishes is another user's.
    let worker = place.ready_worker(&[]).await;
    let message = partner.cleared(&reservations[0]);
    let answer = put(&place, &api, &acme, &message.clone().expecting(Expect::Any)).await;
    assert_eq!(answer.refusal(403), "sender_mismatch");
    assert_eq!(answer.body["context"]["final"], false);
    place.rest().await;
    worker.terminate().await;
    // Some other login.
    let worker = place
        .ready_worker(&[("SETTLED_BROKER__API_USERS", "somebody,else")])
        .await;
    let answer = put(
        &place,
        &api,
        &acme,
        &partner.cleared(&reservations[1]).expecting(Expect::Any),
    )
    .await;
    assert_eq!(answer.refusal(403), "sender_mismatch");
    place.rest().await;
    worker.terminate().await;

    let worker = place.ready_worker(&[("SETTLED_BROKER__API_USERS", &login)]).await;
    as_shown(&place, &put(&place, &api, &acme, &message).await, reservations[0].id).await;
    // Over AMQP, without the user_id that the broker vouches for, it is what it was.
    let bare = partner
        .cleared(&reservations[2])
        .expecting(Expect::Refused("sender_mismatch"));
    place.publish(std::slice::from_ref(&bare)).await;
    place.rest().await;
    let state = place
        .json(&["allocation", "show", &reservations[2].id.to_string()])
        .await;
    assert_eq!(state["allocation"]["status"], "reserved");
    // And a message that says it is the API's, and is not, the broker does not take.
    let forged = bare.with(|properties| properties.with_user_id("settled-api".into()));
    let channel = place.line().channel().await;
    let sent = channel
        .basic_publish(
            forged.exchange.as_str().into(),
            forged.routing_key.as_str().into(),
            lapin::options::BasicPublishOptions::default(),
            &forged.body,
            forged.properties.clone(),
        )
        .await
        .expect("sent");
    assert!(sent.await.is_err(), "the broker checks user_id");
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_the_broker_has_answered_it_is_not_ready_and_an_update_waits() {
    let partner = Partner::new("acme");
    let place = place_of("api_starts", &partner).await;
    let reservations = reserved(&place, &partner, 1).await;
    let worker = place.ready_worker(&[]).await;
    let proxy = Proxy::to(&address(&place.broker_url)).await;
    let url = with_address(&place.broker_url, proxy.address);
    proxy.stall();
    let settings = [
        ("SETTLED_BROKER_URL", url.as_str()),
        ("SETTLED_BROKER__CONNECT_TIMEOUT", "1m"),
        ("SETTLED_BROKER__PUBLISH_DEADLINE", "1m"),
    ];
    let api = Api::start_unready(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    // The database is well, so the broker alone is what it waits for.
    until("only the broker is missing", PATIENCE, async || {
        let (status, body) = get(&format!("http://{}/readyz", api.watch())).await?;
        assert_eq!(status, 503, "ready without a line to the broker: {body}");
        let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
        (body["reasons"] == serde_json::json!(["paused: the broker has not answered yet"])).then_some(())
    })
    .await;
    let message = partner.cleared(&reservations[0]);
    // Whichever comes first, the update waits for the line and is settled.
    let (answer, ()) = tokio::join!(put(&place, &api, &acme, &message), async { proxy.open() });
    as_shown(&place, &answer, reservations[0].id).await;
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_broker_away_it_says_so_and_comes_back_by_itself() {
    let partner = Partner::new("acme");
    let place = place_of("api_no_broker", &partner).await;
    let reservations = reserved(&place, &partner, 2).await;
    let worker = place.ready_worker(&[]).await;
    let proxy = Proxy::to(&address(&place.broker_url)).await;
    let url = with_address(&place.broker_url, proxy.address);
    let settings = [
        ("SETTLED_BROKER_URL", url.as_str()),
        ("SETTLED_BROKER__PUBLISH_DEADLINE", "2s"),
        ("SETTLED_RETRY__MAX", "200ms"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let message = partner.cleared(&reservations[0]);
    put(&place, &api, &acme, &message).await.ok();
    proxy.refuse();
    let answer = until("it notices", PATIENCE, async || {
        let answer = put(&place, &api, &acme, &message).await;
        (answer.status != 200).then_some(answer)
    })
    .await;
    assert_eq!(answer.refusal(503), "unavailable");
    // What needs no broker is answered.
    let read = api
        .get(
            &format!("{ROOT}/acme/partners/allocations/{}", reservations[0].id),
            &acme,
        )
        .await;
    assert_eq!(read.status, 200);
    proxy.open();
    let next = partner.cleared(&reservations[1]);
    let answer = until("it comes back", PATIENCE, async || {
        let answer = put(&place, &api, &acme, &next).await;
        (answer.status == 200).then_some(answer)
    })
    .await;
    as_shown(&place, &answer, reservations[1].id).await;
    // Silent: nobody knows whether it was taken.
    proxy.stall();
    let answer = put(&place, &api, &acme, &next).await;
    assert_eq!(answer.refusal(503), "unavailable");
    let error = answer.body["error"].as_str().unwrap_or_default();
    assert!(
        error.contains("send the same bytes again") || error.contains("was not taken"),
        "{error}"
    );
    proxy.open();
    // One that never was there: it listens, and says that it is away.
    let early = Api::start_unready(&place, &[("SETTLED_BROKER_URL", "amqp://u:p@127.0.0.1:1/x")]).await;
    assert_eq!(put(&place, &early, &acme, &next).await.refusal(503), "unavailable");
    early.stop().await;
    api.stop().await;
    // What nobody knows of may have come as well: the books are right all the same.
    worker.terminate().await;
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_database_away_nobody_is_let_in_or_turned_away() {
    let partner = Partner::new("acme");
    let place = place_of("api_no_database", &partner).await;
    let reservations = reserved(&place, &partner, 1).await;
    let worker = place.ready_worker(&[]).await;
    let proxy = Proxy::to(&address(&place.database_url)).await;
    let url = with_address(&place.database_url, proxy.address);
    let settings = [
        ("SETTLED_DATABASE_URL", url.as_str()),
        ("SETTLED_DATABASE__CONNECT_TIMEOUT", "1s"),
        ("SETTLED_DATABASE__ACQUIRE_TIMEOUT", "1s"),
        ("SETTLED_DATABASE__STATEMENT_TIMEOUT", "1s"),
        ("SETTLED_DATABASE__LOCK_TIMEOUT", "1s"),
        ("SETTLED_DATABASE__CLIENT_DEADLINE", "2s"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let message = partner.cleared(&reservations[0]);
    let list = format!("{ROOT}/acme/partners/allocations");
    assert_eq!(api.get(&list, &acme).await.status, 200);
    for silent in [false, true] {
        if silent {
            proxy.stall();
        } else {
            proxy.refuse();
        }
        for answer in [api.get(&list, &acme).await, put(&place, &api, &acme, &message).await] {
            assert_eq!(answer.refusal(503), "unavailable");
            let text = answer.body.to_string();
            for secret in ["postgres", "127.0.0.1", "connection"] {
                assert!(!text.contains(secret), "{text}");
            }
        }
        // Not even a wrong token is told that it is wrong, for nobody knows; one that is none is.
        let strange = format!("stl_{}_{}", Uuid::new_v4().simple(), "0".repeat(64));
        api.get(&list, &strange).await.refusal(503);
        api.get(&list, "x").await.refusal(401);
        proxy.open();
        until("it comes back", PATIENCE, async || {
            (api.get(&list, &acme).await.status == 200).then_some(())
        })
        .await;
    }
    as_shown(&place, &put(&place, &api, &acme, &message).await, reservations[0].id).await;
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_that_is_too_large_too_slow_or_none_is_bounded() {
    let partner = Partner::new("acme");
    let place = place_of("api_bounds", &partner).await;
    let reservations = reserved(&place, &partner, 2).await;
    let worker = place.ready_worker(&[]).await;
    let settings = [
        ("SETTLED_API__BODY_TIMEOUT", "500ms"),
        ("SETTLED_API__HEAD_TIMEOUT", "500ms"),
        ("SETTLED_API__IDLE_TIMEOUT", "1s"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let path = format!("{ROOT}/acme/partners/allocations");
    let head = |more: &str| {
        format!(
            "PUT {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {acme}\r\ncontent-type: application/json\r\n{more}\r\n"
        )
    };

    // At the bound it is taken, a byte above it not; and the sender of much more hears why.
    let mut largest = partner.cleared(&reservations[0]);
    largest.body.resize(BODY_MAX, b' ');
    put(&place, &api, &acme, &largest).await.ok();
    for above in [1, 100_000, 900_000] {
        let answer = api.ask("PUT", &path, &acme, &vec![b' '; BODY_MAX + above]).await;
        assert_eq!(answer.refusal(400), "message_too_large", "{above}");
        assert_eq!(answer.header("connection"), Some("close"));
    }
    let claimed = head("content-length: 99999999999\r\n");
    let answer = api.exchange(claimed.as_bytes()).await;
    assert_eq!(answer.refusal(400), "message_too_large");
    let chunk = format!("{:x}\r\n{}\r\n", 60_000, " ".repeat(60_000));
    let chunked = format!("{}{}0\r\n\r\n", head("transfer-encoding: chunked\r\n"), chunk.repeat(5));
    assert_eq!(api.exchange(chunked.as_bytes()).await.refusal(400), "message_too_large");
    // In chunks it is the same message.
    let body = partner.cleared(&reservations[1]);
    let text = String::from_utf8(body.body.clone()).expect("text");
    let (one, two) = text.split_at(300);
    let chunked = format!(
        "{}{:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\n\r\n",
        head("transfer-encoding: chunked\r\n"),
        one.len(),
        two.len()
    );
    place.story().sent.push(Sent {
        routing_key: body.routing_key.clone(),
        body: body.body.clone(),
        expect: body.expect,
    });
    assert_eq!(api.exchange(chunked.as_bytes()).await.status, 200);

    // A body that does not come, or comes a byte at a time.
    for drip in [false, true] {
        let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
        stream
            .write_all(head("content-length: 1000\r\n").as_bytes())
            .await
            .expect("it reads");
        let began = Instant::now();
        let (mut read, mut write) = stream.split();
        let mut answer = Vec::new();
        let dripping = async {
            while drip && write.write_all(b" ").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            got = read.read_to_end(&mut answer) => drop(got),
            () = dripping => {}
        }
        assert_eq!(read_answer(&answer).refusal(408), "request_timeout");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
    // A body that ends before it should.
    let cut = format!("{}{{\"a", head("content-length: 1000\r\n"));
    let answer = api.exchange(cut.as_bytes()).await;
    assert!(matches!(answer.status, 400 | 408), "{answer:?}");
    // A head that does not end, one that is none, one that is too large: no answer of ours, and no connection for long.
    for odd in [
        format!("PUT {path} HTTP/1.1\r\nhost"),
        String::new(),
        "\x16\x03\x01\x02 hello".to_owned(),
        "GET / HTTP/1.1\r\nhost: x\r\n".to_owned() + &format!("x-y: {}\r\n", "z".repeat(60_000)) + "\r\n",
        "GET / HTTP/1.1\r\n".to_owned() + &"a: b\r\n".repeat(200) + "\r\n",
        head("content-length: 5\r\ncontent-length: 7\r\n"),
        head("content-length: x\r\n"),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
    ] {
        let began = Instant::now();
        let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
        stream.write_all(odd.as_bytes()).await.expect("it reads");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
        drop(read.expect("it closes"));
        let status = read_answer(&answer).status;
        assert!(
            matches!(status, 0 | 400 | 431 | 505),
            "{odd:.40}: {}",
            String::from_utf8_lossy(&answer)
        );
        assert!(began.elapsed() < Duration::from_secs(10), "{odd:.40}");
    }
    // A connection is used again after a body, for as long as one that is idle may be kept.
    let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
    for _ in 0..3 {
        let request = format!("{}{{}}", head("content-length: 2\r\n"));
        stream.write_all(request.as_bytes()).await.expect("it reads");
        let mut some = vec![0; 4096];
        let count = stream.read(&mut some).await.expect("an answer");
        assert_eq!(read_answer(&some[..count]).status, 400);
    }
    api.stop().await;
    place.settle_up(worker).await;
}

/// More requests than may be in hand are told to come again; those in hand at SIGTERM are finished.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_full_and_it_stops_in_order() {
    let partner = Partner::new("acme");
    let place = place_of("api_full", &partner).await;
    let reservations = reserved(&place, &partner, 1).await;
    let settings = [("SETTLED_API__REQUESTS_MAX", "1"), ("SETTLED_API__WAIT", "20s")];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let message = partner.cleared(&reservations[0]);
    let list = format!("{ROOT}/acme/partners/allocations");
    let (first, worker) = tokio::join!(put(&place, &api, &acme, &message), async {
        until("the queue has it", PATIENCE, async || {
            (place.line().depth("settlement.updates").await == 1).then_some(())
        })
        .await;
        let answer = api.get(&list, &acme).await;
        assert_eq!(answer.refusal(503), "unavailable");
        // Nobody judges it yet.
        api.terminate();
        until("nobody new is let in", PATIENCE, async || {
            TcpStream::connect(api.address()).await.is_err().then_some(())
        })
        .await;
        place.ready_worker(&[]).await
    });
    as_shown(&place, &first, reservations[0].id).await;
    assert_eq!(api.end().await.code(), Some(0));
    place.settle_up(worker).await;
}

#[tokio::test]
async fn it_listens_to_others_by_tls_only() {
    let nowhere = [
        ("SETTLED_DATABASE_URL", "postgres://u@127.0.0.1:1/d"),
        ("SETTLED_BROKER_URL", "amqp://u:p@127.0.0.1:1/v"),
    ];
    for (setting, value, piece) in [
        ("SETTLED_API__LISTEN", "0.0.0.0:0", "there is no TLS"),
        ("SETTLED_API__LISTEN", "[::]:0", "there is no TLS"),
        ("SETTLED_API__LISTEN", "192.0.2.1:443", "there is no TLS"),
        ("SETTLED_API__LISTEN", "localhost", "must be an IP address and a port"),
        ("SETTLED_API__CERTIFICATE_FILE", "/nowhere.pem", "set both, or none"),
        ("SETTLED_API__KEY_FILE", "/nowhere.pem", "set both, or none"),
        ("SETTLED_API__WATCH_LISTEN", "x", "must be empty, or an IP address"),
    ] {
        let variables = [&nowhere[..], &[(setting, value)]].concat();
        ask_in(&variables, &["api"]).await.refused(2, piece);
    }
    let files = [
        ("SETTLED_API__CERTIFICATE_FILE", "/nowhere.pem"),
        ("SETTLED_API__KEY_FILE", "/nowhere.pem"),
    ];
    let refused = ask_in(&[&nowhere[..], &files].concat(), &["api"]).await;
    refused.refused(2, "/nowhere.pem can not be read");
    let output = run_in(&[("SETTLED_API__LISTEN", "127.0.0.1:0")], &["api"]).await;
    assert_eq!(
        output.status.code(),
        Some(2),
        "without a database and a broker it says what is missing"
    );
}

#[test]
fn the_document_and_the_routes_are_the_same() {
    let document: Value = serde_json::from_str(settled::api::OPENAPI).expect("JSON");
    let source = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/api/mod.rs")).expect("the routes");
    let (_, routes) = source.split_once("fn routes(").expect("the routes");
    let routes = routes.split_once("\n}\n").expect("their end").0;
    let mut told = Vec::new();
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let rest = path
            .strip_prefix(&format!("{ROOT}/{{enterpriseId}}/"))
            .map_or_else(|| "OPENAPI_PATH".to_owned(), |rest| format!("root(\"{rest}\")"));
        let route = routes
            .split(".route(")
            .find(|route| route.contains(&rest))
            .unwrap_or_else(|| panic!("no route {path}"));
        let methods: Vec<&String> = methods.as_object().expect("methods").keys().collect();
        for (method, call) in [("get", "get("), ("put", "put(")] {
            assert_eq!(
                methods.iter().any(|told| *told == method),
                route.contains(call),
                "{method} {path}"
            );
        }
        told.push(rest);
    }
    assert_eq!(routes.matches(".route(").count(), told.len());
    // And so does its page.
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/http-api.md")).expect("the page");
    for path in document["paths"].as_object().expect("paths").keys() {
        let short = path.replace(&format!("{ROOT}/{{enterpriseId}}"), "...");
        assert!(page.contains(&short), "docs/http-api.md: {short}");
    }
}
