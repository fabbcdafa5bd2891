//! `settled currency`: partners that call the currencies by symbols of their own, from the message to the books and the world.

use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use super::api_reads::{ROOT, token};
use crate::kit::{
    amqp::Message,
    api::Api,
    auditor::{Expect, Reservation},
    command::{Answer, add_partner, ask, ask_with, ledger},
    partner::Partner,
    support::{COLLECTS, Ground, PATIENCE, Place, count, until},
};

async fn map(ground: &Ground, symbol: &str, currency: &str, flags: &[&str]) -> Answer {
    let map = [
        "currency",
        "map",
        "--enterprise-id",
        "acme",
        "--symbol",
        symbol,
        "--currency",
        currency,
    ];
    ask(ground, &[&map, flags].concat()).await
}

async fn unmap(ground: &Ground, symbol: &str) -> Answer {
    ask(
        ground,
        &["currency", "unmap", "--enterprise-id", "acme", "--symbol", symbol],
    )
    .await
}

/// What a partner says of a reservation, in its own words.
fn named(partner: &Partner, reservation: &Reservation, status: &str, symbol: &str, expect: Expect) -> Message {
    partner
        .draft(reservation, status)
        .set("amount", json!({"currency": symbol, "quantity": reservation.quantity}))
        .message(expect)
}

fn nonce(message: &Message) -> String {
    let body: Value = serde_json::from_slice(&message.body).expect("JSON");
    body["nonce"].as_str().expect("a nonce").to_owned()
}

async fn place_with(test: &str) -> (Place, Partner) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    place.deposit(&partner, "ETH", "1000").await;
    (place, partner)
}

async fn receipt(place: &Place, message: &Message) -> (Value, Value) {
    let nonce = nonce(message);
    let of = ["receipt", "--enterprise-id", "acme", "--nonce", &nonce];
    let receipt = ask(place, &of).await.document(0);
    (receipt["verdict"].clone(), receipt["reason"].clone())
}

async fn signatures(place: &Place) -> Value {
    let check = ask(place, &["ledger", "check", "--signatures"]).await;
    let code = check.code.expect("it ends");
    check.document(code)
}

#[tokio::test]
async fn symbols_are_mapped_changed_and_taken_away() {
    let ground = ledger("currency_map").await;
    map(&ground, "XBT", "BTC", &[])
        .await
        .refused(1, "no partner acme is registered");
    add_partner(&ground, "acme").await;
    assert_eq!(ask(&ground, &["currency", "list"]).await.document(0), json!([]));
    let added = map(&ground, "XBT", "BTC", &["--reason", "ticket 9"]).await.document(0);
    assert_eq!(
        (&added["result"], &added["symbol"], &added["currency"], &added["until"]),
        (&json!("added"), &json!("XBT"), &json!("BTC"), &Value::Null)
    );
    assert_eq!(map(&ground, "XBT", "BTC", &[]).await.document(0)["result"], "exists");
    // Two symbols for one currency; one symbol for two is a change, and must be meant.
    assert_eq!(map(&ground, "XXBT", "BTC", &[]).await.document(0)["result"], "added");
    map(&ground, "XBT", "ETH", &[])
        .await
        .refused(1, "XBT of partner acme means BTC");
    let replaced = map(&ground, "XBT", "ETH", &["--replace"]).await.document(0);
    assert_eq!(
        (&replaced["result"], &replaced["currency"]),
        (&json!("updated"), &json!("ETH"))
    );
    // What is compared exactly is stored exactly.
    assert_eq!(map(&ground, "xbt", "BTC", &[]).await.document(0)["result"], "added");

    let list = ask(&ground, &["currency", "list", "--partner", "acme"])
        .await
        .document(0);
    let pairs = |list: &Value| -> Vec<(String, String, bool)> {
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let rows = list.as_array().expect("a list").iter();
        rows.map(|row| (text(&row["symbol"]), text(&row["currency"]), row["until"].is_null()))
            .collect()
    };
    let row = |symbol: &str, currency: &str, counts| (symbol.to_owned(), currency.to_owned(), counts);
    assert_eq!(
        pairs(&list),
        [
            row("XBT", "ETH", true),
            row("XXBT", "BTC", true),
            row("xbt", "BTC", true)
        ]
    );
    let gone = unmap(&ground, "XXBT").await.document(0);
    assert_eq!((&gone["result"], gone["until"].is_string()), (&json!("removed"), true));
    unmap(&ground, "XXBT")
        .await
        .refused(1, "XXBT of partner acme is not mapped");
    let past = ask(&ground, &["currency", "list", "--history"]).await.document(0);
    assert_eq!(
        pairs(&past),
        [
            row("XBT", "BTC", false),
            row("XBT", "ETH", true),
            row("XXBT", "BTC", false),
            row("xbt", "BTC", true)
        ]
    );
    ask(&ground, &["currency", "list", "--partner", "nobody"])
        .await
        .refused(1, "no partner nobody is registered");
    for wrong in ["", "X BT", "\u{20bf}"] {
        map(&ground, wrong, "BTC", &[]).await.refused(2, "1 to 64 letters");
    }

    let acts = ask(&ground, &["audit", "list", "--act", "currency map"]).await.lines(0);
    assert_eq!(acts.len(), 4, "what changes nothing is not written down: {acts:?}");
    assert_eq!(
        (&acts[1]["filters"], &acts[1]["outcome"]),
        (
            &json!({"enterpriseId": "acme", "symbol": "XBT"}),
            &json!({"currency": "ETH", "was": "BTC"})
        )
    );
    assert_eq!(acts[3]["why"], "ticket 9");
    let acts = ask(&ground, &["audit", "list", "--act", "currency unmap"])
        .await
        .lines(0);
    assert_eq!(acts[0]["outcome"], json!({"was": "BTC"}));

    // Whatever program asks: nobody writes a meaning into the past, or takes one out of it.
    let db = ground.db().await;
    for refused in [
        "DELETE FROM settled.currency_symbols",
        "TRUNCATE settled.currency_symbols",
        "UPDATE settled.currency_symbols SET currency = 'ETH'",
        "UPDATE settled.currency_symbols SET since = '2020-01-01'",
        "UPDATE settled.currency_symbols SET until = NULL WHERE symbol = 'XXBT'",
        "INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since) VALUES ('acme', 'XBT', 'BTC', now())",
    ] {
        assert!(db.batch_execute(refused).await.is_err(), "{refused}");
    }
    let backdated = "INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since, until)
                     VALUES ('acme', 'NEW', 'BTC', '2020-01-01', '2021-01-01')
                     RETURNING since > now() - interval '1 minute' AND until IS NULL";
    let is_now: bool = db.query_one(backdated, &[]).await.expect("a row").get(0);
    assert!(is_now, "it counts from now on, whatever was said");
}

#[tokio::test]
async fn a_currency_of_a_map_is_no_slip() {
    let ground = ledger("currency_slip").await;
    let partner = Partner::new("acme");
    crate::kit::command::register(&ground, &partner).await;
    let client = partner.client.to_string();
    crate::kit::command::deposit(&ground, &client, "BTC", "1", "r")
        .await
        .document(0);
    let (message, hint) = map(&ground, "XBT", "BCT", &[]).await.refusal(2);
    assert!(
        message.contains("but BTC; nothing was mapped") && hint.contains("--new-currency"),
        "{message} {hint}"
    );
    assert_eq!(
        map(&ground, "XBT", "BCT", &["--new-currency"]).await.document(0)["result"],
        "added"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_speaks_in_its_own_words_and_the_books_in_theirs() {
    let (place, partner) = place_with("currency_story").await;
    for (symbol, currency) in [("XBT", "BTC"), ("XXBT", "BTC"), ("XETH", "ETH")] {
        map(&place, symbol, currency, &[]).await.document(0);
    }
    let reservations: Vec<Reservation> = ["BTC", "BTC", "ETH", "BTC", "ETH"]
        .into_iter()
        .map(|currency| partner.allocation(currency, "7"))
        .collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&COLLECTS).await;
    // Two symbols for one currency, and the currency's own name beside them.
    let said = [
        ("XBT", "cleared"),
        ("XXBT", "released"),
        ("XETH", "cleared"),
        ("BTC", "cleared"),
        ("ETH", "released"),
    ];
    let messages: Vec<Message> = reservations
        .iter()
        .zip(said)
        .map(|(reservation, (symbol, status))| named(&partner, reservation, status, symbol, Expect::Settles))
        .collect();
    // Judged before, without effect.
    let text = String::from_utf8(messages[0].body.clone()).expect("UTF-8");
    let explain = ["explain", "--routing-key", &messages[0].routing_key];
    let explained = ask_with(&place, &explain, &text).await.document(0);
    assert_eq!(
        (
            &explained["verdict"],
            &explained["partnerSymbol"],
            &explained["transfers"][0]["currency"]
        ),
        (&json!("settled"), &json!("XBT"), &json!("BTC")),
        "{explained}"
    );
    place.publish(&messages).await;
    let db = place.db().await;
    until("all settle", PATIENCE, async || {
        (count(&db, "settlements").await == 5).then_some(())
    })
    .await;
    for (reservation, (symbol, _)) in reservations.iter().zip(said) {
        let id = reservation.id.to_string();
        let shown = ask(&place, &["allocation", "show", &id, "--history"]).await.document(0);
        let view = &shown["allocation"];
        let expected = (symbol != reservation.currency).then_some(symbol);
        assert_eq!(
            view["amount"],
            json!({"currency": reservation.currency, "quantity": "7"})
        );
        assert_eq!(
            view.get("partnerSymbol"),
            expected.map(|symbol| json!(symbol)).as_ref(),
            "{view}"
        );
        assert_eq!(shown["transfers"][1]["currency"], json!(reservation.currency));
        let timeline = ask(&place, &["timeline", &id]).await.document(0).to_string();
        let words = format!(", named by the partner in {symbol}");
        assert_eq!(timeline.contains(&words), symbol != reservation.currency, "{timeline}");
    }
    // The same statement in other words that mean the same is a copy; by another currency it is refused.
    let again = named(&partner, &reservations[0], "cleared", "XXBT", Expect::Any);
    let wrong = named(
        &partner,
        &reservations[0],
        "cleared",
        "XETH",
        Expect::Refused("currency_mismatch"),
    );
    place.publish(&[again.clone(), wrong.clone()]).await;
    until("both are judged", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.receipts";
        (db.query_one(sql, &[]).await.expect(sql).get::<_, i64>(0) == 7).then_some(())
    })
    .await;
    assert_eq!(receipt(&place, &again).await, (json!("duplicate"), Value::Null));
    assert_eq!(
        receipt(&place, &wrong).await,
        (json!("rejected"), json!("currency_mismatch"))
    );

    // A partner asks for its own by its own words; what is told speaks of the system's currency.
    let api = Api::start(&place, &[]).await;
    let bearer = token(&place, "acme", "partner", &[]).await;
    for (currencies, expected) in [
        ("XBT", 3),
        ("XXBT", 3),
        ("BTC", 3),
        ("XETH", 2),
        ("XETH,XBT", 5),
        ("USD", 0),
    ] {
        let path = format!("{ROOT}/acme/partners/allocations?currencies={currencies}");
        let answer = api.get(&path, &bearer).await;
        let list = answer.ok()["allocations"].as_array().expect("a list").clone();
        assert_eq!(list.len(), expected, "{currencies}");
        assert!(
            list.iter()
                .all(|one| ["BTC", "ETH"].contains(&one["amount"]["currency"].as_str().unwrap_or_default()))
        );
    }
    drop(api);
    assert_eq!(
        signatures(&place).await["signatures"],
        json!({"verified": 5, "forged": 0, "next": null})
    );
    place.settle_up(worker).await;
}

/// A message that waits is judged by the map of the moment in which it is judged; what the map held up is replayed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_map_that_changes_while_messages_wait() {
    let (place, partner) = place_with("currency_waits").await;
    map(&place, "XBT", "ETH", &[]).await.document(0);
    map(&place, "OLD", "BTC", &[]).await.document(0);
    let late: Vec<Reservation> = (0..3).map(|_| partner.allocation("BTC", "5")).collect();
    let messages = [
        named(&partner, &late[0], "cleared", "XBT", Expect::Settles),
        named(&partner, &late[1], "cleared", "OLD", Expect::Any),
        named(&partner, &late[2], "cleared", "ZBT", Expect::Any),
    ];
    let worker = place.ready_worker(&COLLECTS).await;
    place.publish(&messages).await;
    let db = place.db().await;
    until("all wait", PATIENCE, async || {
        (count(&db, "parked").await == 3).then_some(())
    })
    .await;
    map(&place, "XBT", "BTC", &["--replace"]).await.document(0);
    unmap(&place, "OLD").await.document(0);
    place.reserve(&late).await;
    until("all are judged", PATIENCE, async || {
        (count(&db, "parked").await == 0).then_some(())
    })
    .await;
    assert_eq!(receipt(&place, &messages[0]).await, (json!("settled"), Value::Null));
    for refused in &messages[1..] {
        assert_eq!(
            receipt(&place, refused).await,
            (json!("rejected"), json!("currency_mismatch"))
        );
    }
    // A replay settles it once the map is mended; a plan says so before.
    until("both are kept", PATIENCE, async || {
        (count(&db, "dead_letters").await == 2).then_some(())
    })
    .await;
    map(&place, "OLD", "BTC", &[]).await.document(0);
    let plan = ask(&place, &["dead-letters", "plan", "--reason", "currency_mismatch"])
        .await
        .document(0);
    assert_eq!(
        plan["wouldMove"],
        json!([{"currency": "BTC", "quantity": "5"}]),
        "{plan}"
    );
    let number = plan["plan"].to_string();
    let replay = [
        "dead-letters",
        "replay",
        &number,
        "--reason",
        "the map was wrong",
        "--yes",
    ];
    let replayed = ask(&place, &replay).await;
    assert_eq!(replayed.code, Some(0), "{}", replayed.all());
    assert_eq!(receipt(&place, &messages[1]).await, (json!("settled"), Value::Null));
    assert_eq!(
        receipt(&place, &messages[2]).await,
        (json!("rejected"), json!("currency_mismatch"))
    );
    // What is settled is settled, whatever becomes of the map: its copies are copies, and its signatures hold.
    unmap(&place, "XBT").await.document(0);
    map(&place, "XBT", "ETH", &[]).await.document(0);
    place.publish(&messages[..1]).await;
    place.rest().await;
    assert_eq!(receipt(&place, &messages[0]).await, (json!("settled"), Value::Null));
    assert_eq!(
        signatures(&place).await["signatures"],
        json!({"verified": 2, "forged": 0, "next": null})
    );
    place.settle_up(worker).await;
}

/// Ours is only what the map lacks; and what was refused for good, before there was a map, stays refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_fault_an_unknown_symbol_is() {
    let (place, partner) = place_with("currency_fault").await;
    let reservations: Vec<Reservation> = (0..2).map(|_| partner.allocation("BTC", "5")).collect();
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&COLLECTS).await;
    let early = named(
        &partner,
        &reservations[0],
        "cleared",
        "XBT",
        Expect::Refused("allocation_mismatch"),
    );
    place.publish(std::slice::from_ref(&early)).await;
    let db = place.db().await;
    let judged = async |number: i64| {
        until("it is judged", PATIENCE, async || {
            (count(&db, "dead_letters").await == number).then_some(())
        })
        .await;
    };
    judged(1).await;
    map(&place, "XETH", "ETH", &[]).await.document(0);
    let unmapped = named(&partner, &reservations[1], "cleared", "XBT", Expect::Any);
    place.publish(std::slice::from_ref(&unmapped)).await;
    judged(2).await;
    let id: Uuid = db
        .query_one(
            "SELECT id FROM settled.dead_letters WHERE reason = 'currency_unmapped'",
            &[],
        )
        .await
        .expect("a dead letter")
        .get(0);
    let shown = ask(&place, &["dead-letters", "show", &id.to_string()])
        .await
        .document(0);
    let letter = &shown["deadLetter"];
    assert_eq!(
        (&letter["class"], &letter["final"], &letter["reason"]),
        (&json!(500), &json!(false), &json!("currency_unmapped")),
        "{shown}"
    );
    assert!(
        shown["operatorAdvice"]
            .as_str()
            .is_some_and(|advice| advice.contains("settled currency map")),
        "{shown}"
    );
    // Over HTTP: a fault of ours is a 500 that names itself.
    let api = Api::start(&place, &[]).await;
    let bearer = token(&place, "acme", "partner", &[]).await;
    let path = format!("{ROOT}/acme/partners/allocations");
    let text = String::from_utf8(unmapped.body.clone()).expect("UTF-8");
    let answer = api.ask("PUT", &path, &bearer, text.as_bytes()).await;
    assert_eq!(answer.refusal(500), "currency_unmapped");
    map(&place, "XBT", "BTC", &[]).await.document(0);
    let answer = api.ask("PUT", &path, &bearer, text.as_bytes()).await;
    assert_eq!(answer.ok()["allocation"]["partnerSymbol"], "XBT");
    // Once more the bytes that were refused for good.
    let text = String::from_utf8(early.body.clone()).expect("UTF-8");
    let answer = api.ask("PUT", &path, &bearer, text.as_bytes()).await;
    assert_eq!(answer.refusal(409), "allocation_mismatch");
    drop(api);
    // What was published over HTTP as well the auditor knows nothing of.
    assert!(worker.terminate().await.success());
    assert_eq!(
        ask(&place, &["ledger", "check", "--signatures"]).await.document(0)["ok"],
        true
    );
}

/// Rows that agree with each other, under a symbol that never meant that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_amount_that_was_not_mapped_so_then_is_named() {
    let (place, partner) = place_with("currency_forged").await;
    map(&place, "XBT", "BTC", &[]).await.document(0);
    let reservations: Vec<Reservation> = ["BTC", "BTC", "ETH"]
        .into_iter()
        .map(|currency| partner.allocation(currency, "5"))
        .collect();
    place.reserve(&reservations).await;
    let messages: Vec<Message> = reservations
        .iter()
        .zip(["XBT", "BTC", "ETH"])
        .map(|(reservation, symbol)| named(&partner, reservation, "cleared", symbol, Expect::Settles))
        .collect();
    let worker = place.ready_worker(&COLLECTS).await;
    place.publish(&messages).await;
    place.settle_up(worker).await;
    let forged = async |sql: &str, number: i64, words: &str| {
        place.tamper(sql).await;
        let check = signatures(&place).await;
        assert_eq!(check["signatures"]["forged"], json!(number), "{sql}: {check}");
        assert!(check["problems"].to_string().contains(words), "{sql}: {check}");
    };
    assert_eq!(signatures(&place).await["signatures"]["forged"], 0);
    let of = |number: usize| format!("WHERE id = '{}'", reservations[number].id);
    // The symbol is taken out of the record: then something else was signed.
    forged(
        &format!("UPDATE settled.allocations SET partner_symbol = NULL {}", of(0)),
        1,
        "amount.currency: what was signed is not what stands in the books",
    )
    .await;
    // It is put back, and what it meant is taken out of the register.
    place
        .tamper(&format!(
            "UPDATE settled.allocations SET partner_symbol = 'XBT' {}",
            of(0)
        ))
        .await;
    forged(
        "UPDATE settled.currency_symbols SET currency = 'LTC' WHERE symbol = 'XBT'",
        1,
        "amount.currency: what was signed did not mean the currency of the books then",
    )
    .await;
    // A currency by its own name, which meant another all the while.
    forged(
        "INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since)
         VALUES ('acme', 'ETH', 'LTC', '2020-01-01')",
        2,
        &format!("settlement of {}", reservations[2].id),
    )
    .await;
}

#[tokio::test]
async fn a_partner_has_a_bounded_number_of_symbols() {
    let ground = ledger("currency_bound").await;
    add_partner(&ground, "acme").await;
    let db: Client = ground.db().await;
    db.batch_execute(
        "INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since)
         SELECT 'acme', 'S' || n, 'BTC', now() FROM generate_series(1, 1000) AS n",
    )
    .await
    .expect("as many as may be");
    map(&ground, "XBT", "BTC", &[]).await.refused(1, "has 1000 symbols");
    // One that is there may still be changed.
    assert_eq!(
        map(&ground, "S7", "ETH", &["--replace"]).await.document(0)["result"],
        "updated"
    );
    unmap(&ground, "S8").await.document(0);
    assert_eq!(map(&ground, "XBT", "BTC", &[]).await.document(0)["result"], "added");
}
