//! What keeps us from a dependency is called by its name: a refused login, a database that is not there, one that is
//! read-only or full are not silence. And nobody's words about a URL repeat a part of it.

use serde_json::Value;

use crate::kit::{
    command::{Answer, ask_in, ledger, run_in},
    support::{Ground, PATIENCE, Place, Worker, until, userinfo, with_path},
};

/// What a worker says of itself, once it says something, and all of its log.
async fn reasons(worker: &Worker, piece: &str) -> String {
    until(piece, PATIENCE, async || {
        let (_, body) = worker.get("/readyz").await?;
        let ready: Value = serde_json::from_str(&body).ok()?;
        let reasons = ready["reasons"].to_string();
        (reasons.contains(piece) && worker.said().contains("trying again")).then_some(reasons)
    })
    .await
}

/// A role that may log in, and the URL with it.
async fn role(ground: &Ground, options: &str) -> (String, String) {
    let name = format!("{}_role", ground.name);
    let db = ground.db().await;
    db.batch_execute(&format!("CREATE ROLE {name} LOGIN PASSWORD 'p' {options}"))
        .await
        .expect("a role");
    let url = ground.database_url_of(&name);
    (name, url)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_names_what_keeps_it_from_the_database() {
    let ground = ledger("causes").await;
    let (user, password) = userinfo(&ground.database_url);
    let wrong = ground.database_url.replace(password, "wrong-secret");
    let nowhere = with_path(&ground.database_url, "no_such_name_of_a_database");
    for (url, sentence, hint) in [
        (&wrong, "refuses our login", "user and password"),
        (&nowhere, "no database of that name", "create it"),
    ] {
        let answer = ask_in(&[("SETTLED_DATABASE_URL", url)], &["partner", "list"]).await;
        let (message, advice) = answer.refusal(69);
        assert!(message.contains(sentence) && advice.contains(hint), "{}", answer.all());
        for piece in [user, "wrong-secret", "no_such_name", "is away", "not answer"] {
            assert!(!message.contains(piece), "{piece}: {message}");
        }
    }
    // No room for another connection of this role.
    let (name, url) = role(&ground, "CONNECTION LIMIT 0").await;
    let answer = ask_in(&[("SETTLED_DATABASE_URL", &url)], &["partner", "list"]).await;
    answer.refused(69, "takes no more connections");
    // Read-only, as after a failover.
    let db = ground.db().await;
    let change = format!(
        "ALTER ROLE {name} SUPERUSER CONNECTION LIMIT -1; ALTER ROLE {name} SET default_transaction_read_only = on"
    );
    db.batch_execute(&change).await.expect("changed");
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", "n"];
    let answer = ask_in(&[("SETTLED_DATABASE_URL", &url)], &add).await;
    let (message, hint) = answer.refusal(69);
    assert!(
        message.contains("is read-only") && hint.contains("primary"),
        "{}",
        answer.all()
    );
    db.batch_execute(&format!("DROP ROLE {name}")).await.expect("it goes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_names_what_it_waits_for() {
    let place = Place::new("worker_causes").await;
    let (_, password) = userinfo(&place.database_url);
    let wrong = place.database_url.replace(password, "wrong-secret");
    let nowhere = with_path(&place.database_url, "no_such_name_of_a_database");
    let vhost = with_path(&place.broker_url, "no_such_vhost_at_all");
    let login = place.broker_url.replace(userinfo(&place.broker_url).1, "wrong-secret");
    for (variable, url, piece) in [
        ("SETTLED_DATABASE_URL", &wrong, "the database refuses our login"),
        (
            "SETTLED_DATABASE_URL",
            &nowhere,
            "the server has no database of that name",
        ),
        ("SETTLED_BROKER_URL", &vhost, "the broker has no such virtual host"),
        ("SETTLED_BROKER_URL", &login, "the broker refuses our login"),
    ] {
        let worker = place.worker(&[(variable, url.as_str()), ("SETTLED_RETRY__MAX", "200ms")]);
        let told = reasons(&worker, piece).await;
        let log = worker.said();
        for lie in ["does not answer", "wrong-secret", "no_such_"] {
            assert!(!told.contains(lie) && !log.contains(lie), "{lie}: {told}\n{log}");
        }
        worker.kill().await;
    }
    // One that is really not there is still called so.
    let nobody = format!("postgres://u:p@{}/x", crate::kit::command::NOWHERE);
    let worker = place.worker(&[
        ("SETTLED_DATABASE_URL", nobody.as_str()),
        ("SETTLED_RETRY__MAX", "200ms"),
    ]);
    reasons(&worker, "the database does not answer").await;
    worker.kill().await;
}

/// Variables, and the words of a command.
type Asked<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);

/// Of the settings and of the command line, wherever a URL may be typed by mistake, and written wrong.
#[tokio::test]
async fn no_complaint_repeats_a_piece_of_a_url() {
    const SECRET: &str = "hunter2";
    for url in [
        format!("postgres://u:{SECRET}@h/d?sslmode={SECRET}"),
        format!("postgres://u:a?sslmode={SECRET}@h/d"),
        format!("postgres://u:{SECRET}/{SECRET}@h/d?x={SECRET}"),
        format!("host=h password={SECRET} sslmode={SECRET}"),
        format!("host=h password='a {SECRET}"),
        format!("amqp://u:{SECRET}@example.invalid/{SECRET}"),
        format!("amqp://u:{SECRET}/x@h:{SECRET}"),
        format!("{SECRET}@h"),
    ] {
        let asked: &[Asked<'_>] = &[
            (&[("SETTLED_DATABASE_URL", &url)], &["partner", "list"]),
            (&[("SETTLED_BROKER_URL", &url)], &["topology"]),
            (
                &[("SETTLED_DATABASE_URL", &url), ("SETTLED_BROKER_URL", &url)],
                &["doctor"],
            ),
            (&[("SETTLED_DATABASE_URL_FILE", &url)], &["partner", "list"]),
            (&[("SETTLED_WORKER__LANES", &url)], &["partner", "list"]),
            (&[], &["partner", "list", "--config", &url]),
            (&[], &["partner", "list", "--set", &url]),
            (&[], &["partner", "list", &url]),
            (&[], &["partner", "suspend", "--enterprise-id", &url]),
            (&[], &["deposit", "--quantity", &url]),
        ];
        for (variables, words) in asked {
            for json in [&[][..], &["--json"]] {
                let answer = Answer::of(&run_in(variables, &[*words, json].concat()).await);
                assert_ne!(answer.code, Some(0), "{words:?}");
                assert!(
                    !answer.all().contains("unter2"),
                    "{variables:?} {words:?}: {}",
                    answer.all()
                );
            }
        }
    }
}

/// What others wrote, as a person sees it and as a program gets it.
#[tokio::test]
async fn what_a_terminal_is_shown() {
    const NAME: &str = "a\u{202e}b\u{200b}c\u{61c}d\u{2028}e\u{feff}f\u{e0041}g\u{9b}31m\u{7f}é😀";
    let hidden = |letter: char| letter != '\n' && letter != '\r' && NAME.contains(letter) && !letter.is_alphanumeric();
    let ground = ledger("terminal").await;
    let add = ["partner", "add", "--enterprise-id", "acme", "--name", NAME];
    // Piped: people's tables are escaped all the same, JSON is as it is.
    assert!(ground.run(&add).await.status.success());
    let table = String::from_utf8(ground.run(&["partner", "list"]).await.stdout).expect("UTF-8");
    assert!(table.contains("\\u{202e}") && table.contains("é😀"), "{table}");
    assert!(
        !table.chars().any(|letter| hidden(letter) && letter != '😀'),
        "{table:?}"
    );
    let piped = ask_in(&[("SETTLED_DATABASE_URL", &ground.database_url)], &["partner", "list"]).await;
    assert!(
        piped.out.contains('\u{202e}') && piped.out.contains('\u{e0041}'),
        "{:?}",
        piped.out
    );
    // A complaint names what is stored.
    let other = ["partner", "add", "--enterprise-id", "acme", "--name", "x"];
    let complaint = String::from_utf8(ground.run(&other).await.stderr).expect("UTF-8");
    assert!(
        !complaint.chars().any(|letter| hidden(letter) && letter != '😀'),
        "{complaint:?}"
    );
    // On a terminal JSON is the same document, written so that nothing of it steers.
    let line = format!("{} --json partner list", env!("CARGO_BIN_EXE_settled"));
    let mut typed = tokio::process::Command::new("script");
    typed
        .args(["-qec", &line, "/dev/null"])
        .env("SETTLED_DATABASE_URL", &ground.database_url)
        .stdin(std::process::Stdio::null());
    let Ok(output) = typed.output().await else {
        return crate::kit::support::skip(
            "causes::what_a_terminal_is_shown",
            "there is no program `script` to have a terminal of",
        );
    };
    let shown = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(
        !shown.chars().any(|letter| hidden(letter) && letter != '😀'),
        "{shown:?}"
    );
    let document: Value = serde_json::from_str(shown.trim()).unwrap_or_else(|error| panic!("{error}: {shown:?}"));
    assert_eq!(document[0]["name"], NAME);
}
