//! The operator's desk: every command on dead letters, what it answers, what it refuses, and what it must survive.

use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    amqp::Message,
    auditor::{Expect, Reservation, event_id, sha256},
    commands::Answer,
    partner::Partner,
    support::{PATIENCE, Place, until},
};

/// The worker with its collector.
const COLLECTS: (&str, &str) = ("SETTLED_DEAD_LETTERS__COLLECT", "true");

// Staging ------------------------------------------------------------------------------------------------------------

/// Rows as no worker wrote them: enough to be listed and counted. Three partners, five reasons, every state, an hour apart.
async fn seed(db: &Client, rows: i64) {
    let sql = "
        INSERT INTO settled.dead_letters (
            id, state, exchange, routing_key, digest, format, properties, body, enterprise_id, nonce, allocation_id, reason,
            detail, group_id, made_by, first_failed_at, last_failed_at, collected_at, run_id, discarded_at
        )
        SELECT md5('id' || n)::uuid, s.state, 'settlement.updates', p.name || '.allocation.update',
               sha256(convert_to('body ' || n, 'UTF8')), 1, '{}', convert_to('body ' || n, 'UTF8'), p.name, 'nonce-' || n,
               md5('allocation' || n / 2)::uuid, r.reason, 'detail ' || n, left(md5(p.name || r.reason), 16), 'settled',
               timestamptz '2026-01-01 00:00Z' + n * interval '1 hour',
               timestamptz '2026-01-01 00:30Z' + n * interval '1 hour', now(),
               CASE WHEN s.state = 'due' THEN 1 END, CASE WHEN s.state = 'discarded' THEN now() END
        FROM generate_series(1, $1::bigint) AS n
        CROSS JOIN LATERAL (SELECT 'partner-' || n % 3 AS name) AS p
        CROSS JOIN LATERAL (
            SELECT (ARRAY['signature_mismatch', 'unknown_partner', 'invalid_field', 'already_settled', 'internal']
                   )[1 + n / 3 % 5] AS reason
        ) AS r
        CROSS JOIN LATERAL (
            SELECT CASE n % 10 WHEN 1 THEN 'due' WHEN 2 THEN 'discarded' WHEN 3 THEN 'settled' WHEN 4 THEN 'parked'
                   ELSE 'open' END AS state
        ) AS s";
    db.execute(sql, &[&rows]).await.expect("rows");
}

/// Allocations whose partner clears them with a key that is not registered yet: so many dead letters.
struct Stranded {
    reservations: Vec<Reservation>,
    messages: Vec<Message>,
}

/// Registers a partner without its key, reserves for it, and makes what it says.
async fn strand(place: &Place, enterprise: &str, count: usize) -> Stranded {
    let partner = Partner::new(enterprise);
    let add = ["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"];
    assert!(place.run(&add).await.status.success());
    place.connect_partner(&partner).await;
    place.deposit(&partner, "BTC", "1000000000").await;
    let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", "7")).collect();
    place.reserve(&reservations).await;
    let messages = reservations
        .iter()
        .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
        .collect();
    Stranded { reservations, messages }
}

async fn count(db: &Client, what: &str) -> i64 {
    db.query_one(&format!("SELECT count(*) FROM settled.{what}"), &[])
        .await
        .expect(what)
        .get(0)
}

/// Waits until the collector has put so many messages into the table.
async fn collected(db: &Client, messages: i64) {
    until("the dead letters are collected", 2 * PATIENCE, async || {
        (count(db, "dead_letters").await >= messages).then_some(())
    })
    .await;
}

async fn desk(place: &Place, arguments: &[&str]) -> Answer {
    let arguments = [&["dead-letters"], arguments, &["--json"]].concat();
    Answer::of(&place.run(&arguments).await)
}

/// What a person sees.
async fn screen(place: &Place, arguments: &[&str]) -> String {
    let output = place.run(&[&["dead-letters"], arguments].concat()).await;
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

async fn audit(place: &Place, arguments: &[&str]) -> Vec<Value> {
    let arguments = [&["audit", "list"], arguments, &["--json"]].concat();
    Answer::of(&place.run(&arguments).await).lines(0)
}

/// The books prove right, and no allocation settled twice.
async fn books_are_right(place: &Place) {
    let checked = place.json(&["ledger", "check"]).await;
    assert_eq!(checked["ok"], true, "{checked}");
}

// List, groups, stats --------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_list_comes_in_pages_and_by_every_filter() {
    let place = Place::new("desk_list").await;
    let db = place.db().await;
    seed(&db, 120).await;
    let ids = async |arguments: &[&str]| -> Vec<String> {
        let lines = desk(&place, &[&["list", "--limit", "1000"], arguments].concat())
            .await
            .lines(0);
        lines
            .iter()
            .map(|line| line["id"].as_str().expect("an id").to_owned())
            .collect()
    };
    let expected = async |condition: &str| -> Vec<String> {
        let sql = format!("SELECT id::text FROM settled.dead_letters WHERE {condition} ORDER BY seq");
        let rows = db.query(&sql, &[]).await.expect("rows");
        rows.iter().map(|row| row.get(0)).collect()
    };
    let allocation: Uuid = db
        .query_one(
            "SELECT allocation_id FROM settled.dead_letters WHERE nonce = 'nonce-40'",
            &[],
        )
        .await
        .expect("a row")
        .get(0);
    let allocation = allocation.to_string();
    let by_allocation = format!("allocation_id = '{allocation}'");
    let group: String = db
        .query_one("SELECT group_id FROM settled.dead_letters WHERE nonce = 'nonce-5'", &[])
        .await
        .expect("a row")
        .get(0);
    let by_group = format!("state IN ('open', 'due') AND group_id = '{group}'");
    let finals = "reason IN ('invalid_field', 'already_settled')";
    let waits = "state IN ('open', 'due')";
    let cases: Vec<(Vec<&str>, String)> = vec![
        (vec![], waits.to_owned()),
        (vec!["--state", "all"], "true".to_owned()),
        (
            vec!["--state", "settled", "--state", "parked"],
            "state IN ('settled', 'parked')".to_owned(),
        ),
        (vec!["--reason", "internal"], format!("{waits} AND reason = 'internal'")),
        (
            vec!["--reason-code", "internal"],
            format!("{waits} AND reason = 'internal'"),
        ),
        (
            vec!["--reason", "internal", "--reason", "unknown_partner"],
            format!("{waits} AND reason IN ('internal', 'unknown_partner')"),
        ),
        (vec!["--final"], format!("{waits} AND {finals}")),
        (vec!["--not-final"], format!("{waits} AND NOT {finals}")),
        (vec!["--final", "--reason", "internal"], "false".to_owned()),
        (
            vec!["--partner", "partner-1"],
            format!("{waits} AND enterprise_id = 'partner-1'"),
        ),
        (vec!["--allocation", &allocation, "--state", "all"], by_allocation),
        (vec!["--nonce", "nonce-50"], format!("{waits} AND nonce = 'nonce-50'")),
        (vec!["--group", &group], by_group),
        (
            vec!["--since", "2026-01-02T00:30:00Z", "--until", "2026-01-03T00:30:00Z"],
            format!("{waits} AND last_failed_at >= '2026-01-02 00:30Z' AND last_failed_at < '2026-01-03 00:30Z'"),
        ),
        (vec!["--since", "1h"], "false".to_owned()),
        (
            vec![
                "--partner",
                "partner-2",
                "--reason",
                "internal",
                "--until",
                "2026-01-04T00:00:00Z",
                "--state",
                "open",
            ],
            "state = 'open' AND enterprise_id = 'partner-2' AND reason = 'internal' AND last_failed_at < '2026-01-04'"
                .to_owned(),
        ),
    ];
    for (arguments, condition) in cases {
        assert_eq!(ids(&arguments).await, expected(&condition).await, "{arguments:?}");
    }

    let mut paged = Vec::new();
    let mut after = "0".to_owned();
    loop {
        let page = desk(&place, &["list", "--limit", "7", "--after", &after])
            .await
            .lines(0);
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 7);
        after = last["cursor"].to_string();
        paged.extend(page.iter().map(|line| line["id"].as_str().expect("an id").to_owned()));
    }
    assert_eq!(paged, ids(&[]).await, "pages are the list");

    let line = desk(&place, &["list", "--nonce", "nonce-50"]).await.document(0);
    assert_eq!(line["state"], "open");
    assert_eq!(line["reason"], "unknown_partner");
    assert_eq!((&line["class"], &line["final"]), (&json!(401), &json!(false)));
    assert_eq!(line["detail"], "detail 50");
    assert_eq!(line["enterpriseId"], "partner-2");
    assert_eq!(line["routingKey"], "partner-2.allocation.update");
    assert_eq!(line["messageDigest"], hex::encode(sha256(b"body 50")));
    assert_eq!(line["firstFailedAt"], "2026-01-03T02:00:00.000Z");
    assert_eq!(line["lastFailedAt"], "2026-01-03T02:30:00.000Z");
    assert_eq!(line["timesSeen"], 1);
    assert!(line.get("body").is_none(), "a list has no bodies");

    let text = screen(&place, &["list", "--limit", "2"]).await;
    assert!(
        text.contains("failed last") && text.contains("there are more: --after "),
        "{text}"
    );
    assert_eq!(screen(&place, &["list", "--nonce", "never"]).await, "no dead letter\n");
}

#[tokio::test]
async fn wrong_filters_are_usage_errors() {
    let place = Place::new("desk_usage").await;
    for arguments in [
        &["list", "--reason", "bad"][..],
        &["list", "--state", "bad"],
        &["list", "--since", "yesterday"],
        &["list", "--final", "--not-final"],
        &["list", "--partner", "a.b"],
        &["list", "--allocation", "7"],
        &["list", "--limit", "0"],
        &["show", "xyz"],
        &["show", "3f2"],
        &["discard", "--partner", "acme"],
        &["discard", "--reason", "why"],
        &["discard", "1", "--partner", "acme", "--reason", "why"],
        &["restore", "--reason", "why"],
        &["discard", "--partner", "acme", "--reason", " "],
        &["purge", "--reason", "why"],
        &["replay", "1"],
        &["replay", "1", "--reason", "why", "--rate", "0"],
        &["replay", "1", "--reason", "why", "--canary", "0"],
        &["runs", "cancel", "1"],
        &["plan", "--limit", "0"],
    ] {
        let (message, _) = desk(&place, arguments).await.refusal(2);
        assert!(!message.is_empty(), "{arguments:?}");
    }
    for arguments in [
        &["show", "3f25"][..],
        &["plan", "--partner", "acme"],
        &["replay", "1", "--reason", "why"],
        &["discard", "1", "--reason", "why"],
        &["runs", "show", "1"],
        &["runs", "cancel", "1", "--reason", "why"],
        &["runs", "resume", "1", "--reason", "why"],
    ] {
        let (_, hint) = desk(&place, arguments).await.refusal(1);
        assert!(!hint.is_empty(), "{arguments:?} has a hint");
    }
}

#[tokio::test]
async fn groups_and_stats_count_what_there_is() {
    let place = Place::new("desk_groups").await;
    let db = place.db().await;
    seed(&db, 300).await;
    let document = desk(&place, &["groups"]).await.document(0);
    let groups = document["groups"].as_array().expect("groups");
    let sql = "
        SELECT group_id, enterprise_id, reason, count(*), min(first_failed_at)::text, max(last_failed_at)::text
        FROM settled.dead_letters WHERE state = 'open' GROUP BY 1, 2, 3";
    let rows = db.query(sql, &[]).await.expect("groups");
    assert_eq!(groups.len(), rows.len());
    assert_eq!(document["total"], rows.len());
    for row in rows {
        let group = groups
            .iter()
            .find(|group| group["group"] == row.get::<_, &str>(0))
            .expect("the group");
        assert_eq!(group["enterpriseId"], row.get::<_, &str>(1));
        assert_eq!(group["reason"], row.get::<_, &str>(2));
        assert_eq!(group["messages"], row.get::<_, i64>(3));
        let example = group["example"].as_str().expect("an id");
        let shown = desk(&place, &["show", example]).await.document(0);
        assert_eq!(shown["deadLetter"]["detail"], group["detail"]);
        assert_eq!(shown["deadLetter"]["group"], group["group"]);
        let listed = desk(
            &place,
            &["list", "--state", "open", "--limit", "1000", "--group", row.get(0)],
        )
        .await
        .lines(0);
        assert_eq!(group["messages"], listed.len());
        let edge = |field: &str, pick: fn(&mut dyn Iterator<Item = &str>) -> Option<String>| {
            pick(&mut listed.iter().filter_map(|line| line[field].as_str())).expect("a time")
        };
        assert_eq!(
            group["firstFailedAt"],
            edge("firstFailedAt", |times| times.min().map(str::to_owned))
        );
        assert_eq!(
            group["lastFailedAt"],
            edge("lastFailedAt", |times| times.max().map(str::to_owned))
        );
    }
    let sizes: Vec<i64> = groups.iter().filter_map(|group| group["messages"].as_i64()).collect();
    assert!(
        sizes.windows(2).all(|pair| pair[0] >= pair[1]),
        "the largest first: {sizes:?}"
    );
    let one = desk(&place, &["groups", "--partner", "partner-1", "--reason", "internal"])
        .await
        .document(0);
    assert_eq!(one["total"], 1);
    let first = desk(&place, &["groups", "--limit", "1"]).await.document(0);
    assert_eq!(
        (first["groups"].as_array().map(Vec::len), &first["total"]),
        (Some(1), &document["total"])
    );
    assert!(
        screen(&place, &["groups", "--limit", "1"])
            .await
            .contains("smaller groups: --limit")
    );

    let stats = desk(&place, &["stats", "--state", "all"]).await.document(0);
    assert_eq!(stats["messages"], 300);
    let reasons = stats["reasons"].as_array().expect("reasons");
    for (state, reason) in [
        ("open", "internal"),
        ("due", "signature_mismatch"),
        ("discarded", "invalid_field"),
    ] {
        let sql = "SELECT count(*) FROM settled.dead_letters WHERE state = $1 AND reason = $2";
        let expected: i64 = db.query_one(sql, &[&state, &reason]).await.expect("a count").get(0);
        let found = reasons
            .iter()
            .find(|line| line["state"] == state && line["reason"] == reason)
            .map(|line| line["messages"].clone());
        assert_eq!(found, Some(json!(expected)), "{state} {reason}");
    }
    let partners: i64 = stats["partners"]
        .as_array()
        .expect("partners")
        .iter()
        .filter_map(|line| line["messages"].as_i64())
        .sum();
    assert_eq!(partners, 300);
    assert_eq!(stats["oldestFailedAt"], "2026-01-01T01:00:00.000Z");
    let open = desk(&place, &["stats"]).await.document(0);
    assert!(
        open["reasons"]
            .as_array()
            .is_some_and(|lines| lines.iter().all(|line| line["state"] == "open"))
    );
}

// Show and export ------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn one_dead_letter_tells_everything() {
    let place = Place::new("desk_show").await;
    let db = place.db().await;
    let Stranded { reservations, messages } = strand(&place, "acme", 1).await;
    let no_text = Message::new(
        "acme.allocation.update",
        [0xff, 0x00, 0xfe],
        Expect::Refused("malformed_message"),
    );
    place.publish(&[messages[0].clone(), no_text.clone()]).await;
    let worker = place.ready_worker(&[COLLECTS]).await;
    collected(&db, 2).await;

    let digest = hex::encode(sha256(&messages[0].body));
    let shown = desk(&place, &["show", &digest]).await.document(0);
    let dead_letter = &shown["deadLetter"];
    assert_eq!(dead_letter["reason"], "signature_mismatch");
    assert_eq!(dead_letter["enterpriseId"], "acme");
    assert_eq!(dead_letter["allocationId"], json!(reservations[0].id));
    assert_eq!(dead_letter["messageDigest"], digest);
    assert_eq!(dead_letter["madeBy"], "settled");
    assert_eq!(shown["allocation"]["status"], "reserved");
    assert_eq!(shown["properties"]["content_type"], "application/json");
    assert!(shown.get("body").is_none(), "only with --body");
    let name = format!("update.rejected|acme.allocation.update|{digest}|signature_mismatch");
    assert_eq!(shown["told"]["eventId"], event_id(&name));
    assert_eq!(shown["told"]["type"], "update.rejected");
    let told = shown["told"]["eventId"].as_str().expect("an id").to_owned();
    until("the partner was told so", PATIENCE, async || {
        place
            .events
            .seen()
            .iter()
            .any(|event| event.message_id() == Some(&told))
            .then_some(())
    })
    .await;
    assert!(
        shown["advice"]
            .as_str()
            .is_some_and(|text| text.contains("registered key"))
    );

    let id = dead_letter["id"].as_str().expect("an id");
    let expected = &sha256(&[b"acme.allocation.update".as_slice(), &[0], &sha256(&messages[0].body)].concat())[..16];
    assert_eq!(id, Uuid::from_slice(expected).expect("16 bytes").to_string());
    for name in [id, &id[..13], &id[..9].to_uppercase()] {
        assert_eq!(
            desk(&place, &["show", name]).await.document(0)["deadLetter"]["id"],
            id,
            "{name}"
        );
    }
    let with_body = desk(&place, &["show", id, "--body"]).await.document(0);
    assert_eq!(with_body["bodyEncoding"], "utf-8");
    assert_eq!(
        with_body["body"],
        String::from_utf8(messages[0].body.clone()).expect("text")
    );
    let no_text = desk(&place, &["show", &hex::encode(sha256(&no_text.body)), "--body"])
        .await
        .document(0);
    assert_eq!(
        (&no_text["bodyEncoding"], &no_text["body"]),
        (&json!("base64"), &json!("/wD+"))
    );
    let text = screen(&place, &["show", id]).await;
    for part in [
        "signature_mismatch (class 401; not final",
        "what the partner must do",
        "7 BTC, reserved now",
        &told,
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    // What is known of it elsewhere.
    let life = place.json(&["timeline", &reservations[0].id.to_string()]).await;
    let whats: Vec<&str> = life["timeline"]
        .as_array()
        .expect("moments")
        .iter()
        .filter_map(|moment| moment["what"].as_str())
        .collect();
    assert_eq!(whats, ["reserved", "transfer", "dead-lettered", "collected"]);
    worker.terminate().await;
    books_are_right(&place).await;
}

#[tokio::test]
async fn several_messages_of_one_beginning_are_not_guessed_at() {
    let place = Place::new("desk_prefix").await;
    let db = place.db().await;
    seed(&db, 2).await;
    let sql = "
        UPDATE settled.dead_letters
        SET id = overlay(id::text PLACING 'abcdabcd' FROM 1)::uuid, digest = sha256('one body')";
    db.execute(sql, &[]).await.expect("two of one beginning");
    for name in ["abcdabcd", &hex::encode(sha256(b"one body"))] {
        let (message, hint) = desk(&place, &["show", name]).await.refusal(1);
        assert!(
            message.contains("several") && hint.contains("more of the id"),
            "{message} {hint}"
        );
    }
}

#[tokio::test]
async fn an_export_is_enough_to_publish_again() {
    let place = Place::new("desk_export").await;
    let db = place.db().await;
    let Stranded { messages, .. } = strand(&place, "acme", 3).await;
    let headers = |message: Message, n: usize| {
        message.with(|properties| {
            properties
                .with_message_id(format!("message {n}").into())
                .with_correlation_id("café".into())
                .with_priority(3)
        })
    };
    let mut messages: Vec<Message> = messages
        .into_iter()
        .enumerate()
        .map(|(n, message)| headers(message, n))
        .collect();
    messages.push(Message::new(
        "acme.allocation.update",
        vec![0xff; 200],
        Expect::Refused("malformed_message"),
    ));
    place.publish(&messages).await;
    let worker = place.ready_worker(&[COLLECTS]).await;
    collected(&db, 4).await;
    let exported = desk(&place, &["export", "--partner", "acme", "--operator", "ada"])
        .await
        .lines(0);
    assert_eq!(exported.len(), 4);
    for message in &messages {
        let digest = hex::encode(sha256(&message.body));
        let line = exported
            .iter()
            .find(|line| line["messageDigest"] == digest)
            .expect("the message");
        assert_eq!(line["routingKey"], message.routing_key);
        assert_eq!(line["exchange"], "settlement.updates");
        let body = line["body"].as_str().expect("base64");
        let sql = "SELECT decode($1, 'base64')";
        let bytes: Vec<u8> = db.query_one(sql, &[&body]).await.expect("base64").get(0);
        assert_eq!(bytes, message.body);
        let properties = &line["properties"];
        let message_id = message.properties.message_id().as_ref().map(|text| text.as_str());
        let correlation_id = message.properties.correlation_id().as_ref().map(|text| text.as_str());
        assert_eq!(properties["message_id"].as_str(), message_id);
        assert_eq!(properties["correlation_id"].as_str(), correlation_id);
        assert_eq!(properties["delivery_mode"], 2);
        assert_eq!(properties["content_type"], "application/json");
    }
    let acts = audit(&place, &["--act", "export"]).await;
    assert_eq!(acts.len(), 1);
    assert_eq!(
        (&acts[0]["operator"], &acts[0]["filters"]["partner"]),
        (&json!("ada"), &json!("acme"))
    );
    assert_eq!(acts[0]["outcome"]["selected"], 4);
    worker.terminate().await;
}
