//! Every argument of every command, at the ends of what its type can say and beyond: what is out of range is a usage error
//! with a sentence, and never our own fault. The commands are walked as clap has them, so a new argument is covered by
//! itself.

use std::ffi::OsString;

use clap::CommandFactory;
use settled::{cli::Cli, domain::calendar::CalendarTime};
use uuid::Uuid;

use crate::kit::{
    command::{Answer, add_key, add_partner, ask, ask_in, ledger},
    partner::new_key,
};

/// Times, durations, numbers and texts that some program has stumbled over.
const EVIL: &[&str] = &[
    "",
    "0",
    "-1",
    "1.5",
    "NaN",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "2147483648",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "115792089237316195423570985008687907853269984665640564039457584007913129639935",
    "0001-01-01T00:00:00Z",
    "0001-01-01T00:00:00+14:00",
    "0000-12-31T23:59:59Z",
    "9999-12-31T23:59:59Z",
    "9999-12-31T23:59:59.999999-12:00",
    "10000-01-01T00:00:00Z",
    "-009999-01-01T00:00:00Z",
    "2030-02-30T00:00:00Z",
    "infinity",
    "300000000h",
    "17520000h",
    "99999999999999999999h",
    "9223372036854775807ns",
    "-1h",
    "\u{feff}x",
    "\u{202e}x",
    "x\ny",
];

/// Those that go on for ever, or take minutes when their arguments are right. Their arguments are read all the same.
const LONG: [&str; 5] = ["worker", "console", "demo", "simulate", "collect"];

/// Values that let a command be asked for at all.
fn value_of(name: &str) -> String {
    match name {
        "client_id" | "connection_id" | "allocation" => Uuid::new_v4().to_string(),
        "id" => "3f2504e0-4f89-41d3-9a0c-0305e82c3301".to_owned(),
        "public_key" => hex::encode(new_key().public_key().serialize()),
        "enterprise_id" | "partner" => "acme".to_owned(),
        "currency" => "BTC".to_owned(),
        "since" | "until" | "discarded_before" => "1h".to_owned(),
        "routing_key" => "acme.allocation.update".to_owned(),
        "quantity" | "plan" | "run" | "limit" => "1".to_owned(),
        _ => "some text".to_owned(),
    }
}

/// Every command that does something, with its words.
fn leaves(command: &clap::Command, words: &[String], found: &mut Vec<(Vec<String>, clap::Command)>) {
    let mut below = command
        .get_subcommands()
        .filter(|below| below.get_name() != "help")
        .peekable();
    if below.peek().is_none() {
        found.push((words.to_vec(), command.clone()));
    }
    for sub in below {
        leaves(sub, &[words, &[sub.get_name().to_owned()]].concat(), found);
    }
}

/// An argument with a value, as it is typed: a flag, or what has its place.
fn typed(argument: &clap::Arg, value: &str) -> (bool, String) {
    match argument.get_long() {
        Some(long) => (true, format!("--{long}={value}")),
        None => (false, value.to_owned()),
    }
}

/// Every command with one evil argument and the rest of it right, by argument.
fn questions() -> Vec<Vec<Vec<String>>> {
    let mut commands = Vec::new();
    leaves(&Cli::command(), &[], &mut commands);
    assert!(commands.len() > 25, "{}", commands.len());
    let mut all = Vec::new();
    for (words, command) in &commands {
        let takes = |argument: &&clap::Arg| argument.get_action().takes_values();
        let arguments: Vec<&clap::Arg> = command.get_arguments().filter(takes).collect();
        for argument in &arguments {
            let others: Vec<(bool, String)> = arguments
                .iter()
                .filter(|other| other.get_id() != argument.get_id() && other.is_required_set())
                .map(|other| typed(other, &value_of(other.get_id().as_str())))
                .collect();
            let question = |evil: &&str| {
                let arguments = others.iter().cloned().chain([typed(argument, evil)]);
                let (flags, places): (Vec<_>, Vec<_>) = arguments.partition(|(is_flag, _)| *is_flag);
                let text = |(_, text)| text;
                let mut question = words.clone();
                question.extend(flags.into_iter().map(text));
                question.push("--".to_owned());
                question.extend(places.into_iter().map(text));
                question
            };
            all.push(EVIL.iter().map(question).collect());
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_argument_is_our_own_fault() {
    /// Of a text that may be anything, these many are tried on the database.
    const TRIED: usize = 6;
    let ground = ledger("arguments").await;
    add_partner(&ground, "acme").await;
    let mut asked = Vec::new();
    for of_one in questions() {
        // What is refused here is told as a usage error.
        let read = |question: &Vec<String>| {
            let words = ["settled".to_owned()].into_iter().chain(question.iter().cloned());
            Cli::read(words.map(OsString::from)).is_ok()
        };
        let is_long = |question: &Vec<String>| question.iter().any(|word| LONG.contains(&word.as_str()));
        let taken: Vec<_> = of_one
            .into_iter()
            .filter(|question| read(question) && !is_long(question))
            .collect();
        let step = taken.len().div_ceil(TRIED).max(1);
        asked.extend(taken.into_iter().step_by(step));
    }
    assert!(asked.len() > 100, "{}", asked.len());
    for some in asked.chunks(4) {
        let answers = some.iter().map(async |question| {
            let words: Vec<&str> = ["--json"]
                .into_iter()
                .chain(question.iter().map(String::as_str))
                .collect();
            Answer::of(&ground.run(&words).await)
        });
        for (question, answer) in some.iter().zip(futures_util::future::join_all(answers).await) {
            assert!(matches!(answer.code, Some(0..=3)), "{question:?}: {}", answer.all());
        }
    }
}

/// Both ends of the calendar are kept as they were said; beyond them it is said what may be.
#[tokio::test]
async fn the_ends_of_the_calendar() {
    let ground = ledger("calendar").await;
    add_partner(&ground, "acme").await;
    let key = hex::encode(new_key().public_key().serialize());
    let window = [
        "--valid-from",
        "0001-01-01T00:00:00Z",
        "--valid-until",
        "9999-12-31T23:59:59Z",
    ];
    let added = add_key(&ground, "acme", &key, &window).await.document(0);
    assert_eq!(
        (
            added["validFrom"].as_str(),
            added["validUntil"].as_str(),
            added["valid"].as_bool()
        ),
        (
            Some("0001-01-01T00:00:00.000Z"),
            Some("9999-12-31T23:59:59.000Z"),
            Some(true)
        )
    );
    assert_eq!(
        add_key(&ground, "acme", &key, &window).await.document(0)["result"],
        "exists"
    );
    let listed = ask(&ground, &["key", "list"]).await.document(0);
    assert_eq!(listed[0]["validUntil"], added["validUntil"]);
    for wrong in [
        "10000-01-01T00:00:00Z",
        "+010000-01-01T00:00:00Z",
        "0000-01-01T00:00:00Z",
    ] {
        add_key(&ground, "acme", &key, &["--valid-until", wrong])
            .await
            .refusal(2);
    }
    // What somebody wrote by hand is shown, and ends nothing.
    let db = ground.db().await;
    db.batch_execute("UPDATE settled.partner_keys SET valid_from = '-infinity', valid_until = 'infinity'")
        .await
        .expect("changed");
    let listed = ask(&ground, &["key", "list"]).await.document(0);
    assert_eq!(listed[0]["validUntil"], "9999-12-31T23:59:59.999Z");
    for (since, until) in [
        ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"),
        ("17520000h", "9999-12-31T23:59:59-12:00"),
    ] {
        let found = ask(&ground, &["reconcile", "--since", since, "--until", until])
            .await
            .document(0);
        assert_eq!(found["ok"], true, "{found}");
        // Its end is what was asked for, wherever it is shown and kept.
        let end = CalendarTime::parse(until).expect("a time").to_string();
        assert!(end.starts_with("9999-12-31"), "{end}");
        assert_eq!(found["until"], *end, "{found}");
        let shown = ground.run(&["reconcile", "--since", since, "--until", until]).await;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains(&format!("until {end}")), "{shown}");
        let export = ["dead-letters", "export", "--until", until, "--operator", "ann"];
        ask(&ground, &export).await.lines(0);
        let acts = ask(&ground, &["audit", "list", "--act", "export"]).await.lines(0);
        assert_eq!(acts[0]["filters"]["until"], *end, "{acts:?}");
        for list in [&["audit", "list"][..], &["dead-letters", "list"]] {
            let words = [list, &["--since", since, "--until", until]].concat();
            ask(&ground, &words).await.lines(0);
        }
    }
    for since in ["300000000h", "99999999999999999999h"] {
        ask(&ground, &["reconcile", "--since", since])
            .await
            .refused(2, "2,000 years");
    }
    let purge = ["dead-letters", "purge", "--reason", "x", "--discarded-before"];
    ask(&ground, &[&purge[..], &["9999-12-31T23:59:59Z"]].concat())
        .await
        .refused(2, "in the future");
    ask(&ground, &[&purge[..], &["0001-01-01T00:00:00Z"]].concat())
        .await
        .document(0);
}

/// What was probably meant is said, for commands, flags and settings.
#[tokio::test]
async fn a_slip_is_answered_with_what_was_meant() {
    let ground = ledger("slips").await;
    for (words, meant) in [
        (&["parner", "list"][..], "'partner'"),
        (&["partner", "lst"], "'list'"),
        (&["dead-leters", "list"], "'dead-letters'"),
        (&["partner", "list", "--jsn"], "'--json'"),
        (&["deposit", "--curency", "BTC"], "'--currency'"),
        (&["partner", "list", "--set", "worker.lane=2"], "`worker.lanes`"),
    ] {
        let answer = Answer::of(&ground.run(words).await);
        assert!(
            answer.code == Some(2) && answer.err.contains(meant),
            "{words:?}: {}",
            answer.all()
        );
        let words = [&["--json"], words].concat();
        let (_, hint) = ask(&ground, &words).await.refusal(2);
        assert!(hint.contains(meant), "{words:?}: {hint}");
    }
    for (name, meant) in [
        ("SETTLED_DATABSE_URL", "SETTLED_DATABASE_URL"),
        ("SETTLED_WORKER_LANES", "SETTLED_WORKER__LANES"),
        ("SETTLED_WORKER__LANE", "SETTLED_WORKER__LANES"),
    ] {
        let answer = ask_in(&[(name, "1")], &["partner", "list"]).await;
        let (_, hint) = answer.refusal(2);
        assert!(hint.contains(meant), "{name}: {hint}");
    }
}
