//! Two doors, one rule: what a command refuses, the same act by SQL refuses too; and nothing that comes through either can
//! settle into something that the broker would not take.

use serde_json::{Value, json};
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    command::{ask_with, deposit, ledger, register},
    partner::Partner,
    support::{Ground, PATIENCE, Place, until},
};

const MAX: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";
const OVER: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639936";

async fn execute(db: &tokio_postgres::Client, sql: &str) {
    db.batch_execute(sql).await.expect(sql);
}

/// A reservation as JSON, with one field replaced or taken away.
fn with(partner: &Partner, path: &str, value: Option<Value>) -> Value {
    let mut line: Value = serde_json::from_str(&partner.allocation("BTC", "1").line()).expect("JSON");
    let (parent, field) = path.rsplit_once('/').unwrap_or(("", path));
    let object = line.pointer_mut(parent).and_then(Value::as_object_mut);
    let object = object.expect("an object");
    match value {
        Some(value) => object.insert(field.to_owned(), value),
        None => object.remove(field),
    };
    line
}

/// What both doors say of one reservation; they must say the same.
async fn said(ground: &Ground, wish: &Value) -> Value {
    let db = ground.db().await;
    let sql = "SELECT (to_jsonb(r) - 'ordinal')::text FROM settled.reserve($1::text::jsonb) AS r";
    let rows = db.query(sql, &[&json!([wish]).to_string()]).await.expect("an answer");
    let mut by_sql: Value = serde_json::from_str(rows[0].get(0)).expect("JSON");
    let answers = ask_with(ground, &["allocation", "reserve"], &wish.to_string()).await;
    let mut by_command: Value = serde_json::from_str(&answers.out).unwrap_or_else(|_| panic!("{}", answers.all()));
    for answer in [&mut by_sql, &mut by_command] {
        answer
            .as_object_mut()
            .expect("an object")
            .retain(|name, value| name == "id" || !value.is_null());
    }
    // The second to be asked finds what the first reserved.
    if by_sql["result"] == "reserved" {
        by_sql["result"] = json!("exists");
    }
    assert_eq!(by_sql, by_command, "{wish}");
    by_sql
}

#[tokio::test]
async fn both_doors_have_one_rule() {
    let ground = ledger("one_rule").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    for number in 0..2 {
        let reference = format!("r{number}");
        deposit(&ground, &partner.client.to_string(), "BTC", MAX, &reference)
            .await
            .document(0);
    }
    let text = |length: usize| Some(json!("x".repeat(length)));
    for (path, value) in [
        ("id", Some(json!(Uuid::new_v4().to_string().to_uppercase()))),
        ("amount/quantity", Some(json!("1"))),
        ("/amount/quantity", Some(json!(MAX))),
        ("clientExternalId", text(1_024)),
        ("initiatedBy", text(1_024)),
        ("notes", text(16_384)),
        ("notes", Some(json!("é".repeat(8_192)))),
        ("reason", text(16_384)),
        ("reason", Some(json!("\u{1}\u{202e}\n"))),
        ("retriable", Some(json!(true))),
        ("retriable", Some(json!(false))),
    ] {
        let path = if path == "amount/quantity" {
            "/amount/quantity"
        } else {
            path
        };
        let wish = with(&partner, path, value);
        assert_eq!(said(&ground, &wish).await["result"], "exists", "{wish}");
    }
    let uuid = "must be a UUID, 8-4-4-4-12";
    let short = "must be 1 to 1024 bytes";
    let long = "must be 1 to 16384 bytes";
    let is_text = "must be a string";
    for (path, value, detail) in [
        ("id", None, "id: is missing"),
        ("id", Some(json!(7)), &format!("id: {is_text}") as &str),
        ("id", Some(json!("")), &format!("id: {uuid}")),
        (
            "id",
            Some(json!("3f2504e04f8941d39a0c0305e82c3301")),
            &format!("id: {uuid}"),
        ),
        (
            "id",
            Some(json!("{3f2504e0-4f89-41d3-9a0c-0305e82c3301}")),
            &format!("id: {uuid}"),
        ),
        (
            "id",
            Some(json!("3f2504e0-4f89-41d3-9a0c-0305e82c3301\n")),
            &format!("id: {uuid}"),
        ),
        (
            "type",
            Some(json!("Allocation")),
            "type: must be allocation or deallocation",
        ),
        ("type", Some(Value::Null), "type: must be a string"),
        ("connectionId", Some(json!("x")), &format!("connectionId: {uuid}")),
        ("connectionId", None, "connectionId: is missing"),
        ("amount", None, "amount: is missing"),
        ("amount", Some(json!("1 BTC")), "amount: must be an object"),
        ("amount", Some(json!(["BTC", "1"])), "amount: must be an object"),
        ("/amount/currency", None, "amount.currency: is missing"),
        (
            "/amount/currency",
            Some(json!("")),
            "amount.currency: must be 1 to 64 letters",
        ),
        (
            "/amount/currency",
            Some(json!("BTC\n")),
            "amount.currency: must be 1 to 64 letters",
        ),
        (
            "/amount/currency",
            Some(json!("é")),
            "amount.currency: must be 1 to 64 letters",
        ),
        ("/amount/currency", text(65), "amount.currency: must be 1 to 64 letters"),
        ("/amount/quantity", None, "amount.quantity: is missing"),
        ("/amount/quantity", Some(json!(1)), "amount.quantity: must be a string"),
        (
            "/amount/quantity",
            Some(json!(1e300)),
            "amount.quantity: must be a string",
        ),
        (
            "/amount/quantity",
            Some(json!("")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("-1")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("1.0")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("1e3")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("NaN")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("١")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("1\n")),
            "amount.quantity: must be decimal digits",
        ),
        (
            "/amount/quantity",
            Some(json!("0")),
            "amount.quantity: must be at least 1",
        ),
        (
            "/amount/quantity",
            Some(json!("01")),
            "amount.quantity: must be at least 1",
        ),
        (
            "/amount/quantity",
            Some(json!(OVER)),
            "amount.quantity: must be at most 2^256-1",
        ),
        (
            "/amount/quantity",
            Some(json!("9".repeat(100_000))),
            "amount.quantity: must be at most 2^256-1",
        ),
        ("/amount/more", Some(json!(1)), "unknown field \"amount.more\""),
        (
            "clientExternalId",
            Some(json!("")),
            &format!("clientExternalId: {short}"),
        ),
        ("clientExternalId", text(2_000), &format!("clientExternalId: {short}")),
        (
            "clientExternalId",
            Some(json!("é".repeat(513))),
            &format!("clientExternalId: {short}"),
        ),
        ("clientExternalId", None, "clientExternalId: is missing"),
        ("initiatedBy", Some(json!("")), &format!("initiatedBy: {short}")),
        ("initiatedBy", Some(json!(true)), "initiatedBy: must be a string"),
        ("initiatedBy", None, "initiatedBy: is missing"),
        ("notes", Some(json!(7)), "notes: must be a string"),
        ("notes", Some(Value::Null), "notes: must be a string"),
        ("notes", Some(json!("")), &format!("notes: {long}")),
        ("notes", text(16_385), &format!("notes: {long}")),
        ("notes", Some(json!("é".repeat(8_193))), &format!("notes: {long}")),
        ("notes", Some(json!({"a": [1]})), "notes: must be a string"),
        ("reason", Some(json!("")), &format!("reason: {long}")),
        ("reason", Some(Value::Null), "reason: must be a string"),
        ("reason", text(16_385), &format!("reason: {long}")),
        ("retriable", Some(json!("true")), "retriable: must be true or false"),
        ("retriable", Some(json!(0)), "retriable: must be true or false"),
        ("retriable", Some(Value::Null), "retriable: must be true or false"),
        (
            "note",
            Some(json!("x")),
            "unknown field \"note\": a reservation has id, type",
        ),
        (
            "partnersClientId",
            Some(json!("x")),
            "unknown field \"partnersClientId\"",
        ),
    ] {
        let wish = with(&partner, path, value);
        let answer = said(&ground, &wish).await;
        assert_eq!(
            (&answer["result"], &answer["reason"]),
            (&json!("refused"), &json!("invalid_field")),
            "{wish}"
        );
        let found = answer["detail"].as_str().unwrap_or_default();
        assert!(found.starts_with(detail), "{wish}: {found}");
        let readable = path != "id";
        assert_eq!(answer["id"].is_string(), readable, "{wish}: {answer}");
    }
    let db = ground.db().await;
    let left: i64 = db
        .query_one("SELECT count(*) FROM settled.allocations", &[])
        .await
        .expect("a count")
        .get(0);
    assert_eq!(left, 11, "nothing that was refused is there");
}

#[tokio::test]
async fn what_is_malformed_costs_its_neighbours_nothing() {
    let ground = ledger("neighbours").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    deposit(&ground, &partner.client.to_string(), "BTC", "9", "r")
        .await
        .document(0);
    let good = || with(&partner, "retriable", None);
    let (first, last) = (good(), good());
    let wishes = json!([
        7,
        first,
        null,
        with(&partner, "notes", Some(json!(1))),
        [],
        last,
        {},
        first
    ]);
    let db = ground.db().await;
    let sql = "SELECT ordinal, id, result, reason, detail FROM settled.reserve($1::text::jsonb) ORDER BY ordinal";
    let rows = db.query(sql, &[&wishes.to_string()]).await.expect("answers");
    let found: Vec<(i32, String, Option<String>)> = rows
        .iter()
        .map(|row| (row.get("ordinal"), row.get("result"), row.get("detail")))
        .collect();
    let no_object = Some("must be a JSON object".to_owned());
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(
        found,
        [
            (1, "refused".to_owned(), no_object.clone()),
            (2, "reserved".to_owned(), None),
            (3, "refused".to_owned(), no_object.clone()),
            (4, "refused".to_owned(), text("notes: must be a string")),
            (5, "refused".to_owned(), no_object),
            (6, "reserved".to_owned(), None),
            (7, "refused".to_owned(), text("id: is missing")),
            (8, "exists".to_owned(), None),
        ]
    );
    // Only what is no list at all is an error.
    for wrong in ["{}", "7", "\"x\"", "null"] {
        let error = db.query(sql, &[&wrong]).await.expect_err(wrong);
        assert_eq!(error.code().map(|code| code.code()), Some("22023"), "{wrong}: {error}");
    }
    assert!(db.query(sql, &[&"[]"]).await.expect("no answer").is_empty());
    // A byte-order mark in front of the first line is that line's fault alone, and it is said what to do.
    let lines = format!("\u{feff}{first}\n{last}\n");
    let answers = ask_with(&ground, &["allocation", "reserve"], &lines).await.lines(3);
    let detail = answers[0]["detail"].as_str().expect("a detail");
    assert!(
        detail.contains("byte-order mark") && detail.contains("without one"),
        "{detail}"
    );
    assert_eq!(answers[0]["id"], first["id"]);
    assert_eq!(answers[1]["result"], "exists");
}

#[tokio::test]
async fn a_deposit_by_sql_keeps_the_commands_rules() {
    let ground = ledger("sql_deposit").await;
    let db = ground.db().await;
    let client = Uuid::new_v4();
    let long = "r".repeat(1_025);
    for (currency, quantity, reference, piece) in [
        ("", "1", "r", "currency: must be"),
        ("B TC", "1", "r", "currency: must be"),
        ("BTC\n", "1", "r", "currency: must be"),
        ("BTC", "0", "r", "quantity: must be 1 to"),
        ("BTC", "-1", "r", "quantity: must be 1 to"),
        ("BTC", "1.5", "r", "quantity: must be a whole number"),
        ("BTC", "NaN", "r", "quantity: must be a whole number"),
        ("BTC", OVER, "r", "quantity: must be 1 to"),
        ("BTC", "1", "", "reference: must be 1 to 1024 bytes"),
        ("BTC", "1", &long, "reference: must be 1 to 1024 bytes"),
    ] {
        let sql = "SELECT settled.deposit($1, $2, $3::text::numeric, $4)";
        let error = db
            .query(sql, &[&client, &currency, &quantity, &reference])
            .await
            .expect_err(quantity);
        let said = error.as_db_error().expect("the server's").message();
        assert!(said.contains(piece), "{currency:?} {quantity}: {said}");
    }
    let sql = "SELECT settled.deposit($1, 'BTC', 'Infinity', 'r')";
    db.query(sql, &[&client]).await.expect_err("no number");
    for table in ["deposits", "accounts", "entries"] {
        let sql = format!("SELECT count(*) FROM settled.{table}");
        let count: i64 = db.query_one(&sql, &[]).await.expect("a count").get(0);
        assert_eq!(count, 0, "{table}");
    }
}

/// Rows that are written past the functions, where somebody may.
#[tokio::test]
async fn the_tables_are_the_second_line() {
    let ground = ledger("second_line").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    deposit(&ground, &partner.client.to_string(), "BTC", "9", "r")
        .await
        .document(0);
    let wish = with(&partner, "notes", Some(json!("short")));
    ask_with(&ground, &["allocation", "reserve"], &wish.to_string())
        .await
        .lines(0);
    let db = ground.db().await;
    for (column, text) in [
        ("client_external_id", ""),
        ("initiated_by", ""),
        ("notes", ""),
        ("notes", &"n".repeat(16_385) as &str),
        ("reserved_reason", &"n".repeat(16_385)),
    ] {
        let sql = format!(
            "INSERT INTO settled.allocations
             SELECT (jsonb_populate_record(a, jsonb_build_object(
                 'id', gen_random_uuid(), 'client_external_id', gen_random_uuid(), '{column}', $1::text
             ))).*
             FROM settled.allocations AS a"
        );
        let error = db.execute(&sql, &[&text]).await.expect_err(column);
        assert_eq!(error.code().map(|code| code.code()), Some("23514"), "{column}: {error}");
    }
    for sql in [
        "INSERT INTO settled.partners (enterprise_id, name) VALUES ('x', repeat('n', 1025))",
        "INSERT INTO settled.partners (enterprise_id, name, broker_user) VALUES ('x', 'n', '')",
        "UPDATE settled.partners SET broker_user = repeat('u', 256)",
    ] {
        let error = db.execute(sql, &[]).await.expect_err(sql);
        assert_eq!(error.code().map(|code| code.code()), Some("23514"), "{sql}: {error}");
    }
}

/// What the broker refused was told to nobody: `doctor` says so.
#[tokio::test]
async fn what_the_broker_refused_is_a_problem() {
    let ground = ledger("refused_is_told").await;
    let line = async || {
        let answer = ask_with(&ground, &["doctor"], "").await;
        let report: Value = serde_json::from_str(&answer.out).unwrap_or_else(|_| panic!("{}", answer.all()));
        let mut checks = report["checks"].as_array().expect("checks").iter();
        let line = checks.find(|check| check["name"] == "outbox_refused");
        line.unwrap_or_else(|| panic!("{}", answer.all())).clone()
    };
    assert_eq!(line().await["ok"], true);
    let db = ground.db().await;
    let sql = "INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal, at)
               VALUES (gen_random_uuid(), 1, '', 'too large', '2020-01-31T00:00:00Z')";
    execute(&db, sql).await;
    let line = line().await;
    let detail = line["detail"].as_str().expect("a detail");
    assert!(
        line["ok"] == false && detail.contains("1 publications") && detail.contains("2020-01-31T00:00:00.000Z"),
        "{line}"
    );
    assert!(line["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{line}");
}

/// The largest of everything, each byte of it one that JSON writes as six: what it settles into is told, and so is what is
/// refused of it.
#[tokio::test]
async fn the_largest_of_everything_is_told() {
    let place = Place::new("largest_of_all").await;
    let mut partner = Partner::new(&format!("e{}", "x".repeat(63)));
    let most = |length: usize| "\u{1}".repeat(length);
    // These two are in no event. As control characters they would leave no room in the message for what is.
    partner.partners_client = "c".repeat(1_024);
    partner.partners_connection = "c".repeat(1_024);
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "5").await;
    let reserved = |status: &str, letter: &str| {
        let allocation = partner.allocation("BTC", "1");
        let mut line: Value = serde_json::from_str(&allocation.line()).expect("JSON");
        let own = allocation.id.simple().to_string();
        let client_external_id = format!("{own}{}", most(1_024 - own.len()));
        line["clientExternalId"] = json!(client_external_id);
        line["initiatedBy"] = json!(most(1_024));
        line["notes"] = json!(letter.repeat(16_384 / letter.len()));
        line["reason"] = json!(most(16_384));
        let mut draft = partner
            .draft(&allocation, status)
            .set("partnersAllocationId", most(1_024))
            .set("nonce", format!("{own}{}", most(256 - own.len())));
        if status == "released" {
            draft = draft.set("rejectReason", most(16_384));
        }
        (allocation, line, draft)
    };
    let all = [
        reserved("released", "\u{1}"),
        reserved("cleared", "\u{1}"),
        reserved("released", "\u{1f600}"),
    ];
    let lines: Vec<String> = all.iter().map(|(_, line, _)| line.to_string()).collect();
    let answers = ask_with(&place, &["allocation", "reserve"], &lines.join("\n"))
        .await
        .lines(0);
    assert!(
        answers.iter().all(|answer| answer["result"] == "reserved"),
        "{answers:?}"
    );
    place
        .story()
        .reservations
        .extend(all.iter().map(|(allocation, line, _)| Reservation {
            client_external_id: line["clientExternalId"].as_str().expect("text").to_owned(),
            notes: line["notes"].as_str().map(str::to_owned),
            ..allocation.clone()
        }));
    // The policy fields need not be signed.
    let with_policy = |mut message: Message| {
        let mut body: Value = serde_json::from_slice(&message.body).expect("JSON");
        body["evaluationId"] = json!(most(1_024));
        body["pendingApprovalId"] = json!(most(1_024));
        body["policyResult"] = json!("approved");
        message.body = body.to_string().into_bytes();
        message
    };
    let messages: Vec<Message> = all
        .iter()
        .map(|(_, _, draft)| with_policy(draft.clone().message(Expect::Settles)))
        .collect();
    let largest = messages.iter().map(|message| message.body.len()).max();
    assert!(largest.is_some_and(|bytes| bytes <= 262_144), "{largest:?}");
    // What is refused of the same size, with as long a detail as there is.
    let refused = all[0]
        .2
        .clone()
        .set("nonce", "another")
        .set("amount", json!({"currency": "BTC", "quantity": "2"}))
        .message(Expect::Refused("allocation_mismatch"));
    place.publish(&messages).await;
    place.publish(&[with_policy(refused)]).await;
    let worker = place.worker(&[]);
    worker.ready().await;
    let db = place.db().await;
    until("everything is told", PATIENCE, async || {
        let sql = "SELECT (SELECT count(*) FROM settled.settlements), (SELECT count(*) FROM settled.outbox)";
        let row = db.query_one(sql, &[]).await.expect("counts");
        (row.get::<_, i64>(0) == 3 && row.get::<_, i64>(1) == 0).then_some(())
    })
    .await;
    let aside: i64 = db
        .query_one("SELECT count(*) FROM settled.outbox_refused", &[])
        .await
        .expect("a count")
        .get(0);
    assert_eq!(aside, 0, "the broker refused something");
    place.rest().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
    let told = place.observed().await.events;
    let largest = told.iter().map(|event| event.body.len()).max().unwrap_or_default();
    // As large as an event can be, below what an array of events may have, and far below what any broker takes.
    assert!((229_000..262_144).contains(&largest), "{largest} bytes");
}
