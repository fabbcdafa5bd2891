//! The operator's page is true: its commands are typed in order, against the incident that it tells of, and every line of
//! every answer is compared. Only times may differ.
//!
//! `SETTLED_TEST_WRITE_PAGE=1` writes the answers into the page instead: look at what changed before you commit it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use serde_json::json;
use tokio::process::Command;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation, sha256},
    partner::Partner,
    support::COLLECTS,
    support::{PATIENCE, Place, settled, until},
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/dead-letters.md");

/// What a person types to end a program.
const INTERRUPT: &str = "^C";

/// A command of the page and what the page says it answers.
struct Typed {
    line: String,
    answer: Vec<String>,
}

/// The commands of a page's `console` blocks, in order.
fn commands(page: &str) -> Vec<Typed> {
    let mut typed: Vec<Typed> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        match (inside, line) {
            (false, "```console") => inside = true,
            (true, "```") => inside = false,
            (true, line) => match line.strip_prefix("$ ") {
                Some(command) => typed.push(Typed {
                    line: command.to_owned(),
                    answer: Vec::new(),
                }),
                None => typed
                    .last_mut()
                    .expect("a command comes first")
                    .answer
                    .push(line.to_owned()),
            },
            (false, _) => {}
        }
    }
    typed
}

/// Text with the digits of every time replaced: `2026-11-20T03:04:05.678Z` and the like have one length.
fn without_times(text: &str) -> String {
    const SHAPE: &str = "0000-00-00T00:00:00.000Z";
    let mut shaped = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_time = rest.get(..SHAPE.len()).is_some_and(|head| {
            let zeroed: String = head
                .chars()
                .map(|letter| if letter.is_ascii_digit() { '0' } else { letter })
                .collect();
            zeroed == SHAPE
        });
        let taken = if is_time { SHAPE.len() } else { first.len_utf8() };
        shaped.push_str(if is_time { SHAPE } else { &rest[..taken] });
        rest = &rest[taken..];
    }
    shaped
}

/// A partner whose every word is the same in every run, so that digests and ids are.
fn partner(enterprise: &str, number: u128) -> Partner {
    let seed = sha256(format!("the operator's page: {enterprise}").as_bytes());
    Partner {
        key: secp256k1::SecretKey::from_secret_bytes(seed).expect("a key"),
        client: Uuid::from_u128(0xc11e_0000_0000_4000_8000_0000_0000_0000 + number),
        connection: Uuid::from_u128(0xc0ec_0000_0000_4000_8000_0000_0000_0000 + number),
        ..Partner::new(enterprise)
    }
}

fn reservation(partner: &Partner, number: u128) -> Reservation {
    let id = Uuid::from_u128(0xa110_0000_0000_4000_8000_0000_0000_0000 + number);
    Reservation {
        id,
        client_external_id: format!("order-{id}"),
        ..partner.allocation("BTC", "25000000")
    }
}

fn word(partner: &Partner, reservation: &Reservation, number: u128) -> crate::kit::partner::Draft {
    partner
        .draft(reservation, "cleared")
        .set("nonce", format!("2026-11-20-{number:04}"))
}

/// The incident of the page: forty messages signed with a key that is not registered, three that lack a field, and two of
/// an enterprise that nobody knows.
async fn stage(place: &Place) {
    let (northwind, acme, contoso) = (partner("northwind", 1), partner("acme", 2), partner("contoso", 3));
    let mut messages: Vec<Message> = Vec::new();
    // The key that they rotated away from.
    let before = Partner {
        key: partner("northwind's old key", 1).key,
        ..northwind.clone()
    };
    place.register(&before).await;
    place.register(&acme).await;
    place.deposit(&northwind, "BTC", "1000000000").await;
    let reservations: Vec<Reservation> = (1..=40).map(|number| reservation(&northwind, number)).collect();
    place.reserve(&reservations).await;
    for (number, reserved) in (1..).zip(&reservations) {
        messages.push(word(&northwind, reserved, number).message(Expect::Any));
    }
    for number in 41..=43 {
        let draft = word(&acme, &reservation(&acme, number), number);
        let quantity = json!({"currency": "BTC", "quantity": 25_000_000});
        messages.push(draft.set("amount", quantity).message(Expect::Any));
    }
    for number in 44..=45 {
        messages.push(word(&contoso, &reservation(&contoso, number), number).message(Expect::Any));
    }
    // One after the other, so that they arrive in this order.
    for message in &messages {
        place.publish(std::slice::from_ref(message)).await;
    }
}

/// Types a command in a shell and answers what a terminal would show.
async fn answer_of(place: &Place, directory: &Path, db: &Client, typed: &Typed) -> Vec<String> {
    let binary = PathBuf::from(env!("CARGO_BIN_EXE_settled"));
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", binary.parent().expect("a directory").display());
    // As `settled()`, without the settings of this environment.
    let clean = settled();
    let mut shell = Command::new("sh");
    for (name, value) in clean.as_std().get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let interrupted = typed.answer.iter().any(|line| line == INTERRUPT);
    // What is interrupted is the program, not the shell around it.
    let begin = if interrupted { "exec 2>&1; exec" } else { "exec 2>&1;" };
    shell
        .args(["-c", &format!("{begin} {}", typed.line)])
        .env("PATH", path)
        .env("SETTLED_DATABASE_URL", &place.database_url)
        .env("SETTLED_BROKER_URL", &place.broker_url)
        .env("USER", "ada")
        .current_dir(directory)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let child = shell.spawn().expect("a shell");
    if interrupted {
        // Its canary of five, and the first message of the rest.
        until("six are judged", PATIENCE, async || {
            let sql = "SELECT count(*) FROM settled.run_items WHERE state = 'judged'";
            let judged: i64 = db.query_one(sql, &[]).await.expect("items").get(0);
            (judged == 6).then_some(())
        })
        .await;
        let id = child.id().expect("it runs").to_string();
        let status = std::process::Command::new("kill").args(["-INT", &id]).status();
        assert!(status.expect("kill").success());
    }
    let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
    let output = output.expect("it ends").expect("an exit");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_page_is_true() {
    let page = std::fs::read_to_string(PAGE).expect("the page");
    let place = Place::new("desk_page").await;
    let db = place.db().await;
    stage(&place).await;
    // One lane, so that messages keep their order.
    let worker = place
        .ready_worker(&[&COLLECTS[..], &[("SETTLED_WORKER__LANES", "1")]].concat())
        .await;
    // What was done before the page begins is written down too, in as many rows as reading took.
    db.batch_execute("ALTER TABLE settled.audit ALTER COLUMN id RESTART WITH 21")
        .await
        .expect("altered");
    until("everything is collected", PATIENCE, async || {
        let sql = "SELECT count(*) FROM settled.dead_letters";
        let count: i64 = db.query_one(sql, &[]).await.expect("rows").get(0);
        (count == 45).then_some(())
    })
    .await;
    let (_, metrics) = worker.get("/metrics").await.expect("an answer");
    for name in [
        "settled_dead_letters_open{reason=\"signature_mismatch\"}",
        "settled_dead_letters_oldest_seconds",
    ] {
        assert!(page.contains(name) && metrics.contains(name), "{name}: {metrics}");
    }
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(&place.name);
    let typed = commands(&page);
    assert!(typed.len() > 15, "the page shows commands");
    let key = partner("northwind", 1).public_key();
    assert!(page.contains(&key), "the partner's new key is {key}");
    let mut answers = Vec::new();
    for typed in &typed {
        answers.push(answer_of(&place, &directory, &db, typed).await);
    }
    if std::env::var_os("SETTLED_TEST_WRITE_PAGE").is_some() {
        write(&page, &typed, &answers);
    } else {
        for (typed, answer) in typed.iter().zip(&answers) {
            let said: Vec<String> = typed
                .answer
                .iter()
                .filter(|line| *line != INTERRUPT)
                .map(|line| without_times(line))
                .collect();
            let answer: Vec<String> = answer.iter().map(|line| without_times(line)).collect();
            let (said, answer) = match typed.line.starts_with("settled audit list") {
                true => (without_signers(&said), without_signers(&answer)),
                false => (said, answer),
            };
            assert_eq!(answer, said, "$ {}", typed.line);
        }
    }
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// The page with these answers.
fn write(before: &str, typed: &[Typed], answers: &[Vec<String>]) {
    let mut page = String::new();
    let mut told = typed.iter().zip(answers);
    let mut inside = false;
    for line in before.lines() {
        let is_said = inside && !line.starts_with("$ ") && line != "```";
        inside = match line {
            "```console" => true,
            "```" => false,
            _ => inside,
        };
        if is_said {
            continue;
        }
        page.push_str(&format!("{line}\n"));
        if inside && line.starts_with("$ ") {
            let (typed, answer) = told.next().expect("an answer");
            let mut lines: Vec<&str> = answer.iter().map(String::as_str).collect();
            if typed.answer.iter().any(|line| line == INTERRUPT) {
                // After the canary.
                lines.insert(1, INTERRUPT);
            }
            page.extend(lines.into_iter().map(|line| format!("{line}\n")));
        }
    }
    std::fs::write(PAGE, page).expect("the page");
}

/// Without the last column: who the database takes us for depends on where it runs.
fn without_signers(lines: &[String]) -> Vec<String> {
    let header = lines.first().map_or(0, |header| {
        header.split("database user").next().unwrap_or_default().chars().count()
    });
    lines.iter().map(|line| line.chars().take(header).collect()).collect()
}

#[test]
fn times_are_all_alike() {
    assert_eq!(
        without_times("a 2026-11-20T03:04:05.678Z é"),
        "a 0000-00-00T00:00:00.000Z é"
    );
    assert_eq!(without_times("2026-11-20T03:04:05Z"), "2026-11-20T03:04:05Z");
    assert_eq!(commands("```console\n$ a\nb\n$ c\n```\n$ d\n").len(), 2);
}
