//! `settled doctor`: everything that the worker needs, one line each. What is away is a line that says so.

mod broker;
mod database;
mod management;
mod role;
mod versions;

use std::time::{Duration, SystemTime};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    Exit, Failure,
    output::{Mood, Output, plain},
};
use crate::{
    config::{ConfigError, Settings},
    desk::DatabaseRole,
};

pub(super) use versions::topic_permissions;

#[derive(Args)]
pub(super) struct Doctor {
    /// Look at one role of the database instead, such as settled_worker: what it lacks, and what it may do beside
    #[arg(long, value_name = "ROLE", value_parser = DatabaseRole::parse)]
    role: Option<DatabaseRole>,
}

/// A certificate of ours that ends sooner is worth a hint.
const ENDS_SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// The oldest PostgreSQL that has what the schema uses (UNIQUE NULLS NOT DISTINCT).
pub(super) const POSTGRES_MIN: i32 = 150_000;

/// One line. The name is stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) ok: bool,
    pub(super) detail: String,
    pub(super) hint: Option<String>,
}

impl Check {
    fn good(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            ok: true,
            detail: detail.into(),
            hint: None,
        }
    }

    fn bad(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            ok: false,
            ..Self::good(name, detail)
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With something to know that is no problem.
    fn noting(mut self, note: Option<String>) -> Self {
        self.hint = note.or(self.hint);
        self
    }

    fn failed(name: impl Into<String>, failure: &Failure) -> Self {
        Self {
            hint: failure.hint_text().map(str::to_owned),
            ..Self::bad(name, failure.message())
        }
    }
}

/// Until when our own certificate counts; no line where we have none to show.
fn certificate<E: std::fmt::Display>(name: &str, until: Result<Option<SystemTime>, E>) -> Option<Check> {
    let until = match until {
        Err(error) => return Some(Check::bad(name, error.to_string())),
        Ok(until) => until?,
    };
    let shown = Timestamp::try_from(until)
        .map(|until| until.to_string())
        .unwrap_or_default();
    let soon = until < SystemTime::now() + ENDS_SOON;
    let line = Check::good(name, format!("our certificate counts until {shown}"));
    Some(line.noting(soon.then(|| "renew it soon: its files are read anew for each connection".to_owned())))
}

/// Checks everything, whatever fails on the way.
pub(super) async fn run(settings: Result<Settings, ConfigError>, out: &Output, wish: &Doctor) -> Result<Exit, Failure> {
    let checks = match settings {
        Err(error) => vec![Check::bad("settings", error.message()).hint(error.hint())],
        Ok(settings) => match wish.role {
            Some(role) => {
                let mut checks = vec![known(&settings)];
                checks.extend(role::checks(&settings, role).await);
                checks
            }
            None => checks(&settings).await,
        },
    };
    report(&checks, out)
}

/// Where the lines are asked for; or why not.
pub(super) fn store_of(settings: &Settings) -> database::Asked {
    database::store(settings)
}

/// The lines about the database.
pub(super) async fn of_database(settings: &Settings, store: &database::Asked) -> Vec<Check> {
    match store {
        Ok(store) => database::checks(settings, store).await,
        Err(check) => vec![check.clone()],
    }
}

/// The lines about the broker.
pub(super) async fn of_broker(settings: &Settings, store: &database::Asked) -> Vec<Check> {
    broker::checks(settings, store.as_ref().ok()).await
}

/// Every line, with settings that are right.
async fn checks(settings: &Settings) -> Vec<Check> {
    let mut checks = vec![known(settings)];
    let store = database::store(settings);
    let (database, broker) = tokio::join!(of_database(settings, &store), of_broker(settings, &store));
    checks.extend(database);
    checks.extend(broker);
    checks
}

pub(super) fn known(settings: &Settings) -> Check {
    let known = Check::good("settings", "every setting is known and in its range");
    if settings.allow_plaintext {
        return known.hint("allow_plaintext is on: passwords and messages may travel in the open to another machine");
    }
    known
}

fn report(checks: &[Check], out: &Output) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Report<'a> {
        ok: bool,
        checks: &'a [Check],
    }
    let wrong = checks.iter().filter(|check| !check.ok).count();
    let ok = wrong == 0;
    out.say(&Report { ok, checks }, |out| {
        let width = checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
        for (index, check) in checks.iter().enumerate() {
            let mark = if check.ok {
                out.coloured(Mood::Good, "ok     ")
            } else {
                out.coloured(Mood::Bad, "PROBLEM")
            };
            out.line(format!("{mark}  {:width$}  {}", check.name, plain(&check.detail)))?;
            // What mends several in a row is said once, under the last of them.
            let is_said_below = checks
                .get(index + 1)
                .is_some_and(|next| next.hint == check.hint && !next.ok);
            if let Some(hint) = check.hint.as_ref().filter(|_| !is_said_below) {
                let hint = out.coloured(Mood::Dim, &plain(hint));
                out.line(format!("{:9}{:width$}  hint: {hint}", "", ""))?;
            }
        }
        match wrong {
            0 => out.line(format!("{} checks, all well", checks.len())),
            wrong => out.line(format!("{wrong} of {} checks found a problem", checks.len())),
        }
    })?;
    Ok(if ok { Exit::Done } else { Exit::Failed })
}
