//! `settled api`: who may ask, and what is asked that changes nothing.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::kit::{
    api::{Answer, Api},
    auditor::{Expect, Reservation},
    command::{add_partner, ask, ledger},
    partner::Partner,
    support::{Ground, PATIENCE, Place, count, until},
};

pub(crate) const ROOT: &str = "/api/network/v1/enterprises";

/// Makes a token, and says it.
pub(crate) async fn token(ground: &Ground, enterprise: &str, role: &str, flags: &[&str]) -> String {
    let add = ["token", "add", "--enterprise-id", enterprise, "--role", role];
    let made = ask(ground, &[&add, flags].concat()).await.document(0);
    made["token"].as_str().expect("a token").to_owned()
}

pub(crate) async fn add_client(ground: &Ground, client: Uuid, enterprise: &str) {
    let client = client.to_string();
    let add = ["client", "add", "--client-id", &client, "--enterprise-id", enterprise];
    ask(ground, &add).await.document(0);
}

/// A place with a partner, so many reservations, and an API.
async fn some(test: &str, count: usize, settings: &[(&str, &str)]) -> (Place, Partner, Vec<Reservation>, Api) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "10")).collect();
    for reservation in &reservations {
        place.reserve(std::slice::from_ref(reservation)).await;
    }
    let api = Api::start(&place, settings).await;
    (place, partner, reservations, api)
}

fn ids(answer: &Answer) -> Vec<String> {
    let list = answer.ok()["allocations"].as_array().expect("a list");
    list.iter()
        .map(|one| one["id"].as_str().expect("an id").to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_clients_are_registered_and_audited() {
    let ground = ledger("api_tokens").await;
    let client = Uuid::new_v4().to_string();
    let client_add = ["client", "add", "--client-id", &client, "--enterprise-id"];
    let added = ask(&ground, &[&client_add[..], &["fund"]].concat()).await.document(0);
    assert_eq!(
        (&added["result"], &added["enterpriseId"]),
        (&json!("added"), &json!("fund"))
    );
    let again = ask(&ground, &[&client_add[..], &["fund"]].concat()).await.document(0);
    assert_eq!(again["result"], "exists");
    ask(&ground, &[&client_add[..], &["other"]].concat())
        .await
        .refused(1, "registered as one of fund");
    let listed = ask(&ground, &["client", "list", "--enterprise-id", "fund"])
        .await
        .document(0);
    assert_eq!(listed[0]["clientId"], json!(client));
    assert_eq!(
        ask(&ground, &["client", "list", "--enterprise-id", "no"])
            .await
            .document(0),
        json!([])
    );

    let add = |enterprise, role| ["token", "add", "--enterprise-id", enterprise, "--role", role];
    ask(&ground, &add("acme", "partner"))
        .await
        .refused(1, "no partner acme is registered");
    ask(&ground, &add("acme", "client"))
        .await
        .refused(1, "no client of acme is registered");
    add_partner(&ground, "acme").await;
    let flags = [
        "--name",
        "desk 3",
        "--rate",
        "7",
        "--valid-for",
        "2h",
        "--reason",
        "for the test",
    ];
    let made = ask(&ground, &[&add("acme", "partner")[..], &flags].concat())
        .await
        .document(0);
    let token = made["token"].as_str().expect("a token");
    let id = made["id"].as_str().expect("an id");
    assert!(
        token.starts_with("stl_") && token.contains(&id.replace('-', "")),
        "{token}"
    );
    assert_eq!(
        (&made["rate"], &made["valid"], &made["role"]),
        (&json!(7), &json!(true), &json!("partner"))
    );

    // Shown once: neither the list, nor the audit, nor any table holds it, or its secret.
    let secret = token.rsplit('_').next().expect("a secret");
    let list = ask(&ground, &["token", "list"]).await.document(0);
    assert_eq!(list.as_array().map(Vec::len), Some(1));
    let audit = ask(&ground, &["audit", "list"]).await.lines(0);
    let acts: Vec<&Value> = audit.iter().map(|act| &act["act"]).collect();
    assert_eq!(acts, ["token add", "partner add", "client add"]);
    assert_eq!(audit[0]["why"], "for the test");
    let db = ground.db().await;
    let all: String = db
        .query_one(
            "SELECT coalesce(string_agg(t::text, ' '), '') FROM settled.tokens AS t",
            &[],
        )
        .await
        .expect("tokens")
        .get(0);
    for text in [&list.to_string(), &json!(audit).to_string(), &all] {
        assert!(!text.contains(secret), "{text}");
    }

    let revoked = ask(&ground, &["token", "revoke", id]).await.document(0);
    assert_eq!(
        (&revoked["result"], &revoked["valid"]),
        (&json!("revoked"), &json!(false))
    );
    // The token itself names it too, and is not repeated.
    let again = ask(&ground, &["token", "revoke", token]).await;
    assert_eq!(again.document(0)["result"], "exists");
    assert!(!again.all().contains(secret));
    ask(&ground, &["token", "revoke", &Uuid::new_v4().to_string()])
        .await
        .refused(1, "there is no token");
    let wrong = ask(&ground, &["token", "revoke", &format!("{token}0")]).await;
    wrong.refused(2, "neither the id of a token nor a token");
    assert!(!wrong.all().contains(secret), "{}", wrong.all());
    let audit = ask(&ground, &["audit", "list", "--act", "token revoke"]).await.lines(0);
    assert_eq!(audit.len(), 1, "what changed nothing is not written down");
    for lasts in ["0s", "87601h", "soon"] {
        let refused = ask(
            &ground,
            &[&add("acme", "partner")[..], &["--valid-for", lasts]].concat(),
        )
        .await;
        assert_eq!(refused.code, Some(2), "{lasts}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_asks_sees_its_own_and_nothing_else() {
    let (place, partner, reservations, api) = some("api_own", 2, &[]).await;
    let other = Partner::new("beta");
    place.register(&other).await;
    place.deposit(&other, "ETH", "500").await;
    let others = other.allocation("ETH", "5");
    place.reserve(std::slice::from_ref(&others)).await;
    add_client(&place, partner.client, "fund").await;
    add_client(&place, other.client, "pension").await;
    let [acme, beta] = [
        token(&place, "acme", "partner", &[]).await,
        token(&place, "beta", "partner", &[]).await,
    ];
    let [fund, pension] = [
        token(&place, "fund", "client", &[]).await,
        token(&place, "pension", "client", &[]).await,
    ];

    let mine = reservations[0].id;
    for (root, token, id) in [
        ("acme/partners", &acme, mine),
        ("beta/partners", &beta, others.id),
        ("fund/clients", &fund, mine),
        ("pension/clients", &pension, others.id),
    ] {
        let answer = api.get(&format!("{ROOT}/{root}/allocations/{id}"), token).await;
        // Exactly as the command shows it, and as events tell it.
        let shown = place.json(&["allocation", "show", &id.to_string()]).await;
        assert_eq!(*answer.ok(), shown, "{root}");
        // In any letter case, as everywhere.
        let upper = format!("{ROOT}/{root}/allocations/{}", id.to_string().to_uppercase());
        assert_eq!(*api.get(&upper, token).await.ok(), shown);
    }
    // Another's is not there, as what nobody has.
    for (root, token, id) in [
        ("acme/partners", &acme, others.id),
        ("fund/clients", &fund, others.id),
        ("fund/clients", &fund, Uuid::new_v4()),
        ("pension/clients", &pension, mine),
    ] {
        let answer = api.get(&format!("{ROOT}/{root}/allocations/{id}"), token).await;
        assert_eq!(answer.refusal(404), "not_found");
        assert_eq!(
            answer.body["error"],
            "there is no such allocation or deallocation of this enterprise"
        );
    }
    // Another enterprise is refused, whether it exists or not; so is the other role.
    let mut told = Vec::new();
    for (root, token) in [
        ("beta/partners", &acme),
        ("nobody/partners", &acme),
        ("ACME/partners", &acme),
        ("acme/clients", &acme),
        ("fund/partners", &fund),
        ("pension/clients", &fund),
        ("acme/partners", &fund),
    ] {
        let answer = api.get(&format!("{ROOT}/{root}/allocations"), token).await;
        assert_eq!(answer.refusal(403), "forbidden", "{root}");
        told.push(answer.body["error"].clone());
    }
    told.dedup();
    assert_eq!(told.len(), 1, "the same words: {told:?}");
    // No token, a wrong one, one that is none, two.
    let path = format!("{ROOT}/acme/partners/allocations");
    let mut last = acme.clone();
    let end = if last.ends_with('0') { '1' } else { '0' };
    last.pop();
    last.push(end);
    let strange = format!("stl_{}_{}", Uuid::new_v4().simple(), "0".repeat(64));
    for wrong in ["", "x", &last, &strange, &acme.replace("stl_", "")] {
        assert_eq!(api.get(&path, wrong).await.refusal(401), "unauthorized", "{wrong}");
    }
    let bearer = format!("Bearer {acme}");
    let two = [("authorization", bearer.as_str()), ("authorization", bearer.as_str())];
    api.ask_with("GET", &path, &two, b"").await.refusal(401);
    let lower = bearer.replace("Bearer", "bearer");
    let answer = api.ask_with("GET", &path, &[("Authorization", &lower)], b"").await;
    assert_eq!(answer.status, 200);

    // Nothing secret is in the log, and no stranger's words.
    let said = api.said();
    for secret in [&acme, &beta, &fund, &pension, &strange, &last] {
        assert!(
            !said.contains(secret.as_str()) && !said.contains(&secret[37..]),
            "{said}"
        );
    }
    assert!(said.contains("\"route\":\"client_allocation\""), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_ended_is_refused_from_the_next_request_on() {
    let (place, _, _, api) = some("api_ended", 0, &[]).await;
    let path = format!("{ROOT}/acme/partners/allocations");
    let kept = token(&place, "acme", "partner", &[]).await;
    let short = token(&place, "acme", "partner", &["--valid-for", "2s"]).await;
    let revoked = token(&place, "acme", "partner", &[]).await;
    assert_eq!(api.get(&path, &revoked).await.status, 200);
    ask(&place, &["token", "revoke", &revoked]).await.document(0);
    let answer = api.get(&path, &revoked).await;
    assert_eq!(answer.refusal(401), "unauthorized");
    until("the token expires", PATIENCE, async || {
        (api.get(&path, &short).await.status == 401).then_some(())
    })
    .await;
    assert_eq!(api.get(&path, &kept).await.status, 200);

    // As often as it may, and no more; others may.
    let slow = token(&place, "acme", "partner", &["--rate", "1"]).await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        let answer = api.get(&path, &slow).await;
        if answer.status == 429 {
            assert_eq!(answer.refusal(429), "too_many_requests");
        }
        statuses.push(answer.status);
    }
    assert!(statuses[0] == 200 && statuses.contains(&429), "{statuses:?}");
    assert_eq!(api.get(&path, &kept).await.status, 200);
    let metrics = api.metrics().await;
    assert!(
        metrics.contains("settled_api_requests_total{route=\"partner_allocations\",status=\"429\"}"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages_and_are_filtered() {
    let (place, partner, reservations, api) = some("api_pages", 5, &[("SETTLED_API__PAGE_MAX", "4")]).await;
    let worker = place.ready_worker(&[]).await;
    place
        .publish(&[partner.cleared(&reservations[1]), partner.released(&reservations[2])])
        .await;
    place.rest().await;
    let back = partner.deallocation("BTC", "3");
    place.reserve(std::slice::from_ref(&back)).await;
    add_client(&place, partner.client, "fund").await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let fund = token(&place, "fund", "client", &[]).await;
    let mut all: Vec<String> = reservations
        .iter()
        .map(|reservation| reservation.id.to_string())
        .collect();
    all.push(back.id.to_string());

    for (root, token) in [("acme/partners", &acme), ("fund/clients", &fund)] {
        let list = async |query: &str| api.get(&format!("{ROOT}/{root}/allocations{query}"), token).await;
        for size in [
            "",
            "?pageSize=1",
            "?pageSize=2",
            "?pageSize=4",
            "?pageSize=3&pageNumber=0",
        ] {
            let (mut found, mut query) = (Vec::new(), size.to_owned());
            loop {
                let page = list(&query).await;
                found.extend(ids(&page));
                let Some(next) = page.body["nextBatchPrevId"].as_str() else {
                    break;
                };
                let and = if size.is_empty() { "?" } else { "&" };
                query = format!("{size}{and}prevId={next}");
            }
            assert_eq!(found, all, "{root} {size}");
        }
        for (query, expected) in [
            ("?types=deallocation", vec![5]),
            ("?types=allocation&statuses=reserved", vec![0, 3, 4]),
            ("?statuses=cleared,released", vec![1, 2]),
            ("?statuses=cleared&statuses=released", vec![1, 2]),
            ("?statuses=cleared%2Creleased&types=allocation,deallocation", vec![1, 2]),
            ("?currencies=ETH", vec![]),
            (
                &format!("?connectionIds={}&types=deallocation", partner.connection),
                vec![5],
            ),
            (&format!("?connectionIds={}", Uuid::new_v4()), vec![]),
        ] {
            let expected: Vec<String> = expected.into_iter().map(|at: usize| all[at].clone()).collect();
            assert_eq!(ids(&list(query).await), expected, "{root} {query}");
        }
        for (query, name) in [
            ("?types=loan", "types"),
            ("?statuses=CLEARED", "statuses"),
            ("?currencies=a%00b", "currencies"),
            ("?connectionIds=x", "connectionIds"),
            ("?pageSize=0", "pageSize"),
            ("?pageSize=5", "pageSize"),
            ("?pageSize=-1", "pageSize"),
            ("?pageSize=99999999999999999999", "pageSize"),
            ("?pageNumber=1", "prevId"),
            ("?prevId=x", "prevId"),
            (&format!("?prevId={}", Uuid::new_v4()), "prevId"),
            ("?tpyes=allocation", "tpyes"),
            (&format!("?{}", "types=allocation&".repeat(101)), "types"),
        ] {
            let answer = list(query).await;
            assert_eq!(answer.refusal(400), "invalid_request", "{query}");
            let error = answer.body["error"].as_str().expect("a sentence");
            assert!(error.contains(name), "{query}: {error}");
        }
    }
    let nothing = token(&place, "fund", "client", &[]).await;
    let shown = api
        .get(
            &format!("{ROOT}/fund/clients/allocations/{}", reservations[1].id),
            &nothing,
        )
        .await;
    assert_eq!(shown.ok()["allocation"]["status"], "cleared");
    assert_eq!(shown.body["allocation"]["reason"], Value::Null);
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn balances_are_those_of_the_books() {
    let (place, partner, reservations, api) = some("api_balances", 3, &[]).await;
    let worker = place.ready_worker(&[]).await;
    let mut second = Partner::new("acme");
    second.key = partner.key;
    place.connect_partner(&second).await;
    place.publish(&[partner.cleared(&reservations[0])]).await;
    place.rest().await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let path = format!("{ROOT}/acme/partners/balances");
    let answer = api.get(&path, &acme).await;
    let btc = json!({"available": "10", "held": "20"});
    assert_eq!(answer.ok()["partnerId"], "acme");
    assert_eq!(answer.body["balances"], json!({"BTC": btc}));
    assert_eq!(
        answer.body["networkBalances"],
        json!({
            partner.connection.to_string(): {
                "clientId": partner.client, "partnersConnectionId": partner.partners_connection, "balances": {"BTC": btc},
            },
            second.connection.to_string(): {
                "clientId": second.client, "partnersConnectionId": second.partners_connection, "balances": {},
            },
        })
    );
    // By pages of connections; the sums are those of all of them.
    let first = api.get(&format!("{path}?pageSize=1"), &acme).await;
    assert_eq!(first.ok()["balances"], json!({"BTC": btc}));
    let next = first.body["nextBatchPrevId"].as_str().expect("more");
    let last = api.get(&format!("{path}?pageSize=1&prevId={next}"), &acme).await;
    assert_eq!(last.ok()["nextBatchPrevId"], Value::Null);
    let mut pages = first.body["networkBalances"].as_object().expect("an object").clone();
    pages.extend(last.body["networkBalances"].as_object().expect("an object").clone());
    assert_eq!(Value::Object(pages), answer.body["networkBalances"]);
    assert_eq!(
        api.get(&format!("{path}?types=allocation"), &acme).await.refusal(400),
        "invalid_request"
    );
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_are_found_by_any_nonce() {
    let (place, partner, reservations, api) = some("api_receipts", 4, &[]).await;
    let worker = place.ready_worker(&[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let nonces = ["n-1", "a/b c%2F", "..", "\u{e4}\u{1f600}?#"];
    for (nonce, reservation) in nonces.into_iter().zip(&reservations) {
        let draft = partner.draft(reservation, "cleared").set("nonce", nonce);
        place.publish(&[draft.message(Expect::Settles)]).await;
    }
    place.rest().await;
    for (nonce, reservation) in nonces.into_iter().zip(&reservations) {
        let encoded: String = nonce.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let path = match nonce {
            ".." => format!("{ROOT}/acme/receipts?nonce={encoded}"),
            _ => format!("{ROOT}/acme/receipts/{encoded}"),
        };
        let answer = api.get(&path, &acme).await;
        assert_eq!(
            (&answer.ok()["nonce"], &answer.body["verdict"]),
            (&json!(nonce), &json!("settled"))
        );
        assert_eq!(answer.body["allocationId"], json!(reservation.id));
        let shown = place
            .json(&["receipt", "--enterprise-id", "acme", "--nonce", nonce])
            .await;
        for (field, value) in answer.body.as_object().expect("an object") {
            assert_eq!(*value, shown[field], "{field}");
        }
    }
    let root = format!("{ROOT}/acme/receipts");
    let late = partner
        .draft(&partner.allocation("BTC", "1"), "cleared")
        .set("nonce", "lost");
    place.publish(&[late.message(Expect::Refused("nonce_voided"))]).await;
    until("it waits", PATIENCE, async || {
        (count(&place.db().await, "parked").await == 1).then_some(())
    })
    .await;
    // One that an operator has made unusable has a receipt that says since when; its shape is the document's, as every answer's.
    let void = [
        "nonce",
        "void",
        "--enterprise-id",
        "acme",
        "--nonce",
        "lost",
        "--reason",
        "a lost laptop",
    ];
    ask(&place, &void).await.document(0);
    let voided = api.get(&format!("{root}/lost"), &acme).await;
    assert!(voided.ok()["voidedAt"].is_string(), "{voided:?}");
    // It was woken to be refused, and the books are read when it has been.
    until("it is refused", PATIENCE, async || {
        (count(&place.db().await, "parked").await == 0).then_some(())
    })
    .await;
    assert_eq!(api.get(&format!("{root}/never"), &acme).await.refusal(404), "not_found");
    for hostile in [
        "/a%00b",
        &format!("/{}", "n".repeat(257)),
        "?nonce=",
        "?nonce=%00",
        "?x=1",
        "?nonce=a&nonce=b",
        "",
        "/%FF",
    ] {
        let answer = api.get(&format!("{root}{hostile}"), &acme).await;
        assert_eq!(answer.refusal(400), "invalid_request", "{hostile}");
    }
    api.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_paths_and_methods_are_refused_in_one_shape() {
    let (place, _, reservations, api) = some("api_hostile", 1, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let id = reservations[0].id;
    for (method, path, status) in [
        ("GET", "/".to_owned(), 404),
        ("GET", "/livez".to_owned(), 404),
        ("GET", format!("{ROOT}/acme"), 404),
        ("GET", format!("{ROOT}/acme/partners/allocations/"), 404),
        ("GET", format!("{ROOT}/acme/partners/allocations/{id}/x"), 404),
        ("GET", format!("{ROOT}//partners/allocations"), 403),
        ("GET", format!("{ROOT}/%FF/partners/allocations"), 400),
        ("GET", format!("{ROOT}/acme%00/partners/allocations"), 403),
        ("GET", format!("{ROOT}/acme%2Fx/partners/allocations"), 403),
        ("GET", format!("{ROOT}/{}/partners/allocations", "a".repeat(5_000)), 403),
        ("GET", format!("{ROOT}/acme'--/partners/allocations"), 403),
        ("GET", format!("{ROOT}/acme/partners/allocations/{{{id}}}"), 400),
        ("GET", format!("{ROOT}/acme/partners/allocations/{}", id.simple()), 400),
        ("GET", format!("{ROOT}/acme/partners/allocations/%00"), 400),
        ("GET", format!("{ROOT}/acme/partners/allocations/1%27%20OR%201=1"), 400),
        ("POST", format!("{ROOT}/acme/partners/allocations"), 405),
        ("DELETE", format!("{ROOT}/acme/partners/allocations/{id}"), 405),
        ("GET", format!("{ROOT}/acme/partners/deallocations"), 405),
        ("PUT", format!("{ROOT}/acme/partners/balances"), 405),
        ("PATCH", "/openapi.json".to_owned(), 405),
    ] {
        let answer = api.ask(method, &path, &acme, b"").await;
        let name = answer.refusal(status).to_owned();
        assert!(
            ["not_found", "invalid_request", "forbidden", "method_not_allowed"].contains(&name.as_str()),
            "{answer:?}"
        );
        assert_eq!(answer.header("allow").is_some(), status == 405, "{method} {path}");
    }
    let head = api
        .ask("HEAD", &format!("{ROOT}/acme/partners/allocations/{id}"), &acme, b"")
        .await;
    assert_eq!((head.status, &head.body), (200, &json!("")));
    let document = api.get("/openapi.json", "").await;
    assert_eq!(document.ok()["openapi"], "3.1.0");
}
