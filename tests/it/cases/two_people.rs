//! What is large takes two people, who are not one by any name.

use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{Config, TestRunner},
};
use serde_json::Value;
use settled::domain::person::{Person, known_as};

use crate::kit::{
    command::{Answer, ask_in},
    console::Console,
    partner::Partner,
    support::{COLLECTS, Ground, PATIENCE, Place, connect, until},
};

/// What operators are members of.
pub(super) const OPERATOR: &str = "settled_operator, settled_reader, settled_auditor";

/// Somebody with a login of the database, and what they may type.
pub(super) struct Login {
    pub(super) url: String,
}

impl Login {
    async fn new(place: &Place, name: &str) -> Self {
        let owner = crate::kit::support::userinfo(&place.database_url).0;
        Self::with_roles(place, name, owner).await
    }

    pub(super) async fn with_roles(place: &Place, name: &str, roles: &str) -> Self {
        let role = format!("{}_{name}", place.name);
        let db = place.db().await;
        db.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'p' IN ROLE {roles}"))
            .await
            .expect("a login");
        Self {
            url: place.database_url_of(&role),
        }
    }

    pub(super) async fn says(&self, place: &Place, above: (&str, &str), words: &[&str], operator: &str) -> Answer {
        let mut command = place.command(&[&["dead-letters"], words, &["--json", "--operator", operator]].concat());
        command.env("SETTLED_DATABASE_URL", &self.url).env(above.0, above.1);
        Answer::of(&command.output().await.expect("settled runs"))
    }

    pub(super) async fn forget(self, place: &Place) {
        let role = crate::kit::support::userinfo(&self.url).0;
        let db = place.db().await;
        db.batch_execute(&format!("DROP ROLE {role}")).await.expect("no login");
    }
}

pub(super) async fn stranded(place: &Place, count: usize) -> Partner {
    let partner = Partner::new("acme");
    place.strand(&partner, "A partner", "1000000", (count, "7")).await;
    partner
}

/// A purge has no plan: two people name the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_purge_takes_two_people() {
    let place = Place::new("two_purge").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    let db = place.db().await;
    let letters = async || crate::kit::support::count(&db, "dead_letters").await;
    until("they are collected", PATIENCE, async || {
        (letters().await == 6).then_some(())
    })
    .await;
    let enterprise = partner.enterprise.as_str();
    place
        .json(&[
            "dead-letters",
            "discard",
            "--partner",
            enterprise,
            "--reason",
            "why",
            "--yes",
        ])
        .await;
    place
        .tamper("UPDATE settled.dead_letters SET discarded_at = now() - interval '1 day'")
        .await;
    let (ann, bob) = (Login::new(&place, "ann").await, Login::new(&place, "bob").await);
    let many = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5");
    let sql = "SELECT to_char(now() AT TIME ZONE 'UTC' - interval '1 hour', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')";
    let time: String = db.query_one(sql, &[]).await.expect("a time").get(0);
    let purge = ["purge", "--discarded-before", &time, "--reason", "why", "--yes"];
    let proposed = ann.says(&place, many, &purge, "ann").await.document(3);
    assert_eq!(
        (&proposed["act"], &proposed["purged"]),
        (&"purge propose".into(), &0.into())
    );
    for (login, name) in [(&ann, "ann"), (&ann, "bob"), (&bob, "ann")] {
        login
            .says(&place, many, &purge, name)
            .await
            .refused(1, "takes two people");
    }
    // Another time is another purge.
    let other = ["purge", "--discarded-before", "2h", "--reason", "why", "--yes"];
    assert_eq!(bob.says(&place, many, &other, "bob").await.document(3)["purged"], 0);
    assert_eq!(letters().await, 6);
    let purged = bob.says(&place, many, &purge, "bob").await.document(0);
    assert_eq!((&purged["act"], &purged["purged"]), (&"purge".into(), &6.into()));
    // What is not many takes one.
    assert_eq!(ann.says(&place, many, &purge, "ann").await.document(0)["purged"], 0);
    worker.terminate().await;
    ann.forget(&place).await;
    bob.forget(&place).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_act_takes_two_people() {
    let place = Place::new("two_people").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    let db = place.db().await;
    place.collected(6).await;
    place.add_key(&partner).await;
    let (ann, bob) = (Login::new(&place, "ann").await, Login::new(&place, "bob").await);
    let many = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5");
    let dear = ("SETTLED_DEAD_LETTERS__APPROVE_AMOUNTS", "BTC=41");
    let cheap = ("SETTLED_DEAD_LETTERS__APPROVE_AMOUNTS", "BTC=42,ETH=0");

    // One is enough where nothing is large.
    let planned = ann
        .says(&place, cheap, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);
    assert_eq!((&planned["twoPeople"], &planned["messages"]), (&Value::Null, &6.into()));
    // By messages, and by money.
    for large in [many, dear] {
        let shown = place
            .command(&["dead-letters", "plan", "show", "1", "--json"])
            .env(large.0, large.1)
            .output();
        let shown = Answer::of(&shown.await.expect("settled runs")).document(0);
        assert!(shown["twoPeople"].as_str().is_some(), "{shown}");
        let (message, hint) = ann
            .says(&place, large, &["replay", "1", "--reason", "why"], "ann")
            .await
            .refusal(1);
        assert!(
            message.contains("takes two people") && hint.contains("plan approve 1"),
            "{message} {hint}"
        );
    }
    // What is selected by filters can not be approved: it is planned first.
    let by_filter = ["discard", "--partner", "acme", "--reason", "why"];
    let (message, hint) = ann.says(&place, many, &by_filter, "ann").await.refusal(1);
    assert!(
        message.contains("a plan") && hint.contains("dead-letters plan"),
        "{message}"
    );

    // Neither another name nor another login alone makes two of one.
    let approve = ["plan", "approve", "1", "--reason", "I looked"];
    let ann_login = format!("{}_ann", place.name);
    for (login, operator, shared) in [
        (&ann, "bob", ann_login.as_str()),
        (&bob, "ann", "ann"),
        (&bob, "ANN", "ANN"),
        (&bob, ann_login.as_str(), ann_login.as_str()),
    ] {
        let (message, _) = login.says(&place, many, &approve, operator).await.refusal(1);
        assert!(
            message.contains(&format!("{shared} can not be both")),
            "{operator}: {message}"
        );
    }
    // What was planned to be refused may settle all the same: of a replay of everything all that it could move counts.
    place.json(&["partner", "suspend", "--enterprise-id", "acme"]).await;
    let planned = ann
        .says(&place, dear, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);
    assert_eq!(planned["wouldMove"], serde_json::json!([]), "{planned}");
    place.json(&["partner", "resume", "--enterprise-id", "acme"]).await;
    let number = planned["plan"].to_string();
    let everything = ["replay", number.as_str(), "--all-verdicts", "--reason", "why"];
    let (message, _) = ann.says(&place, dear, &everything, "ann").await.refusal(1);
    assert!(message.contains("42 BTC is more than"), "{message}");
    // For another act it does not count, nor once it is over.
    let for_discard = ["plan", "approve", "1", "--for", "discard", "--reason", "I looked"];
    let approved = bob.says(&place, many, &for_discard, "bob").await.document(0);
    assert_eq!(
        (&approved["act"], &approved["operator"]),
        (&"discard".into(), &"bob".into())
    );
    let replay = ["replay", "1", "--reason", "the key is there"];
    let (message, _) = ann.says(&place, many, &replay, "ann").await.refusal(1);
    assert!(message.contains("nobody else has approved"), "{message}");
    let short = ("SETTLED_DEAD_LETTERS__APPROVAL_LASTS", "1s");
    bob.says(&place, short, &approve, "bob").await.document(0);
    until("it is over", PATIENCE, async || {
        let sql = "SELECT bool_and(expires_at < clock_timestamp()) FROM settled.approvals WHERE act = 'replay'";
        db.query_one(sql, &[])
            .await
            .expect("approvals")
            .get::<_, bool>(0)
            .then_some(())
    })
    .await;
    let (message, _) = ann.says(&place, many, &replay, "ann").await.refusal(1);
    assert!(message.contains("the approval was over at"), "{message}");
    // Who approved can not act; another, even a third one, can.
    let approved = bob.says(&place, many, &approve, "bob").await.document(0);
    assert_eq!(
        approved["wouldMove"],
        serde_json::json!([{"currency": "BTC", "quantity": "42"}])
    );
    let (message, _) = bob.says(&place, many, &replay, "carl").await.refusal(1);
    assert!(message.contains("can not be both"), "{message}");
    let run = ann.says(&place, many, &replay, "ann").await.document(0);
    assert_eq!(run["asPlanned"], true, "{run}");

    let acts = Answer::of(&place.run(&["audit", "list", "--act", "plan approve", "--json"]).await).lines(0);
    assert_eq!(acts.len(), 3);
    let bob_login = format!("{}_bob", place.name);
    for act in acts {
        assert_eq!(
            (&act["operator"], &act["sessionUser"]),
            (&"bob".into(), &bob_login.as_str().into())
        );
        assert_eq!(act["filters"]["plan"], 1);
    }
    // What was approved stays written.
    for change in [
        "UPDATE settled.approvals SET why = 'x'",
        "DELETE FROM settled.approvals",
    ] {
        assert!(db.execute(change, &[]).await.is_err(), "{change}");
    }
    ann.forget(&place).await;
    bob.forget(&place).await;
    place.settle_up(worker).await;
}

/// What the database keeps of the limits holds for whoever comes by whatever program, with settings or SQL of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_goes_around_the_second_person_with_settings_or_sql_of_their_own() {
    let place = Place::new("two_kept").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    place.collected(6).await;
    place.add_key(&partner).await;
    let keep = async |above: &str, amounts: &str| {
        let url = place.database_url.as_str();
        let environment = [
            ("SETTLED_DATABASE_URL", url),
            ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", above),
            ("SETTLED_DEAD_LETTERS__APPROVE_AMOUNTS", amounts),
        ];
        ask_in(&environment, &["roles", "--apply", "--two-people"])
            .await
            .document(0)
    };
    let kept = keep("5", "").await;
    let last = kept["statements"]
        .as_array()
        .and_then(|all| all.last())
        .expect("statements");
    assert!(
        last.as_str().is_some_and(|sql| sql.contains("approval_limits")),
        "{last}"
    );
    let (ann, bob) = (
        Login::with_roles(&place, "ann", OPERATOR).await,
        Login::with_roles(&place, "bob", OPERATOR).await,
    );
    let none = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "0");
    let planned = ann
        .says(&place, none, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);
    let why = planned["twoPeople"].as_str().expect("it takes two");
    assert!(why.contains("the database's own limit (5)"), "{why}");
    let replay = ["replay", "1", "--reason", "the key is there"];
    let (message, _) = ann.says(&place, none, &replay, "ann").await.refusal(1);
    assert!(message.contains("the database's own limit (5)"), "{message}");
    // A setting may want more, and never less.
    let one = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "1");
    let (message, _) = ann.says(&place, one, &replay, "ann").await.refusal(1);
    assert!(message.contains("dead_letters.approve_above (1)"), "{message}");

    let sql = connect(&ann.url).await;
    let refused = async |words: &str, says: &str| {
        let error = sql.batch_execute(words).await.expect_err(words);
        let error = error.as_db_error().expect("the server's word").to_string();
        assert!(error.contains(says), "{words}: {error}");
    };
    let run = |plan: i64| {
        format!(
            "INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
             VALUES ({plan}, 'running', 'ann', 'x', true, now(), now());
             INSERT INTO settled.run_items (run_id, position, dead_letter_id, planned)
             SELECT (SELECT max(id) FROM settled.runs), position, dead_letter_id, verdict
             FROM settled.plan_items WHERE plan_id = {plan}"
        )
    };
    refused(&run(1), "6 messages are more than 5; nobody else has approved it").await;
    // Whoever approves it for somebody else's name is still the login that they are.
    sql.batch_execute(
        "INSERT INTO settled.approvals (plan_id, act, at, expires_at, operator, why, voucher, session_name)
         VALUES (1, 'replay', now(), now() + interval '1 hour', 'bob', 'x', 'bob', 'bob')",
    )
    .await
    .expect("it counts for nothing");
    refused(&run(1), "nobody else has approved it").await;
    let (message, _) = ann.says(&place, none, &replay, "ann").await.refusal(1);
    assert!(message.contains("_ann can not be both"), "{message}");
    refused(
        "INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
         VALUES (1, 'running', 'ann', 'x', true, now(), now());
         UPDATE settled.dead_letters SET state = 'due', run_id = (SELECT max(id) FROM settled.runs)",
        "is in no run that replays it",
    )
    .await;
    for change in [
        "UPDATE settled.approval_limits SET messages = 0",
        "DELETE FROM settled.approval_limits",
        "INSERT INTO settled.approval_limits (messages, amounts) VALUES (0, '{}')",
        "SELECT nextval('settled.plans_number')",
    ] {
        refused(change, "permission denied").await;
    }

    // What bob approves is what there is: a plan gets no other messages, and no other plan gets its number.
    let approve = ["plan", "approve", "1", "--reason", "I looked"];
    bob.says(&place, none, &approve, "bob").await.document(0);
    refused(
        "INSERT INTO settled.plan_items (plan_id, position, dead_letter_id, verdict)
         VALUES (1, 99, gen_random_uuid(), 'duplicate')",
        "keeps the messages that it was made with",
    )
    .await;
    for change in [
        "UPDATE settled.plans SET id = DEFAULT",
        "UPDATE settled.plans SET id = 7",
    ] {
        refused(change, "UPDATE on settled.plans is refused").await;
    }
    refused(
        "INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
         VALUES (1, 'running', 'ann', 'x', true, now(), now());
         INSERT INTO settled.run_items (run_id, position, dead_letter_id, planned)
         VALUES ((SELECT max(id) FROM settled.runs), 1, gen_random_uuid(), 'settled')",
        "takes a message that plan 1 has not",
    )
    .await;
    sql.batch_execute(
        "BEGIN;
         DELETE FROM settled.plans WHERE id = 1;
         INSERT INTO settled.plans (id, at, operator, filters, messages) VALUES (1, now(), 'ann', '{}', 6)",
    )
    .await
    .expect("a plan");
    let number = "SELECT array_agg(id) = ARRAY[2::bigint] FROM settled.plans";
    assert!(
        sql.query_one(number, &[]).await.expect("plans").get::<_, bool>(0),
        "it is another one"
    );
    sql.batch_execute("ROLLBACK").await.expect("as it was");

    // What a plan says that it moves is its maker's word; what its messages move is not.
    keep("100", "BTC=41").await;
    sql.batch_execute(
        "BEGIN;
         INSERT INTO settled.plans (at, operator, filters, messages) VALUES (now(), 'ann', '{}', 6);
         INSERT INTO settled.plan_items (plan_id, position, dead_letter_id, verdict)
         SELECT (SELECT max(id) FROM settled.plans), row_number() OVER (), id, 'duplicate' FROM settled.dead_letters;
         COMMIT",
    )
    .await
    .expect("a plan");
    let plan: i64 = sql
        .query_one("SELECT max(id) FROM settled.plans", &[])
        .await
        .expect("a plan")
        .get(0);
    refused(&run(plan), "42 BTC are more than 41; nobody else has approved it").await;
    keep("100", "BTC=42").await;
    sql.batch_execute(&format!("BEGIN; {}; ROLLBACK", run(plan)))
        .await
        .expect("it is not more");

    keep("5", "BTC=41").await;
    let run = ann.says(&place, none, &replay, "ann").await.document(0);
    assert_eq!(run["asPlanned"], true, "{run}");
    drop(sql);
    ann.forget(&place).await;
    bob.forget(&place).await;
    place.settle_up(worker).await;
}

/// A console is believed who is in front of it by its login of the database, and not because somebody started it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_vouched_for_counts_from_a_console_s_own_login_alone() {
    let place = Place::new("two_vouch").await;
    let worker = place.ready_worker(&COLLECTS).await;
    let partner = stranded(&place, 6).await;
    place.collected(6).await;
    place.add_key(&partner).await;
    place.json(&["roles", "--apply"]).await;
    let (ann, desk) = (
        Login::with_roles(&place, "ann", OPERATOR).await,
        Login::with_roles(&place, "desk", &format!("{OPERATOR}, settled_console")).await,
    );
    let many = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5");
    let why = ("why", "I looked");
    let at = async |login: &Login| {
        Console::behind_proxy(&place, &[many, ("SETTLED_DATABASE_URL", login.url.as_str())]).await
    };

    // Ann's own, which says that bob is in front of it.
    let own = at(&ann).await;
    let planned = own
        .act(&own.visitor("ann").await, "/plans", &[("state", "open"), ("seen", "6")])
        .await;
    assert_eq!(planned.header("location"), Some("/plans/1"), "{planned:?}");
    let bob = own.visitor("bob").await;
    let approved = own
        .act(
            &bob,
            "/plans/1/approve",
            &[why, ("for", "replay"), ("seen_replay", "6")],
        )
        .await;
    assert!(
        approved.text.contains("_ann can not be both of two people"),
        "{approved:?}"
    );
    assert!(approved.text.contains("GRANT settled_console TO"), "{approved:?}");
    own.stop().await;

    let console = at(&desk).await;
    let (at_ann, at_bob) = (console.visitor("ann").await, console.visitor("bob").await);
    let planned = console
        .act(&at_ann, "/plans", &[("state", "open"), ("seen", "6")])
        .await;
    assert_eq!(planned.header("location"), Some("/plans/2"), "{planned:?}");
    // Ann has a login as well, and types whatever name she likes.
    let approve = ["plan", "approve", "2", "--reason", "I looked"];
    let replay = ["replay", "2", "--reason", "the key is there"];
    for words in [&approve[..], &replay] {
        let (message, hint) = ann.says(&place, many, words, "carl").await.refusal(1);
        let says = if words == approve {
            "nobody knows that a person"
        } else {
            "nobody else has approved"
        };
        assert!(message.contains(says), "{message}");
        assert!(hint.contains("somebody else there"), "{hint}");
    }
    let approved = console
        .act(
            &at_bob,
            "/plans/2/approve",
            &[why, ("for", "replay"), ("seen_replay", "6")],
        )
        .await;
    assert_eq!(approved.status, 200, "{approved:?}");
    let (message, _) = ann.says(&place, many, &replay, "carl").await.refusal(1);
    assert!(message.contains("nobody knows that a person"), "{message}");
    let begun = console.act(&at_ann, "/plans/2/replay", &[why, ("seen", "6")]).await;
    assert_eq!(begun.header("location"), Some("/runs/1"), "{begun:?}");
    let row = "SELECT voucher, session_name LIKE '%_desk' FROM settled.runs";
    let row = place.db().await.query_one(row, &[]).await.expect("a run");
    assert_eq!((row.get::<_, &str>(0), row.get::<_, bool>(1)), ("ann", true));
    until("it is over", PATIENCE, async || {
        let page = console.get(&at_ann, "/runs/1").await;
        page.text.contains("done").then_some(())
    })
    .await;
    console.stop().await;
    ann.forget(&place).await;
    desk.forget(&place).await;
    place.settle_up(worker).await;
}

/// What the database's second line calls one person the program does, and the other way: each letter by itself, and persons drawn
/// of letters on which locales, versions of Unicode and ways to trim differ.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_one_by_one_rule_in_the_program_and_in_the_database() {
    let ground = Ground::new("names").await;
    ground.copy_template().await;
    let db = ground.db().await;
    let each = "SELECT n, settled.known_as('a' || chr(n) || 'b'), settled.known_as(chr(n) || 'a' || chr(n))
                FROM generate_series(1, 131071) AS n
                WHERE n NOT BETWEEN 55296 AND 57343";
    let mut differing = Vec::new();
    for row in db.query(each, &[]).await.expect("letters") {
        let number: i32 = row.get(0);
        let letter = char::from_u32(number.unsigned_abs()).expect("a letter");
        let (within, around): (&str, &str) = (row.get(1), row.get(2));
        if known_as(&format!("a{letter}b")) != within || known_as(&format!("{letter}a{letter}")) != around {
            differing.push(letter);
        }
    }
    assert_eq!(differing, Vec::<char>::new());

    let letters = [
        'a', 'A', 'é', 'É', 'Σ', 'ς', 'σ', 'İ', 'i', 'ß', 'ẞ', 'Ⴀ', 'ⴀ', ' ', '\t', '\u{2003}', '\u{200b}', '王',
    ];
    let name = proptest::collection::vec(proptest::sample::select(letters.to_vec()), 0..3)
        .prop_map(|letters| letters.into_iter().collect::<String>());
    let maybe = proptest::option::of(name.clone());
    let person = (name, maybe.clone(), maybe).prop_map(|(operator, voucher, session)| Person {
        operator,
        voucher,
        session,
    });
    let mut runner = TestRunner::new(Config::default());
    let drawn = (0..4_000).map(|_| (&person, &person).new_tree(&mut runner).expect("two persons").current());
    let (ones, others): (Vec<Person>, Vec<Person>) = drawn.unzip();
    let operators = |all: &[Person]| all.iter().map(|one| one.operator.clone()).collect::<Vec<_>>();
    let vouchers = |all: &[Person]| all.iter().map(|one| one.voucher.clone()).collect::<Vec<_>>();
    let sessions = |all: &[Person]| all.iter().map(|one| one.session.clone()).collect::<Vec<_>>();
    let said = "SELECT settled.may_be_one(p.a, p.b, p.c, p.d, p.e, p.f)
                FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[])
                    WITH ORDINALITY AS p (a, b, c, d, e, f, place)
                ORDER BY p.place";
    let said = db
        .query(
            said,
            &[
                &operators(&ones),
                &vouchers(&ones),
                &sessions(&ones),
                &operators(&others),
                &vouchers(&others),
                &sessions(&others),
            ],
        )
        .await
        .expect("answers");
    let mut found = [0, 0];
    for ((one, other), row) in ones.iter().zip(&others).zip(&said) {
        let are_one = row.get::<_, bool>(0);
        assert_eq!(one.one_with(other).is_some(), are_one, "{one:?} and {other:?}");
        found[usize::from(are_one)] += 1;
    }
    assert!(
        found.iter().all(|count| *count > 100),
        "both kinds are drawn: {found:?}"
    );
}
