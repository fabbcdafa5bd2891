//! The program run as a person or a program runs it, and what it answers.

use std::{
    collections::BTreeSet,
    process::{Output, Stdio},
};

use serde_json::Value;

use super::{
    contract,
    partner::Partner,
    secrets,
    support::{Ground, PATIENCE, settled},
};

/// Nobody listens there.
pub(crate) const NOWHERE: &str = "127.0.0.1:9";

/// What a command said.
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Answer {
    pub(crate) fn of(output: &Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub(crate) fn all(&self) -> String {
        format!("exit {:?}\n{}\n{}", self.code, self.out, self.err)
    }

    pub(crate) fn succeeded(&self) -> bool {
        self.code == Some(0)
    }

    /// The lines of JSON, with an exit code; nothing may be said on stderr.
    pub(crate) fn lines(&self, code: i32) -> Vec<Value> {
        assert_eq!(self.code, Some(code), "{}", self.all());
        assert_eq!(self.err, "", "with --json nothing is said to a person");
        let read = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {}", self.all()));
        self.out.lines().map(read).collect()
    }

    /// The one document, with an exit code.
    pub(crate) fn document(&self, code: i32) -> Value {
        let mut lines = self.lines(code);
        assert_eq!(lines.len(), 1, "one document: {}", self.all());
        lines.remove(0)
    }

    /// The message and hint of a command that was not carried out, with an exit code.
    pub(crate) fn refusal(&self, code: i32) -> (String, String) {
        assert_eq!(self.code, Some(code), "{}", self.all());
        assert_eq!(self.out, "", "no answer where there is none");
        let document: Value = serde_json::from_str(&self.err).unwrap_or_else(|error| panic!("{error}: {}", self.all()));
        let keys = |value: &Value| -> Vec<String> { value.as_object().expect("an object").keys().cloned().collect() };
        assert_eq!(keys(&document), ["error"], "{}", self.all());
        let error = &document["error"];
        assert_eq!(
            BTreeSet::from_iter(keys(error)),
            BTreeSet::from(["message".into(), "hint".into()])
        );
        let hint = error["hint"].as_str().unwrap_or_default();
        let message = error["message"].as_str().expect("a sentence");
        assert!(!message.is_empty(), "{}", self.all());
        (message.to_owned(), hint.to_owned())
    }

    /// The same for one whose message holds a text.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, piece: &str) {
        let (message, hint) = self.refusal(code);
        assert!(
            message.contains(piece),
            "{piece:?} is not in {message:?} (hint {hint:?})"
        );
    }
}

/// Runs a command with `--json`.
pub(crate) async fn ask(ground: &Ground, arguments: &[&str]) -> Answer {
    ask_with(ground, arguments, "").await
}

pub(crate) async fn ask_with(ground: &Ground, arguments: &[&str], stdin: &str) -> Answer {
    Answer::of(&ground.run_with(&[arguments, &["--json"]].concat(), stdin).await)
}

/// Runs a command in an environment of one's own, with `--json`.
pub(crate) async fn ask_in(variables: &[(&str, &str)], arguments: &[&str]) -> Answer {
    Answer::of(&run_in(variables, &[arguments, &["--json"]].concat()).await)
}

pub(crate) async fn run_in(variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = settled();
    command
        .args(arguments)
        .envs(variables.iter().copied())
        .stdin(Stdio::null());
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = ended
        .unwrap_or_else(|_| panic!("settled {arguments:?} did not end"))
        .expect("settled runs");
    contract::answered(arguments, &output);
    secrets::check_command(arguments, &output);
    output
}

/// A migrated database; no broker is asked.
pub(crate) async fn ledger(test: &str) -> Ground {
    let ground = Ground::new(test).await;
    ground.copy_template().await;
    ground
}

pub(crate) async fn add_partner(ground: &Ground, enterprise: &str) {
    let add = ["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"];
    ask(ground, &add).await.document(0);
}

pub(crate) async fn add_key(ground: &Ground, enterprise: &str, key: &str, flags: &[&str]) -> Answer {
    let add = ["key", "add", "--enterprise-id", enterprise, "--public-key", key];
    ask(ground, &[&add, flags].concat()).await
}

pub(crate) async fn deposit(ground: &Ground, client: &str, currency: &str, quantity: &str, reference: &str) -> Answer {
    move_funds(ground, "deposit", client, (currency, quantity), reference).await
}

/// `way` is `deposit` or `withdraw`.
pub(crate) async fn move_funds(
    ground: &Ground,
    way: &str,
    client: &str,
    (currency, quantity): (&str, &str),
    reference: &str,
) -> Answer {
    let flags = [
        "--client-id",
        client,
        "--currency",
        currency,
        "--quantity",
        quantity,
        "--reference",
        reference,
    ];
    ask(ground, &[&[way], &flags[..]].concat()).await
}

pub(crate) async fn register(ground: &Ground, partner: &Partner) {
    add_partner(ground, &partner.enterprise).await;
    add_key(ground, &partner.enterprise, &partner.public_key(), &[])
        .await
        .document(0);
    let (connection, client) = (partner.connection.to_string(), partner.client.to_string());
    let flags = [
        "--connection-id",
        &connection,
        "--enterprise-id",
        &partner.enterprise,
        "--client-id",
        &client,
        "--partners-client-id",
        &partner.partners_client,
        "--partners-connection-id",
        &partner.partners_connection,
    ];
    ask(ground, &[&["connection", "add"], &flags[..]].concat())
        .await
        .document(0);
}
