//! Every command as an operator or a program types it: what it answers, what it refuses, and how it ends.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use num_bigint::BigInt;
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation, event_id, sha256},
    command::{Answer, NOWHERE, add_key, add_partner, ask, ask_in, ask_with, deposit, ledger, move_funds, register},
    partner::{Draft, Partner, new_key},
    support::{Ground, LEAVE_DEAD_LETTERS, PATIENCE, Place, until, userinfo},
    traffic::partner_signature,
};

/// The types of a document's values, with the forms that text of ours has.
fn shape(value: &Value) -> Value {
    let form = match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(text) if Uuid::try_parse(text).is_ok() && text.len() == 36 => "uuid",
        Value::String(text) if is_time(text) => "time",
        Value::String(text) if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) => "digest",
        Value::String(_) => "text",
        Value::Array(values) => return values.iter().map(shape).collect(),
        Value::Object(members) => {
            return members
                .iter()
                .map(|(name, value)| (name.clone(), shape(value)))
                .collect::<serde_json::Map<_, _>>()
                .into();
        }
    };
    form.into()
}

/// RFC 3339, UTC, `Z`, milliseconds.
fn is_time(text: &str) -> bool {
    let mask: String = text
        .chars()
        .map(|letter| if letter.is_ascii_digit() { '0' } else { letter })
        .collect();
    mask == "0000-00-00T00:00:00.000Z"
}

/// The content of every table, to see whether anything was written.
async fn picture(db: &Client) -> BTreeMap<String, String> {
    let sql = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'settled'";
    let mut picture = BTreeMap::new();
    for row in db.query(sql, &[]).await.expect("tables") {
        let table: String = row.get(0);
        let sql =
            format!("SELECT coalesce(string_agg(t::text, E'\\n' ORDER BY t::text), '') FROM settled.{table} AS t");
        let rows = db.query_one(&sql, &[]).await.expect("rows").get(0);
        picture.insert(table, rows);
    }
    assert!(picture.len() > 10, "{picture:?}");
    picture
}

// Exit codes ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn every_exit_code_has_its_cause() {
    let ground = ledger("codes").await;
    ask(&ground, &["partner", "list"]).await.document(0);
    let id = Uuid::new_v4().to_string();
    ask(&ground, &["allocation", "show", &id]).await.refused(1, &id);
    for (arguments, piece) in [
        (&["nothing"][..], "unrecognized subcommand"),
        (&["partner"], "subcommand"),
        (&["partner", "list", "--no-such-flag"], "--no-such-flag"),
        (&["allocation", "show"], "<ID>"),
        (&["allocation", "show", "no-uuid"], "a UUID has 36 characters"),
        (&["allocation", "reserve", "/no/such/file"], "can not be read"),
        (&["explain", "/no/such/file", "--routing-key", "k"], "can not be read"),
        (&["partner", "list", "--config", "/no/such/file"], "/no/such/file"),
    ] {
        ask(&ground, arguments).await.refused(2, piece);
    }

    // Away: nobody listens, the password is wrong, the database or the vhost is not there.
    let database = ground.database_url.as_str();
    let (user, password) = userinfo(database);
    let wrong = database.replace(password, "wrong");
    let missing = format!("{database}_missing");
    let nobody = format!("postgres://{user}:{password}@{NOWHERE}/x");
    for (url, begins) in [
        (&nobody, "the database is away: "),
        (&wrong, "the database refuses our login: "),
        (&missing, "the server has no database of that name: "),
    ] {
        let answer = ask_in(&[("SETTLED_DATABASE_URL", url)], &["partner", "list"]).await;
        let (message, hint) = answer.refusal(69);
        assert!(message.starts_with(begins), "{message}");
        assert!(hint.contains("SETTLED_DATABASE_URL"), "{hint}");
        assert!(!answer.all().contains(password), "{}", answer.all());
    }
    let wrong = ground.broker_url.replace(password, "wrong");
    let missing = format!("{}_missing", ground.broker_url);
    let nobody = format!("amqp://{user}:{password}@{NOWHERE}/x");
    for url in [&nobody, &wrong, &missing] {
        let answer = ask_in(&[("SETTLED_BROKER_URL", url)], &["topology"]).await;
        let (_, hint) = answer.refusal(69);
        assert!(hint.contains("SETTLED_BROKER_URL"), "{hint}");
        assert!(!answer.all().contains(password), "{}", answer.all());
    }

    // Our fault: the program's own user was never allowed to do its work.
    let role = format!("{}_role", ground.name);
    let db = ground.db().await;
    db.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'secret-of-the-role'"))
        .await
        .expect("a role");
    let url = database.replace(&format!("{user}:{password}@"), &format!("{role}:secret-of-the-role@"));
    let answer = ask_in(&[("SETTLED_DATABASE_URL", &url)], &["partner", "list"]).await;
    answer.refused(78, "lacks a permission");
    assert!(!answer.all().contains("secret-of-the-role"), "{}", answer.all());
    db.batch_execute(&format!("DROP ROLE {role}")).await.expect("it goes");
}

#[tokio::test]
async fn people_are_told_what_programs_are() {
    let ground = ledger("people").await;
    let id = Uuid::new_v4().to_string();
    let answer = Answer::of(&ground.run(&["allocation", "show", &id]).await);
    assert_eq!((answer.code, answer.out.as_str()), (Some(1), ""));
    assert!(answer.err.starts_with("settled: "), "{}", answer.err);
    assert!(answer.err.contains("\n  hint: "), "{}", answer.err);
    let answer = Answer::of(&ground.run(&["ledger", "check"]).await);
    assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""));
    assert!(answer.out.contains("the books are right"), "{}", answer.out);
    // What a stranger called himself can not steer a terminal.
    let name = "\u{1b}[31mred\u{202e}";
    let add = ["partner", "add", "--enterprise-id", "E", "--name", name];
    assert_eq!(Answer::of(&ground.run(&add).await).code, Some(0));
    let answer = Answer::of(&ground.run(&["partner", "list"]).await);
    assert!(
        !answer.out.contains('\u{1b}') && !answer.out.contains('\u{202e}'),
        "{:?}",
        answer.out
    );
    assert_eq!(
        ask(&ground, &["partner", "list"]).await.document(0)[0]["name"],
        json!(name)
    );
    for help in [&["--help"][..], &["--version"], &["key", "add", "--help"]] {
        let answer = Answer::of(&ground.run(help).await);
        assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""), "{help:?}");
        assert!(!answer.out.is_empty(), "{help:?}");
    }
}

// The registry -------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn partners_are_added_suspended_and_resumed() {
    let ground = ledger("partners").await;
    assert_eq!(ask(&ground, &["partner", "list"]).await.document(0), json!([]));
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "Acme, Inc."];
    let added = ask(&ground, &add).await.document(0);
    let mut expected = json!({
        "enterpriseId": "acme", "name": "Acme, Inc.", "asyncAllocations": true, "asyncDeallocations": true,
        "brokerUser": null, "ownQueue": false, "suspendedAt": null, "quarantinedAt": null, "quarantineReason": null,
        "createdAt": added["createdAt"], "result": "added",
    });
    assert_eq!(added, expected);
    assert_eq!(shape(&added["createdAt"]), "time");
    expected["result"] = json!("exists");
    assert_eq!(ask(&ground, &add).await.document(0), expected);
    for (flags, piece) in [
        (&["--no-async-allocations"][..], "asynchronous allocations are enabled"),
        (&["--no-async-deallocations"], "asynchronous deallocations are enabled"),
        (&["--broker-user", "u"], "it is bound to no broker user"),
    ] {
        ask(&ground, &[&add[..], flags].concat()).await.refused(1, piece);
    }
    let renamed = ["partner", "add", "--enterprise-id", "acme", "--name", "Other"];
    ask(&ground, &renamed).await.refused(1, "its name is \"Acme, Inc.\"");

    let bound = [
        "--no-async-allocations",
        "--no-async-deallocations",
        "--broker-user",
        "user of b",
    ];
    let other = ["partner", "add", "--enterprise-id", "B-2_x", "--name", "B"];
    let added = ask(&ground, &[&other[..], &bound[..]].concat()).await.document(0);
    assert_eq!(
        (
            &added["asyncAllocations"],
            &added["asyncDeallocations"],
            &added["brokerUser"]
        ),
        (&json!(false), &json!(false), &json!("user of b"))
    );

    let suspend = ["partner", "suspend", "--enterprise-id", "acme"];
    let suspended = ask(&ground, &suspend).await.document(0);
    assert_eq!(shape(&suspended["suspendedAt"]), "time");
    assert_eq!(suspended["result"], "updated");
    let again = ask(&ground, &suspend).await.document(0);
    assert_eq!(
        (&again["suspendedAt"], &again["result"]),
        (&suspended["suspendedAt"], &json!("exists"))
    );
    let listed = ask(&ground, &["partner", "list"]).await.document(0);
    let names: Vec<_> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|partner| &partner["enterpriseId"])
        .collect();
    assert_eq!(names.len(), 2);
    let listed = listed.as_array().into_iter().flatten();
    let suspended: Vec<_> = listed.filter(|partner| !partner["suspendedAt"].is_null()).collect();
    assert_eq!(suspended.len(), 1);
    assert!(suspended[0].get("result").is_none() && suspended[0]["enterpriseId"] == "acme");

    let resume = ["partner", "resume", "--enterprise-id", "acme"];
    let resumed = ask(&ground, &resume).await.document(0);
    assert_eq!(
        (&resumed["suspendedAt"], &resumed["result"]),
        (&Value::Null, &json!("updated"))
    );
    assert_eq!(ask(&ground, &resume).await.document(0)["result"], "exists");
    for verb in ["suspend", "resume"] {
        ask(&ground, &["partner", verb, "--enterprise-id", "nobody"])
            .await
            .refused(1, "no partner nobody");
    }
    for id in ["", "a.b", "-a", "_a", "é", &"x".repeat(65)] {
        let id = format!("--enterprise-id={id}");
        let answer = ask(&ground, &["partner", "add", &id, "--name", "N"]).await;
        answer.refusal(2);
    }
    ask(&ground, &["partner", "add", "--enterprise-id", "c", "--name", ""])
        .await
        .refusal(2);
}

fn samples() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/signatures.json");
    serde_json::from_slice(&std::fs::read(path).expect("the samples")).expect("JSON")
}

#[tokio::test]
async fn keys_are_of_one_partner_and_valid_for_a_time() {
    let ground = ledger("keys").await;
    add_partner(&ground, "acme").await;
    add_partner(&ground, "other").await;
    assert_eq!(ask(&ground, &["key", "list"]).await.document(0), json!([]));
    let samples = samples();
    let (hex, xpub) = (&samples["valid"][0]["publicKeyHex"], &samples["valid"][0]["xpub"]);
    let (hex, xpub) = (hex.as_str().expect("hex"), xpub.as_str().expect("an xpub"));

    let added = add_key(&ground, "acme", xpub, &[]).await.document(0);
    assert_eq!(added["publicKey"], hex);
    assert_eq!(
        shape(&added),
        json!({
            "publicKey": "text", "enterpriseId": "text", "validFrom": "time", "validUntil": "null", "revokedAt": "null",
            "createdAt": "time", "lastUsedAt": "null", "valid": "bool", "result": "text",
        })
    );
    assert_eq!((&added["valid"], &added["result"]), (&json!(true), &json!("added")));
    // The same key, however it is written.
    for same in [hex, &hex.to_uppercase(), xpub] {
        let again = add_key(&ground, "acme", same, &[]).await.document(0);
        assert_eq!((&again["result"], &again["publicKey"]), (&json!("exists"), &json!(hex)));
    }
    add_key(&ground, "other", hex, &[])
        .await
        .refused(1, "belongs to partner acme");
    add_key(&ground, "other", xpub, &[])
        .await
        .refused(1, "belongs to partner acme");
    add_key(&ground, "nobody", &hex::encode(new_key().public_key().serialize()), &[])
        .await
        .refused(1, "no partner nobody");

    // Windows.
    let key = || hex::encode(new_key().public_key().serialize());
    let (past, later) = ("2020-01-31T01:00:00.123456+01:00", "2199-01-31T00:00:00Z");
    for (flags, valid) in [
        (&["--valid-from", past, "--valid-until", later][..], true),
        (&["--valid-from", later], false),
        (&["--valid-from", past, "--valid-until", "2020-02-01T00:00:00Z"], false),
        (&["--valid-until", later], true),
    ] {
        let added = add_key(&ground, "other", &key(), flags).await.document(0);
        assert_eq!(added["valid"], valid, "{flags:?}");
        if flags[1] == past {
            assert_eq!(added["validFrom"], "2020-01-31T00:00:00.123Z");
        }
    }
    for flags in [
        &["--valid-from", later, "--valid-until", later][..],
        &["--valid-from", later, "--valid-until", past],
        &["--valid-until", past],
    ] {
        add_key(&ground, "other", &key(), flags)
            .await
            .refused(2, "--valid-until");
    }
    add_key(&ground, "other", &key(), &["--valid-from", "tomorrow"])
        .await
        .refused(2, "RFC 3339");
    // Another window for a key that is there.
    let changed = add_key(&ground, "acme", hex, &["--valid-until", later])
        .await
        .document(0);
    assert_eq!(
        (&changed["result"], &changed["validUntil"]),
        (&json!("updated"), &json!("2199-01-31T00:00:00.000Z"))
    );
    assert_eq!(changed["validFrom"], added["validFrom"]);

    // Revoked and reinstated.
    let revoke = ["key", "revoke", "--enterprise-id", "acme", "--public-key", xpub];
    let revoked = ask(&ground, &revoke).await.document(0);
    assert_eq!(
        (&revoked["valid"], &revoked["result"]),
        (&json!(false), &json!("updated"))
    );
    assert_eq!(shape(&revoked["revokedAt"]), "time");
    let again = ask(&ground, &revoke).await.document(0);
    assert_eq!(
        (&again["revokedAt"], &again["result"]),
        (&revoked["revokedAt"], &json!("exists"))
    );
    let foreign = ["key", "revoke", "--enterprise-id", "other", "--public-key", hex];
    ask(&ground, &foreign).await.refused(1, "partner other has no key");
    let listed = ask(&ground, &["key", "list", "--enterprise-id", "acme"])
        .await
        .document(0);
    let mut expected = revoked.clone();
    expected.as_object_mut().expect("an object").remove("result");
    assert_eq!(listed, json!([expected]));
    add_key(&ground, "acme", hex, &["--valid-until", later])
        .await
        .refused(1, "settled key reinstate --enterprise-id acme --public-key");
    let reinstate = ["key", "reinstate", "--enterprise-id", "acme", "--public-key", hex];
    ask(&ground, &reinstate).await.refused(2, "--reason");
    let reinstate = [&reinstate, &["--reason", "revoked by mistake"][..]].concat();
    let reinstated = ask(&ground, &reinstate).await.document(0);
    assert_eq!(
        (&reinstated["valid"], &reinstated["revokedAt"], &reinstated["result"]),
        (&json!(true), &Value::Null, &json!("reinstated"))
    );
    assert_eq!(
        (&reinstated["validUntil"], &reinstated["refusedForEver"]),
        (&revoked["validUntil"], &json!(0))
    );
    assert_eq!(ask(&ground, &reinstate).await.document(0)["result"], "exists");
    let foreign = [
        "key",
        "reinstate",
        "--enterprise-id",
        "other",
        "--public-key",
        hex,
        "--reason",
        "x",
    ];
    ask(&ground, &foreign).await.refused(1, "partner other has no key");
    assert_eq!(
        ask(&ground, &["key", "list"])
            .await
            .document(0)
            .as_array()
            .map(Vec::len),
        Some(5)
    );

    // What is no key.
    let uncompressed = hex::encode(new_key().public_key().serialize_uncompressed());
    let mut mistyped = xpub.to_owned();
    mistyped.replace_range(20..21, if &xpub[20..21] == "a" { "b" } else { "a" });
    for (text, piece) in [
        (uncompressed.as_str(), "uncompressed"),
        (&hex[..64], "may be a private one"),
        (&format!("05{}", &hex[2..]), "begin with 02 or 03"),
        (&format!("02{}", "f".repeat(64)), "no point of the curve"),
        (&mistyped, "checksum"),
        (&xpub[..100], "not a public key"),
        ("", "not a public key"),
        ("nonsense", "not a public key"),
    ] {
        let answer = add_key(&ground, "acme", text, &[]).await;
        let (message, _) = answer.refusal(2);
        assert!(
            message.contains(piece) || message.contains("checksum"),
            "{text}: {message}"
        );
    }
}

#[tokio::test]
async fn a_private_key_is_refused_and_never_repeated() {
    let ground = ledger("xprv").await;
    add_partner(&ground, "acme").await;
    // Published with BIP 32: nobody's secret.
    let xprv = "xprv9s21ZrQH143K3QTDL4LXw2F7HEK3wJUD2nW2nRk4stbPy6cq3jPPqjiChkVvvNKmPGJxWUtg6LnF5kejMRNNU3TGtRBeJgk33yuGBxrMPHi";
    let mistyped = xprv.replace("ZrQH", "ZrqH");
    let hex = hex::encode(new_key().to_secret_bytes());
    for secret in [xprv, &mistyped, &hex] {
        let assigned = format!("--public-key={secret}");
        let blanks = format!(" {secret} ");
        let mut typed = vec![
            vec!["key", "add", "--enterprise-id", "acme", "--public-key", secret],
            vec!["key", "add", "--enterprise-id", "acme", "--public-key", &blanks],
            vec!["key", "add", "--enterprise-id", "acme", &assigned],
            vec!["key", "add", "--enterprise-id", "nobody", "--public-key", secret],
            vec!["key", "revoke", "--enterprise-id", "acme", "--public-key", secret],
        ];
        let wrong = [
            format!("--key={secret}"),
            format!("--enterprise-id=:{secret}"),
            format!("--set={secret}"),
        ];
        if secret != hex {
            // In the wrong place.
            typed.push(vec!["key", "add", "--enterprise-id", "acme", secret]);
            typed.push(vec!["key", "add", "--enterprise-id", &blanks, "--public-key", "x"]);
            typed.push(vec![
                "key",
                "add",
                "--enterprise-id",
                "acme",
                "--public-key",
                "x",
                "--valid-from",
                secret,
            ]);
            typed.push(vec!["key", secret]);
            typed.push(vec![secret]);
            typed.extend(
                wrong
                    .iter()
                    .map(|wrong| vec!["key", "add", wrong.as_str(), "--public-key", "x"]),
            );
        }
        for arguments in typed {
            let told = ask(&ground, &arguments).await;
            let said = Answer::of(&ground.run(&arguments).await);
            assert_eq!(
                (told.code, said.code),
                (Some(2), Some(2)),
                "{}{}",
                told.all(),
                said.all()
            );
            for answer in [told, said] {
                assert!(
                    !answer.all().contains(&secret[5..25]),
                    "{arguments:?}: {}",
                    answer.all()
                );
                assert!(answer.out.is_empty(), "{arguments:?}: {}", answer.all());
            }
        }
    }
    assert_eq!(ask(&ground, &["key", "list"]).await.document(0), json!([]));
}

#[tokio::test]
async fn connections_are_registered_once() {
    let ground = ledger("connections").await;
    add_partner(&ground, "acme").await;
    let (connection, client) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    let add = |connection: &str, enterprise: &str, theirs: &str| -> Vec<String> {
        let flags = [
            ("--connection-id", connection),
            ("--enterprise-id", enterprise),
            ("--client-id", &client),
            ("--partners-client-id", theirs),
            ("--partners-connection-id", "link \"1\""),
        ];
        let flags = flags
            .iter()
            .flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]);
        ["connection".to_owned(), "add".to_owned()]
            .into_iter()
            .chain(flags)
            .collect()
    };
    let run = async |arguments: Vec<String>| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        ask(&ground, &arguments).await
    };
    let added = run(add(&connection.to_uppercase(), "acme", "customer"))
        .await
        .document(0);
    let mut expected = json!({
        "connectionId": connection, "enterpriseId": "acme", "clientId": client, "partnersClientId": "customer",
        "partnersConnectionId": "link \"1\"", "createdAt": added["createdAt"], "result": "added",
    });
    assert_eq!(added, expected);
    assert_eq!(shape(&added["createdAt"]), "time");
    expected["result"] = json!("exists");
    assert_eq!(run(add(&connection, "acme", "customer")).await.document(0), expected);
    run(add(&connection, "acme", "other")).await.refused(1, "other content");
    run(add(&Uuid::new_v4().to_string(), "nobody", "customer"))
        .await
        .refused(1, "no partner nobody");
    run(add("x", "acme", "customer"))
        .await
        .refused(2, "a UUID has 36 characters");
    run(add(&Uuid::new_v4().to_string(), "acme", &"x".repeat(1025)))
        .await
        .refused(2, "1 to 1024 bytes");
}

// Money --------------------------------------------------------------------------------------------------------------

const MAX: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";

#[tokio::test]
async fn funds_come_in_once_per_client_and_reference() {
    let ground = ledger("deposit").await;
    let (client, other) = (Uuid::new_v4().to_string(), Uuid::new_v4().to_string());
    assert_eq!(ask(&ground, &["ledger", "balances"]).await.document(0), json!([]));
    let mut expected = json!({
        "clientId": client, "currency": "ofc:x.1", "quantity": "5", "reference": "wire 1", "result": "deposited",
    });
    assert_eq!(
        deposit(&ground, &client, "ofc:x.1", "5", "wire 1").await.document(0),
        expected
    );
    expected["result"] = json!("exists");
    assert_eq!(
        deposit(&ground, &client, "ofc:x.1", "5", "wire 1").await.document(0),
        expected
    );
    deposit(&ground, &client, "ofc:x.1", "6", "wire 1").await.refused(
        1,
        "another deposit under the reference \"wire 1\" (its quantity is 5, and 6 was given)",
    );
    deposit(&ground, &client, "BTC", "7", "wire 1").await.refused(
        1,
        "(its currency is ofc:x.1, and BTC was given; its quantity is 5, and 7 was given)",
    );
    assert_eq!(
        deposit(&ground, &other, "ofc:x.1", "7", "wire 1").await.document(0)["result"],
        "deposited"
    );
    for (currency, quantity, reference) in [
        ("ofc:x.1", "0", "r"),
        ("ofc:x.1", "01", "r"),
        ("ofc:x.1", "1.0", "r"),
        ("ofc:x.1", "1e3", "r"),
        (
            "ofc:x.1",
            "115792089237316195423570985008687907853269984665640564039457584007913129639936",
            "r",
        ),
        ("o f c", "1", "r"),
        ("", "1", "r"),
        ("ofc:x.1", "1", ""),
    ] {
        deposit(&ground, &client, currency, quantity, reference)
            .await
            .refusal(2);
    }
    let balance = |account: &str, owner: Value, balance: &str| json!({"account": account, "owner": owner, "currency": "ofc:x.1", "balance": balance});
    let found = ask(&ground, &["ledger", "balances"]).await.document(0);
    let found: BTreeSet<String> = found.as_array().expect("a list").iter().map(Value::to_string).collect();
    let expected = [
        balance("external", Value::Null, "-12"),
        balance("available", json!(client), "5"),
        balance("available", json!(other), "7"),
    ];
    assert_eq!(found, expected.iter().map(Value::to_string).collect());
}

#[tokio::test]
async fn a_currency_that_looks_like_a_slip_must_be_meant() {
    let ground = ledger("new_currency").await;
    let client = Uuid::new_v4().to_string();
    // Programs deposit in as many currencies as they like.
    for (number, currency) in ["BTC", "ETH", "USDC", "USDT", "ofc:x.1", "ofc:x.2", "TBTC"]
        .iter()
        .enumerate()
    {
        let answer = deposit(&ground, &client, currency, "5", &format!("r{number}")).await;
        assert_eq!(answer.document(0)["result"], "deposited", "{currency}");
    }
    let before = ask(&ground, &["ledger", "balances"]).await.document(0);
    for (currency, meant) in [
        ("BTX", "BTC"),
        ("btc", "BTC"),
        ("BTCC", "BTC"),
        ("ofc:y.1", ""),
        ("ofc-x.1", "ofc:x.1"),
    ] {
        let answer = deposit(&ground, &client, currency, "5", "slip").await;
        if meant.is_empty() {
            assert_eq!(answer.document(0)["result"], "deposited");
            continue;
        }
        let (message, hint) = answer.refusal(2);
        assert!(
            message.contains(&format!("never held the currency {currency}")),
            "{message}"
        );
        assert!(
            hint.contains(&format!("did you mean {meant}?")) && hint.contains("--new-currency"),
            "{hint}"
        );
    }
    // Nothing was opened but what was meant.
    let after = ask(&ground, &["ledger", "balances"]).await.document(0);
    let opened = |balances: &Value| balances.as_array().map_or(0, Vec::len);
    assert_eq!(opened(&after), opened(&before) + 2);
    let meant = [
        "deposit",
        "--client-id",
        &client,
        "--currency",
        "BTX",
        "--quantity",
        "5",
        "--reference",
        "meant",
        "--new-currency",
    ];
    for result in ["deposited", "exists"] {
        assert_eq!(ask(&ground, &meant).await.document(0)["result"], result);
    }
    // Once it is there nobody has to say so.
    assert_eq!(
        deposit(&ground, &client, "BTX", "1", "next").await.document(0)["result"],
        "deposited"
    );
}

/// Only what is available goes out, once per client and reference, and the books prove it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn funds_go_out_once_per_client_and_reference() {
    let ground = ledger("withdraw").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    let client = partner.client.to_string();
    let withdraw = async |quantity: &str, reference: &str| {
        move_funds(&ground, "withdraw", &client, ("BTC", quantity), reference).await
    };
    withdraw("1", "out 1").await.refused(1, "has less than 1 BTC available");
    deposit(&ground, &client, "BTC", "100", "out 1").await.document(0);
    let line = partner.allocation("BTC", "40").line();
    ask_with(&ground, &["allocation", "reserve"], &line).await;
    withdraw("61", "out 1")
        .await
        .refused(1, "has less than 61 BTC available");
    let mut expected = json!({
        "clientId": client, "currency": "BTC", "quantity": "25", "reference": "out 1", "result": "withdrawn",
    });
    assert_eq!(withdraw("25", "out 1").await.document(0), expected);
    expected["result"] = json!("exists");
    assert_eq!(withdraw("25", "out 1").await.document(0), expected);
    withdraw("5", "out 1").await.refused(
        1,
        "another withdrawal under the reference \"out 1\" (its quantity is 25, and 5 was given)",
    );
    move_funds(&ground, "withdraw", &client, ("ETH", "25"), "out 1")
        .await
        .refused(1, "its currency is BTC, and ETH was given");
    for (quantity, reference) in [("0", "r"), ("1.5", "r"), ("-1", "r"), ("1", "")] {
        withdraw(quantity, reference).await.refusal(2);
    }
    // Whoever comes first takes what is left: thirty-five at ten each go out three times.
    let left = futures_util::future::join_all(
        (0..8).map(async |number| withdraw("10", &format!("race {number}")).await.code == Some(0)),
    )
    .await;
    assert_eq!(left.iter().filter(|went| **went).count(), 3, "{left:?}");
    let balances = ask(&ground, &["ledger", "balances"]).await.document(0);
    let of = |account: &str| {
        let mut found = balances.as_array().expect("a list").iter();
        found.find(|balance| balance["account"] == account).expect("an account")["balance"].clone()
    };
    assert_eq!(
        (of("available"), of("external"), of("held")),
        (json!("5"), json!("-45"), json!("40"))
    );
    let acts = ask(&ground, &["audit", "list", "--act", "withdraw"]).await.lines(0);
    assert_eq!(acts.len(), 4, "{acts:?}");
    let checked = ask(&ground, &["ledger", "check"]).await.document(0);
    assert_eq!(
        (&checked["ok"], &checked["counted"]["withdrawals"]),
        (&json!(true), &json!(4)),
        "{checked}"
    );
    let wrong = "UPDATE settled.withdrawals SET quantity = 26 WHERE reference = 'out 1'";
    ground.tamper(wrong).await;
    let checked = ask(&ground, &["ledger", "check"]).await.document(1);
    let problems = checked["problems"].to_string();
    assert!(
        problems.contains("is withdrawal of 25") && problems.contains("instead of withdrawal of 26"),
        "{problems}"
    );
}

#[tokio::test]
async fn ten_times_the_largest_quantity_is_exact() {
    let ground = ledger("largest").await;
    let client = Uuid::new_v4().to_string();
    for number in 0..10 {
        let told = deposit(&ground, &client, "WEI", MAX, &format!("r{number}"))
            .await
            .document(0);
        assert_eq!(told["quantity"], MAX);
    }
    let sum: BigInt = MAX.parse::<BigInt>().expect("a number") * 10;
    let balances = ask(&ground, &["ledger", "balances"]).await.document(0);
    assert_eq!(
        balances,
        json!([
            {"account": "external", "owner": null, "currency": "WEI", "balance": format!("-{sum}")},
            {"account": "available", "owner": client, "currency": "WEI", "balance": sum.to_string()},
        ])
    );
    assert_eq!(ask(&ground, &["ledger", "check"]).await.document(0)["ok"], true);
}

#[tokio::test]
async fn each_reservation_is_judged_on_its_own() {
    let ground = ledger("reserve").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    deposit(&ground, &partner.client.to_string(), "BTC", "100", "r")
        .await
        .document(0);
    let one = partner.allocation("BTC", "60");
    let with = |base: &Reservation, name: &str, value: Value| {
        let mut line: Value = serde_json::from_str(&base.line()).expect("JSON");
        line[name] = value;
        line.to_string()
    };
    let fresh = || partner.allocation("BTC", "1");
    let too_much = partner.allocation("BTC", "41");
    let nothing_there = partner.deallocation("BTC", "1");
    let last = partner.allocation("BTC", "40");
    let (same_name, stranger, no_field) = (fresh(), fresh(), fresh());
    let reserve = ["allocation", "reserve"];
    let refused = |id: Uuid, reason: &str, detail: &str| json!({"id": id, "result": "refused", "reason": reason, "detail": detail});
    let elsewhere = partner.allocation("ETH", "1");
    let lines = [
        one.line(),
        with(&one, "id", json!(one.id.to_string().to_uppercase())),
        with(&one, "amount", json!({"currency": "BTC", "quantity": "61"})),
        with(&one, "notes", json!("other")),
        with(&same_name, "clientExternalId", json!(one.client_external_id)),
        with(&stranger, "connectionId", json!(Uuid::new_v4())),
        too_much.line(),
        nothing_there.line(),
        String::new(),
        last.line(),
        elsewhere.line(),
    ];
    let answers = ask_with(&ground, &reserve, &lines.join("\n")).await.lines(3);
    let nothing = "1 is more than the 0";
    assert_eq!(
        answers,
        [
            json!({"id": one.id, "result": "reserved"}),
            json!({"id": one.id, "result": "exists"}),
            refused(one.id, "conflict", "amount.quantity: this id is reserved with 60"),
            refused(one.id, "conflict", "notes: this id is reserved with another one"),
            refused(
                same_name.id,
                "conflict",
                &format!("clientExternalId: this client used it before, for {}", one.id)
            ),
            refused(
                stranger.id,
                "unknown_connection",
                "connectionId: no connection of this id is registered"
            ),
            refused(
                too_much.id,
                "insufficient_funds",
                "amount.quantity: 41 is more than the 40 BTC that are available"
            ),
            refused(
                nothing_there.id,
                "insufficient_funds",
                &format!("amount.quantity: {nothing} BTC that are allocated")
            ),
            json!({"id": last.id, "result": "reserved"}),
            refused(
                elsewhere.id,
                "insufficient_funds",
                &format!("amount.quantity: {nothing} ETH that are available")
            ),
        ]
    );
    // Every field that a reservation has is named when it is another.
    for (name, value, detail) in [
        (
            "type",
            json!("deallocation"),
            "type: this id is reserved with allocation",
        ),
        (
            "connectionId",
            json!(Uuid::new_v4()),
            &format!("connectionId: this id is reserved with {}", partner.connection),
        ),
        (
            "amount",
            json!({"currency": "ETH", "quantity": "60"}),
            "amount.currency: this id is reserved with BTC",
        ),
        ("clientExternalId", json!("other"), "clientExternalId: this id"),
        ("initiatedBy", json!("other"), "initiatedBy: this id"),
        ("reason", json!("other"), "reason: this id"),
        ("retriable", json!(true), "retriable: this id is reserved with false"),
    ] {
        let answer = ask_with(&ground, &reserve, &with(&one, name, value))
            .await
            .lines(1)
            .remove(0);
        assert_eq!(answer["reason"], "conflict");
        let found = answer["detail"].as_str().expect("a detail");
        assert!(found.starts_with(detail), "{name}: {found}");
    }
    // What is no reservation is refused in its place, with its id where that can be read.
    let lines = [
        "nonsense".to_owned(),
        with(&no_field, "initiatedBy", json!(7)),
        one.line(),
    ];
    let answers = ask_with(&ground, &reserve, &lines.join("\n")).await.lines(3);
    assert_eq!(
        answers.iter().map(shape).collect::<Vec<_>>(),
        [
            json!({"id": "null", "result": "text", "reason": "text", "detail": "text"}),
            json!({"id": "uuid", "result": "text", "reason": "text", "detail": "text"}),
            json!({"id": "uuid", "result": "text"}),
        ]
    );
    assert_eq!(
        (&answers[1]["id"], &answers[1]["reason"]),
        (&json!(no_field.id), &json!("invalid_field"))
    );
    assert_eq!(answers[2]["result"], "exists");
    // The id of a deposit is taken, and costs the lines beside it nothing.
    let db = ground.db().await;
    let deposit_id: Uuid = db
        .query_one("SELECT id FROM settled.deposits", &[])
        .await
        .expect("it")
        .get(0);
    deposit(&ground, &partner.client.to_string(), "ETH", "9", "r3")
        .await
        .document(0);
    let [before, theirs, after] = [(); 3].map(|()| partner.allocation("ETH", "3"));
    let lines = [before.line(), with(&theirs, "id", json!(deposit_id)), after.line()];
    let answers = ask_with(&ground, &reserve, &lines.join("\n")).await.lines(3);
    let taken = "id: it, or the clientExternalId, was taken by somebody else just now";
    assert_eq!(
        answers,
        [
            json!({"id": before.id, "result": "reserved"}),
            refused(deposit_id, "conflict", taken),
            json!({"id": after.id, "result": "reserved"}),
        ]
    );
    // All refused, none asked, all there.
    assert_eq!(ask_with(&ground, &reserve, &too_much.line()).await.lines(1).len(), 1);
    assert!(ask_with(&ground, &reserve, "\n \n").await.lines(0).is_empty());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.ndjson", ground.name));
    std::fs::write(&path, format!("{}\n{}", one.line(), last.line())).expect("a file");
    let file = path.display().to_string();
    let answers = ask(&ground, &["allocation", "reserve", &file]).await.lines(0);
    assert!(answers.iter().all(|answer| answer["result"] == "exists"), "{answers:?}");
    std::fs::remove_file(&path).expect("it goes");

    let balances = ask(&ground, &["ledger", "balances"]).await.document(0);
    let of = |account: &str| {
        let mut all = balances.as_array().expect("a list").iter();
        let found = all.find(|balance| balance["account"] == account && balance["currency"] == "BTC");
        found.map(|found| (found["balance"].clone(), found["owner"].clone()))
    };
    assert_eq!(of("available"), Some((json!("0"), json!(partner.client))));
    assert_eq!(of("held"), Some((json!("100"), json!(partner.connection))));
    assert_eq!(of("external"), Some((json!("-100"), Value::Null)));

    // A reservation may say why, whether it may be tried again, and something about it.
    deposit(&ground, &partner.client.to_string(), "BTC", "1", "r2")
        .await
        .document(0);
    let mut line: Value = serde_json::from_str(&fresh().line()).expect("JSON");
    line["reason"] = json!("the compliance desk looks");
    line["retriable"] = json!(true);
    line["notes"] = json!("café");
    ask_with(&ground, &reserve, &line.to_string()).await.lines(0);
    let id = line["id"].as_str().expect("an id");
    let shown = ask(&ground, &["allocation", "show", id]).await.document(0);
    let shown = &shown["allocation"];
    assert_eq!(
        (&shown["reason"], &shown["retriable"], &shown["notes"]),
        (&line["reason"], &line["retriable"], &line["notes"])
    );
}

// Lives --------------------------------------------------------------------------------------------------------------

fn payload_digest(message: &Message) -> String {
    let body: Value = serde_json::from_slice(&message.body).expect("JSON");
    hex::encode(sha256(body["payload"].as_str().expect("a payload").as_bytes()))
}

fn nonce(message: &Message) -> String {
    let body: Value = serde_json::from_slice(&message.body).expect("JSON");
    body["nonce"].as_str().expect("a nonce").to_owned()
}

/// The `what` of each moment.
fn whats(timeline: &Value) -> Vec<&str> {
    let moments = timeline["timeline"].as_array().expect("moments");
    moments
        .iter()
        .map(|moment| moment["what"].as_str().expect("what"))
        .collect()
}

#[tokio::test]
async fn lives_are_told_from_every_side() {
    let place = Place::new("lives").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    let mut noted = partner.allocation("BTC", "10");
    noted.notes = Some("a note".to_owned());
    let waiting = partner.allocation("BTC", "20");
    let released = partner.allocation("BTC", "30");
    let late = partner.allocation("BTC", "40");
    place.reserve(&[noted.clone(), waiting.clone(), released.clone()]).await;
    let worker = place.ready_worker(&[LEAVE_DEAD_LETTERS]).await;
    let clears = partner
        .draft(&noted, "cleared")
        .set("evaluationId", "ev-1")
        .set("pendingApprovalId", "pa-1")
        .set("policyResult", "APPROVED")
        .message(Expect::Settles);
    let frees = partner.released(&released);
    let early = partner.cleared(&late);
    let refused = partner
        .draft(&waiting, "cleared")
        .set("clientId", json!(Uuid::new_v4()))
        .message(Expect::Refused("allocation_mismatch"));
    place
        .publish(&[clears.clone(), frees.clone(), early.clone(), refused.clone()])
        .await;
    let db = place.db().await;
    until("it waits", PATIENCE, async || {
        let rows = db.query("SELECT FROM settled.parked", &[]).await.expect("parked");
        (rows.len() == 1).then_some(())
    })
    .await;
    let parked = ask(
        &place,
        &["receipt", "--enterprise-id", "acme", "--nonce", &nonce(&early)],
    )
    .await
    .document(0);
    assert_eq!(
        (&parked["verdict"], &parked["reason"]),
        (&json!("parked"), &json!("allocation_not_found"))
    );
    let timeline = ask(&place, &["timeline", &nonce(&early)]).await.document(0);
    assert_eq!(whats(&timeline), ["received", "parked", "judged", "event"]);
    place.reserve(std::slice::from_ref(&late)).await;
    place.rest().await;

    // Reserved.
    let id = waiting.id.to_string();
    let shown = ask(&place, &["allocation", "show", &id]).await.document(0);
    let view = &shown["allocation"];
    assert_eq!(
        shown,
        json!({"allocation": {
            "id": id, "amount": {"currency": "BTC", "quantity": "20"}, "connectionId": partner.connection,
            "clientExternalId": waiting.client_external_id, "initiatedBy": "the auditor",
            "createdAt": view["createdAt"], "updatedAt": view["createdAt"], "retriable": false,
            "reason": "awaiting the partner's update", "status": "reserved", "type": "allocation",
        }})
    );
    assert_eq!(shape(&view["createdAt"]), "time");
    let history = ask(&place, &["allocation", "show", &id.to_uppercase(), "--history"])
        .await
        .document(0);
    assert_eq!(history["allocation"], *view);
    assert_eq!(history["receipts"].as_array().map(Vec::len), Some(1));
    assert_eq!(history["receipts"][0]["reason"], "allocation_mismatch");
    assert_eq!(history["transfers"].as_array().map(Vec::len), Some(1));
    assert_eq!(history["events"].as_array().map(Vec::len), Some(1));
    let rejected = ask(&place, &["timeline", &nonce(&refused)]).await.document(0);
    assert_eq!(
        whats(&rejected),
        ["reserved", "transfer", "received", "judged", "event", "dead-lettered"]
    );

    // Cleared.
    let id = noted.id.to_string();
    let shown = ask(&place, &["allocation", "show", &id, "--history"]).await.document(0);
    let view = &shown["allocation"];
    assert_eq!(
        *view,
        json!({
            "id": id, "amount": {"currency": "BTC", "quantity": "10"}, "connectionId": partner.connection,
            "clientExternalId": noted.client_external_id, "partnerExternalId": format!("theirs-{id}"),
            "initiatedBy": "the auditor", "notes": "a note", "createdAt": view["createdAt"],
            "updatedAt": view["updatedAt"], "retriable": false, "evaluationId": "ev-1", "pendingApprovalId": "pa-1",
            "policyResult": view["policyResult"], "reason": null, "status": "cleared", "type": "allocation",
        })
    );
    assert!(
        view["policyResult"]
            .as_str()
            .is_some_and(|result| result.eq_ignore_ascii_case("approved")),
        "{view}"
    );
    assert!(view["updatedAt"].as_str() > view["createdAt"].as_str(), "{view}");
    let event = event_id(&format!("allocation.cleared|{id}"));
    let keys: Vec<&String> = shown.as_object().expect("an object").keys().collect();
    assert_eq!(
        BTreeSet::from_iter(keys.iter().map(|key| key.as_str())),
        BTreeSet::from(["allocation", "receipts", "transfers", "events"])
    );
    assert_eq!(
        shape(&shown["transfers"]),
        json!([
            {"event": "text", "debit": "text", "credit": "text", "currency": "text", "amount": "text",
             "batchId": "null", "at": "time"},
            {"event": "text", "debit": "text", "credit": "text", "currency": "text", "amount": "text",
             "batchId": "uuid", "at": "time"},
        ])
    );
    let moved: Vec<_> = shown["transfers"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|transfer| {
            (
                transfer["debit"].clone(),
                transfer["credit"].clone(),
                transfer["amount"].clone(),
            )
        })
        .collect();
    assert_eq!(
        moved,
        [
            (json!("available"), json!("held"), json!("10")),
            (json!("held"), json!("allocated"), json!("10"))
        ]
    );
    assert_eq!(
        shape(&shown["events"]),
        json!([{"id": "uuid", "type": "text", "state": "text", "enterpriseId": "text", "nonce": "uuid",
                "batchId": "uuid", "at": "time"}])
    );
    assert_eq!(
        (
            &shown["events"][0]["id"],
            &shown["events"][0]["type"],
            &shown["events"][0]["state"]
        ),
        (&json!(event), &json!("allocation.cleared"), &json!("confirmed"))
    );

    // Its receipt.
    let receipt = ask(
        &place,
        &["receipt", "--enterprise-id", "acme", "--nonce", &nonce(&clears)],
    )
    .await
    .document(0);
    assert_eq!(
        receipt,
        json!({
            "enterpriseId": "acme", "nonce": nonce(&clears), "verdict": "settled", "reason": null,
            "payloadDigest": payload_digest(&clears), "messageDigest": hex::encode(sha256(&clears.body)),
            "allocationId": id, "eventId": event, "firstSeen": receipt["firstSeen"], "lastSeen": receipt["lastSeen"],
        })
    );
    assert_eq!(
        (shape(&receipt["firstSeen"]), shape(&receipt["lastSeen"])),
        (json!("time"), json!("time"))
    );
    assert_eq!(shown["receipts"], json!([receipt]));
    for (enterprise, nonce) in [("acme", "never"), ("other", &nonce(&clears))] {
        let answer = ask(&place, &["receipt", "--enterprise-id", enterprise, "--nonce", nonce]).await;
        answer.refused(1, "was ever seen");
    }

    // Its life, found by each of its names.
    let names = [
        id.clone(),
        id.to_uppercase(),
        nonce(&clears),
        payload_digest(&clears),
        hex::encode(sha256(&clears.body)),
        hex::encode_upper(sha256(&clears.body)),
    ];
    for name in &names {
        let timeline = ask(&place, &["timeline", name]).await.document(0);
        assert_eq!(
            whats(&timeline),
            [
                "reserved", "transfer", "received", "judged", "settled", "transfer", "event"
            ],
            "{name}"
        );
        for moment in timeline["timeline"].as_array().into_iter().flatten() {
            assert_eq!(moment["allocationId"], json!(id));
            assert_eq!(shape(&moment["at"]), "time");
            let batch = !matches!(moment["what"].as_str(), Some("reserved"))
                && moment["detail"] != timeline["timeline"][1]["detail"];
            assert_eq!(moment["worker"] == "w0", batch, "{moment}");
            assert_eq!(moment["batchId"].is_string(), batch, "{moment}");
        }
        let last = &timeline["timeline"][6];
        assert_eq!(last["eventId"], json!(event));
        assert!(
            last["detail"]
                .as_str()
                .is_some_and(|detail| detail.ends_with("confirmed")),
            "{last}"
        );
    }
    ask(&place, &["timeline", "never"]).await.refused(1, "nothing is known");
    ask(&place, &["timeline", &"0".repeat(64)])
        .await
        .refused(1, "nothing is known");
    ask(&place, &["timeline", &Uuid::new_v4().to_string()])
        .await
        .refused(1, "nothing is known");

    // Released.
    let id = released.id.to_string();
    let shown = ask(&place, &["allocation", "show", &id]).await.document(0);
    let view = &shown["allocation"];
    assert_eq!(
        (&view["status"], &view["reason"], &view["partnerExternalId"]),
        (
            &json!("released"),
            &json!("insufficient funds at the custodian"),
            &json!(format!("theirs-{id}"))
        )
    );

    // Parked, then woken.
    let timeline = ask(&place, &["timeline", &late.id.to_string()]).await.document(0);
    let found = whats(&timeline);
    let mut rest = found.iter();
    for what in [
        "received", "parked", "reserved", "woken", "judged", "settled", "transfer", "event",
    ] {
        assert!(rest.any(|found| *found == what), "{what} in {found:?}");
    }
    let receipt = ask(
        &place,
        &["receipt", "--enterprise-id", "acme", "--nonce", &nonce(&early)],
    )
    .await
    .document(0);
    assert_eq!(
        (&receipt["verdict"], &receipt["reason"]),
        (&json!("settled"), &Value::Null)
    );

    // One screen for people, too.
    let answer = Answer::of(&place.run(&["timeline", &late.id.to_string()]).await);
    assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""));
    assert!(
        answer.out.contains("woken") && answer.out.lines().count() < 24,
        "{}",
        answer.out
    );
    place.settle_up(worker).await;
}

// Explain ------------------------------------------------------------------------------------------------------------

async fn explain(place: &Place, message: &Message, flags: &[&str]) -> Value {
    let body = String::from_utf8(message.body.clone()).expect("UTF-8");
    let arguments = [&["explain", "--routing-key", message.routing_key.as_str()], flags].concat();
    ask_with(place, &arguments, &body).await.document(0)
}

#[tokio::test]
async fn explain_judges_and_writes_nothing() {
    let place = Place::new("explain").await;
    let [one, two, bound, asleep, sync] = ["acme", "other", "bound", "asleep", "sync"].map(Partner::new);
    let stranger = Partner::new("nobody");
    for partner in [&one, &two, &asleep] {
        place.register(partner).await;
    }
    place.register_with(&bound, &["--broker-user", "their-user"]).await;
    place.register_with(&sync, &["--no-async-allocations"]).await;
    ask(&place, &["partner", "suspend", "--enterprise-id", "asleep"])
        .await
        .document(0);
    for partner in [&one, &two] {
        place.deposit(partner, "BTC", "1000").await;
    }
    let [open, done, kept] = ["10", "20", "30"].map(|quantity| one.allocation("BTC", quantity));
    let theirs = two.allocation("BTC", "5");
    place
        .reserve(&[open.clone(), done.clone(), kept.clone(), theirs.clone()])
        .await;
    let worker = place.ready_worker(&[]).await;
    let settled = one.cleared(&done);
    place.publish(&[settled.clone(), one.cleared(&kept)]).await;
    place.rest().await;
    let back = one.deallocation("BTC", "30");
    place.reserve(std::slice::from_ref(&back)).await;
    assert_eq!(worker.terminate().await.code(), Some(0));

    let db = place.db().await;
    let before = picture(&db).await;
    let transfer = |debit: &str, credit: &str, amount: &str| json!([{"debit": debit, "credit": credit, "currency": "BTC", "amount": amount}]);
    for (message, transfers) in [
        (one.cleared(&open), transfer("held", "allocated", "10")),
        (one.released(&open), transfer("held", "available", "10")),
        (one.cleared(&back), transfer("held", "available", "30")),
        (one.released(&back), transfer("held", "allocated", "30")),
    ] {
        assert_eq!(
            explain(&place, &message, &[]).await,
            json!({"verdict": "settled", "reason": null, "class": null, "final": null, "detail": null,
                   "transfers": transfers})
        );
    }
    for message in [&settled, &one.cleared(&done)] {
        let said = explain(&place, message, &[]).await;
        assert_eq!(
            (&said["verdict"], &said["reason"], &said["transfers"]),
            (&json!("duplicate"), &Value::Null, &json!([]))
        );
        assert_eq!(shape(&said["detail"]), "text");
    }
    let said = explain(&place, &one.cleared(&one.allocation("BTC", "1")), &[]).await;
    assert_eq!(
        (
            &said["verdict"],
            &said["reason"],
            &said["class"],
            &said["final"],
            &said["transfers"]
        ),
        (
            &json!("parked"),
            &json!("allocation_not_found"),
            &json!(404),
            &json!(false),
            &json!([])
        )
    );

    let draft = || one.draft(&open, "cleared");
    let any = Expect::Any;
    let mut signature = partner_signature(&draft().message(any));
    signature.push('0');
    let other_amount = {
        let payload = draft().fields.text();
        draft()
            .set("amount", json!({"currency": "BTC", "quantity": "4"}))
            .message_with(&payload, any)
    };
    let nonce_again = draft().set("nonce", nonce(&settled)).message(any);
    let large = draft().set("filler", "x".repeat(262_144)).message(any);
    let table: Vec<(&str, u16, bool, Message, &[&str])> = vec![
        ("message_too_large", 400, true, large, &[]),
        (
            "malformed_message",
            400,
            true,
            Message::new("acme.allocation.update", "no json", any),
            &[],
        ),
        (
            "malformed_message",
            400,
            true,
            Message::new("no.such.key", "{}", any),
            &[],
        ),
        (
            "malformed_message",
            400,
            true,
            draft().message(any),
            &["--content-type", "text/plain"],
        ),
        ("invalid_field", 400, true, draft().without("nonce").message(any), &[]),
        (
            "unknown_partner",
            401,
            false,
            stranger.draft(&open, "cleared").message(any),
            &[],
        ),
        (
            "sender_mismatch",
            403,
            false,
            bound.draft(&open, "cleared").message(any),
            &[],
        ),
        (
            "sender_mismatch",
            403,
            false,
            bound.draft(&open, "cleared").message(any),
            &["--user-id", "another"],
        ),
        (
            "malformed_signature",
            401,
            true,
            draft().message_signed(&draft().fields.text(), &signature, any),
            &[],
        ),
        (
            "signature_mismatch",
            401,
            false,
            draft().signed_by(new_key()).message(any),
            &[],
        ),
        ("payload_mismatch", 400, true, other_amount, &[]),
        ("nonce_reused", 409, true, nonce_again, &[]),
        (
            "policy_contradiction",
            400,
            false,
            draft().set("policyResult", "Rejected").message(any),
            &[],
        ),
        (
            "partner_inactive",
            403,
            false,
            asleep.draft(&open, "cleared").message(any),
            &[],
        ),
        (
            "partner_inactive",
            403,
            false,
            sync.draft(&open, "cleared").message(any),
            &[],
        ),
        (
            "not_permitted",
            403,
            true,
            one.draft(&theirs, "cleared").message(any),
            &[],
        ),
        (
            "not_permitted",
            403,
            true,
            Draft::of_other_kind(&one, &open).message(any),
            &[],
        ),
        (
            "allocation_mismatch",
            409,
            true,
            draft().set("clientId", json!(Uuid::new_v4())).message(any),
            &[],
        ),
        ("already_settled", 409, true, one.released(&done), &[]),
    ];
    for (reason, class, is_final, message, flags) in table {
        let said = explain(&place, &message, flags).await;
        let mut expected = json!({"verdict": "rejected", "reason": reason, "class": class, "final": is_final,
                                  "detail": said["detail"], "transfers": []});
        // Whose signature it is, where that is the question.
        if reason == "signature_mismatch" {
            expected["recoveredKey"] = said["recoveredKey"].clone();
            assert_eq!(shape(&said["recoveredKey"]), "text", "{said}");
        }
        assert_eq!(said, expected);
        assert_eq!(shape(&said["detail"]), "text", "{reason}: {said}");
    }
    // With the right sender it goes on to the next question.
    let said = explain(&place, &bound.cleared(&open), &["--user-id", "their-user"]).await;
    assert_eq!(said["reason"], "not_permitted", "{said}");
    // From a file, for a person; and `-` is stdin.
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.json", place.name));
    let message = one.cleared(&open);
    std::fs::write(&path, &message.body).expect("a file");
    let file = path.display().to_string();
    let answer = Answer::of(
        &place
            .run(&["explain", &file, "--routing-key", &message.routing_key])
            .await,
    );
    std::fs::remove_file(&path).expect("it goes");
    assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""));
    assert!(
        answer.out.contains("verdict: settled") && answer.out.contains("allocated"),
        "{}",
        answer.out
    );
    assert_eq!(explain(&place, &message, &["-"]).await["verdict"], "settled");
    assert_eq!(picture(&db).await, before);
    place.audit().await;
}

// The books ----------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn spoilt_books_are_named() {
    let ground = ledger("books").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    deposit(&ground, &partner.client.to_string(), "BTC", "100", "r")
        .await
        .document(0);
    let reservation = partner.allocation("BTC", "60");
    ask_with(&ground, &["allocation", "reserve"], &reservation.line())
        .await
        .lines(0);
    let good = ask(&ground, &["ledger", "check"]).await.document(0);
    assert_eq!((&good["ok"], &good["problems"]), (&json!(true), &json!([])));

    let mut db = ground.db().await;
    db.batch_execute("CREATE TEMPORARY TABLE kept_transfers AS SELECT * FROM settled.transfers")
        .await
        .expect("a copy");
    let id = reservation.id;
    let stranger = Uuid::new_v4();
    let (client, connection) = (partner.client, partner.connection);
    let spoilt: [(String, Vec<String>); 8] = [
        (
            "UPDATE settled.funds SET held = held + 1 WHERE holder = 'connection'".into(),
            vec![format!(
                "(held of {connection}, BTC): its balance is 61 and its entries sum to 60"
            )],
        ),
        (
            "UPDATE settled.funds SET currency = 'ETH' WHERE holder = 'connection'".into(),
            vec![
                "currency BTC: its entries sum to -60 instead of 0".into(),
                "currency ETH: its entries sum to 60 instead of 0".into(),
                "it moves 60 from account".into(),
            ],
        ),
        (
            "UPDATE settled.transfers SET amount = 62 WHERE amount = 60".into(),
            vec![
                format!("of allocation {id} is reserved of 62"),
                "its balance is 60 and its entries sum to 62".into(),
            ],
        ),
        (
            format!("DELETE FROM settled.transfers WHERE subject_id = '{id}'"),
            vec![
                format!("allocation {id} is reserved, and its transfer (60 from"),
                "its balance is 60 and its entries sum to 0".into(),
            ],
        ),
        (
            format!(
                "UPDATE settled.allocations SET status = 'cleared', reason = NULL, settled_nonce = 'n', partner_external_id = 'p' WHERE id = '{id}'"
            ),
            vec![
                format!("allocation {id} is cleared, and its transfer"),
                format!("allocation {id} is cleared, and its settlement is missing"),
            ],
        ),
        (
            format!("UPDATE settled.allocations SET quantity = 59 WHERE id = '{id}'"),
            vec![
                format!("of allocation {id} is reserved of 60"),
                "instead of reserved of 59".into(),
            ],
        ),
        (
            "UPDATE settled.deposits SET quantity = 99".into(),
            vec!["is deposit of 100".into(), "instead of deposit of 99".into()],
        ),
        (
            format!("UPDATE settled.funds SET owner = '{stranger}' WHERE owner = '{client}'"),
            vec!["is not that of its client and connection".into()],
        ),
    ];
    for (sql, pieces) in spoilt {
        let transaction = db.transaction().await.expect("a transaction");
        // As the owner may: no trigger and no constraint between tables stands in the way.
        transaction
            .batch_execute("SET LOCAL session_replication_role = replica")
            .await
            .expect("the owner");
        transaction
            .batch_execute(&sql)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
        transaction.commit().await.expect("spoilt");
        let bad = ask(&ground, &["ledger", "check"]).await.document(1);
        assert_eq!(bad["ok"], false, "{sql}");
        let problems: Vec<&str> = bad["problems"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        for piece in &pieces {
            assert!(
                problems.iter().any(|problem| problem.contains(piece)),
                "{sql}: {piece:?} in {problems:?}"
            );
        }
        let said = Answer::of(&ground.run(&["ledger", "check"]).await);
        assert_eq!((said.code, said.err.as_str()), (Some(1), ""), "{sql}");
        assert!(
            problems.iter().all(|problem| said.out.contains(problem)),
            "{}",
            said.out
        );
        // Put right again for the next.
        restore(&mut db, &sql, id, client, connection).await;
        let good = ask(&ground, &["ledger", "check"]).await.document(0);
        assert_eq!(good["ok"], true, "{sql}: {good}");
    }
}

/// Undoes what a test spoilt.
async fn restore(db: &mut Client, sql: &str, id: Uuid, client: Uuid, connection: Uuid) {
    let undo = format!(
        "SET LOCAL session_replication_role = replica;
         UPDATE settled.allocations SET status = 'reserved', reason = 'awaiting the partner''s update',
                settled_nonce = NULL, partner_external_id = NULL, quantity = 60 WHERE id = '{id}';
         UPDATE settled.deposits SET quantity = 100;
         UPDATE settled.funds SET owner = '{client}' WHERE holder = 'client';
         UPDATE settled.funds SET held = 60, currency = 'BTC' WHERE owner = '{connection}';
         UPDATE settled.transfers SET amount = 60 WHERE amount = 62;
         INSERT INTO settled.transfers OVERRIDING SYSTEM VALUE SELECT * FROM kept_transfers
         WHERE NOT EXISTS (SELECT FROM settled.transfers AS t WHERE t.id = kept_transfers.id)"
    );
    let transaction = db.transaction().await.expect("a transaction");
    transaction
        .batch_execute(&undo)
        .await
        .unwrap_or_else(|error| panic!("after {sql}: {error:?}"));
    transaction.commit().await.expect("put right");
}

// Settings -----------------------------------------------------------------------------------------------------------

/// How long a message would wait, in hours: the effective `park.deadline`.
async fn hours(variables: &[(&str, &str)], arguments: &[&str], message: &Message) -> i64 {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.body", Uuid::new_v4()));
    std::fs::write(&path, &message.body).expect("a file");
    let file = path.display().to_string();
    let explain = ["explain", &file, "--routing-key", &message.routing_key];
    let said = ask_in(variables, &[&explain, arguments].concat()).await.document(0);
    std::fs::remove_file(&path).expect("it goes");
    let detail = said["detail"].as_str().expect("a detail");
    let until = detail
        .split_once("until ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .expect("a time");
    let until: jiff::Timestamp = until.parse().expect("RFC 3339");
    let minutes = until.duration_since(jiff::Timestamp::now()).as_secs() / 60;
    (minutes + 30) / 60
}

#[tokio::test]
async fn flags_beat_the_environment_which_beats_the_file() {
    let ground = ledger("settings").await;
    let partner = Partner::new("acme");
    register(&ground, &partner).await;
    let message = partner.cleared(&partner.allocation("BTC", "1"));
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.toml", ground.name));
    let write = |text: &str| std::fs::write(&path, text).expect("a file");
    write("[park]\ndeadline = \"3h\"\n");
    let file = path.display().to_string();
    let url = ("SETTLED_DATABASE_URL", ground.database_url.as_str());
    let variable = ("SETTLED_PARK__DEADLINE", "5h");
    let (named, flag) = (["--config", &file], ["--set", "park.deadline=7h"]);
    for (variables, arguments, expected) in [
        (&[url][..], &[][..], 0),
        (&[url], &named[..], 3),
        (&[url, variable], &named, 5),
        (&[url, variable], &[], 5),
        (&[url, variable], &[&named[..], &flag[..]].concat(), 7),
        (&[url], &flag, 7),
    ] {
        assert_eq!(
            hours(variables, arguments, &message).await,
            expected,
            "{variables:?} {arguments:?}"
        );
    }

    // The URLs, which have names of their own.
    let nowhere = format!("postgres://u:p4ss@{NOWHERE}/x");
    let list = ["partner", "list"];
    let away = ("SETTLED_DATABASE_URL", nowhere.as_str());
    ask_in(&[away], &list).await.refusal(69);
    ask_in(&[url], &[&list[..], &["--database-url", &nowhere]].concat())
        .await
        .refusal(69);
    ask_in(&[away], &[&list[..], &["--database-url", url.1]].concat())
        .await
        .document(0);
    write(&format!("[database]\nurl = \"{nowhere}\"\n"));
    ask_in(&[], &[&list[..], &named].concat()).await.refusal(69);
    ask_in(&[url], &[&list[..], &named].concat()).await.document(0);
    ask_in(&[], &list).await.refused(2, "no database is configured");
    ask_in(&[], &["topology"]).await.refused(2, "no broker is configured");

    // And files that hold them.
    write(&format!("{}\n", url.1));
    ask_in(&[("SETTLED_DATABASE_URL_FILE", &file)], &list).await.document(0);
    write(&format!("  {nowhere}\n\n"));
    ask_in(&[("SETTLED_DATABASE_URL_FILE", &file)], &list).await.refusal(69);
    ask_in(&[("SETTLED_DATABASE_URL_FILE", "/no/such/file")], &list)
        .await
        .refused(2, "SETTLED_DATABASE_URL_FILE");
    write("\n");
    ask_in(&[("SETTLED_DATABASE_URL_FILE", &file)], &list)
        .await
        .refused(2, "is empty");
    write(&ground.broker_url);
    ask_in(&[("SETTLED_BROKER_URL_FILE", &file)], &["topology"])
        .await
        .document(0);

    // Wrong ones are named, with where they were said.
    let other = |name: &'static str, value: &'static str| vec![url, (name, value)];
    for (variables, flags, pieces) in [
        (
            other("SETTLED_PARK__DEADLIN", "2s"),
            vec![],
            ["park.deadlin", "SETTLED_PARK__DEADLIN"],
        ),
        (
            other("SETTLED_NO__SENSE", "1"),
            vec![],
            ["no.sense", "SETTLED_NO__SENSE"],
        ),
        (
            other("SETTLED_PARK__DEADLINE", "2"),
            vec![],
            ["park.deadline", "SETTLED_PARK__DEADLINE"],
        ),
        (
            other("SETTLED_WORKER__LANES", "17"),
            vec![],
            ["worker.lanes", "SETTLED_WORKER__LANES"],
        ),
        (
            vec![url],
            vec!["--set", "park.deadlin=2s"],
            ["park.deadlin", "command line"],
        ),
        (
            vec![url],
            vec!["--set", "worker.lanes=x"],
            ["worker.lanes", "command line"],
        ),
    ] {
        let (message, _) = ask_in(&variables, &[&list[..], &flags].concat()).await.refusal(2);
        assert!(
            pieces.iter().all(|piece| message.contains(piece)),
            "{pieces:?}: {message}"
        );
    }
    write("[park]\n\ndeadlin = \"2s\"\n");
    let (message, hint) = ask_in(&[url], &[&list[..], &named].concat()).await.refusal(2);
    assert!(
        message.contains("park.deadlin") && message.contains("line 3"),
        "{message}"
    );
    assert!(hint.contains("park.deadline"), "{hint}");
    write("[park\n");
    ask_in(&[url], &[&list[..], &named].concat()).await.refused(2, "line 1");
    let answer = ask_in(&[("SETTLED_DATABASE_URL", "mysql://u:p4ss@h/d")], &list).await;
    answer.refused(2, "database.url");
    assert!(!answer.all().contains("p4ss"), "{}", answer.all());
    std::fs::remove_file(&path).expect("it goes");
}

/// Runs a worker that ends by itself. It logs to stderr before its last word.
async fn worker(ground: &Ground) -> Answer {
    let mut answer = ask(ground, &["worker", "--set", "http.listen=127.0.0.1:0"]).await;
    answer.err = answer.err.lines().last().unwrap_or_default().to_owned();
    answer
}

#[tokio::test]
async fn another_schema_is_a_sentence() {
    let ground = Ground::new("schema").await;
    ground.create_database("template0").await;
    for arguments in [
        &["partner", "list"][..],
        &["ledger", "check"],
        &["ledger", "balances"],
        &["timeline", "x"],
    ] {
        let (message, hint) = ask(&ground, arguments).await.refusal(1);
        assert!(
            format!("{message} {hint}").contains("settled migrate"),
            "{arguments:?}: {message} {hint}"
        );
    }
    worker(&ground).await.refused(1, "settled migrate");
    // What must be a sentence is also one where there is no schema: a reservation, a message, a deposit.
    let partner = Partner::new("acme");
    let reservation = partner.allocation("BTC", "1");
    let answer = ask_with(&ground, &["allocation", "reserve"], &reservation.line()).await;
    answer.refused(1, "no schema");
    let message = partner.cleared(&reservation);
    let body = String::from_utf8(message.body.clone()).expect("UTF-8");
    let answer = ask_with(&ground, &["explain", "--routing-key", &message.routing_key], &body).await;
    answer.refused(1, "no schema");
    deposit(&ground, &partner.client.to_string(), "BTC", "1", "r")
        .await
        .refused(1, "no schema");

    let first = ask(&ground, &["migrate"]).await.document(0);
    assert!(
        first["applied"].as_array().is_some_and(|applied| !applied.is_empty()),
        "{first}"
    );
    let version = first["version"].clone();
    assert_eq!(
        ask(&ground, &["migrate"]).await.document(0),
        json!({"applied": [], "version": version})
    );
    ask(&ground, &["partner", "list"]).await.document(0);

    let db = ground.db().await;
    let alter = async |sql| db.batch_execute(sql).await.expect("another version");
    // Only the first is left, under another number.
    alter("DELETE FROM settled.refinery_schema_history WHERE version > 1").await;
    alter("UPDATE settled.refinery_schema_history SET version = 0").await;
    let (message, _) = worker(&ground).await.refusal(1);
    assert!(
        message.contains("version 0") && message.contains("settled migrate"),
        "{message}"
    );
    alter("UPDATE settled.refinery_schema_history SET version = 99").await;
    worker(&ground).await.refused(1, "version 99, newer than");
    let (message, hint) = ask(&ground, &["migrate"]).await.refusal(1);
    assert!(
        message.contains("newer") && hint.contains("newer program"),
        "{message} {hint}"
    );
}

#[tokio::test]
async fn topology_says_what_there_is_and_may_be_repeated() {
    let ground = Ground::new("topology").await;
    let told = ask(&ground, &["topology"]).await.document(0);
    let names = |key: &str| -> BTreeSet<String> {
        let names = told[key].as_array().into_iter().flatten();
        names.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    assert!(
        names("exchanges").is_superset(
            &["settlement.updates", "settlement.events", "settlement.dead"]
                .map(str::to_owned)
                .into()
        )
    );
    assert!(
        names("queues").is_superset(
            &["settlement.updates", "settlement.dead", "settlement.unreadable"]
                .map(str::to_owned)
                .into()
        )
    );
    assert_eq!(ask(&ground, &["topology"]).await.document(0), told);
    // Something else in its place is refused and not replaced.
    let path = format!("/api/queues/{}/settlement.dead", ground.name);
    assert_eq!(ground.services.manage("DELETE", &path, None).await.0, 204);
    let other = json!({"durable": true, "arguments": {"x-queue-type": "quorum"}});
    assert_eq!(ground.services.manage("PUT", &path, Some(other)).await.0, 201);
    let (message, hint) = ask(&ground, &["topology"]).await.refusal(1);
    assert!(
        message.contains("settlement.dead") && hint.contains("settled doctor"),
        "{message} {hint}"
    );
}
