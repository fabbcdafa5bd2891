//! `settled reconcile`: what the batches counted, against what they wrote.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    Context, Exit, Failure,
    output::{Mood, plain},
    time,
};
use crate::{
    broker::topology,
    domain::event::rfc3339,
    store::reconcile::{self, Line, Moment, Reconciliation, Waiting},
};

#[derive(Args)]
pub(super) struct Reconcile {
    /// The first moment that counts: RFC 3339, or so long ago, such as 24h
    #[arg(long, value_name = "T", value_parser = moment)]
    since: Moment,
    /// The first moment that does not count any more; now, if it is left out
    #[arg(long, value_name = "T", value_parser = moment)]
    until: Option<Moment>,
}

/// RFC 3339, or a duration ago.
pub(super) fn moment(text: &str) -> Result<Moment, String> {
    let wrong = match time(text) {
        Ok(time) => return Ok(Moment::At(time.timestamp())),
        Err(wrong) => wrong,
    };
    match jiff::fmt::friendly::SpanParser::new().parse_unsigned_duration(text) {
        Ok(ago) if ago <= AGO_MAX => Ok(Moment::Ago(ago)),
        Ok(_) => Err(TOO_LONG_AGO.into()),
        // A number of hours that no duration can hold is one all the same.
        Err(_) if is_duration(text) => Err(TOO_LONG_AGO.into()),
        Err(_) if wrong.contains("0001 to 9999") => Err(wrong),
        Err(_) => {
            Err("write it as RFC 3339, such as 2030-01-31T00:00:00Z, or as so long ago, such as 90m or 24h".into())
        }
    }
}

/// Whether it would be a duration if each of its numbers were small.
fn is_duration(text: &str) -> bool {
    let mut small = String::new();
    for letter in text.chars() {
        match (letter.is_ascii_digit(), small.chars().next_back()) {
            (true, Some(before)) if before.is_ascii_digit() => {}
            (true, _) => small.push('1'),
            (false, _) => small.push(letter),
        }
    }
    jiff::fmt::friendly::SpanParser::new()
        .parse_unsigned_duration(&small)
        .is_ok()
}

/// The calendar of our times begins with the year 0001.
const AGO_MAX: Duration = Duration::from_secs(17_520_000 * 3_600);
const TOO_LONG_AGO: &str = "so long ago is at most 17520000h, which is 2,000 years; or write it as RFC 3339";

pub(super) async fn run(context: &Context, wish: Reconcile) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    struct Told<'a> {
        ok: bool,
        #[serde(flatten)]
        found: &'a Reconciliation,
    }
    if let (Moment::At(since), Some(Moment::At(until))) = (wish.since, wish.until) {
        in_order(since, until)?;
    }
    let store = context.store()?;
    let mut looks = 1;
    let found = loop {
        // Before the database: what is taken in between is then in both numbers, and not in none.
        let waiting = waiting(context).await;
        let found = store.reconcile(wish.since, wish.until, waiting).await?;
        in_order(found.since, found.until)?;
        // What is on its way, published or handed out a moment ago, arrives.
        let only_letters = found
            .lines
            .iter()
            .all(|line| line.ok || line.left.what == reconcile::PUBLISHED);
        if looks == LOOKS || !only_letters || found.lines.iter().all(|line| line.ok) {
            break found;
        }
        looks += 1;
        tokio::time::sleep(LOOK).await;
    };
    let ok = found.lines.iter().all(|line| line.ok);
    context.out.say(&Told { ok, found: &found }, |out| {
        out.line(format!("from {} until {}", rfc3339(found.since), rfc3339(found.until)))?;
        for line in &found.lines {
            let (mood, word) = if line.ok {
                (Mood::Good, "ok   ")
            } else {
                (Mood::Bad, "wrong")
            };
            out.line(format!("{}  {}", out.coloured(mood, word), sentence(line)))?;
            if !line.ok {
                out.line(format!("       {}", out.coloured(Mood::Dim, line.advice)))?;
            }
        }
        for problem in &found.problems {
            out.line(plain(problem))?;
        }
        Ok(())
    })?;
    Ok(if ok { Exit::Done } else { Exit::Failed })
}

/// How often dead letters that may be on their way are looked for, and how long in between.
const LOOKS: u32 = 11;
const LOOK: Duration = Duration::from_millis(500);

/// Dead letters that wait in their queue. While it is not empty its consumers may hold as many as they may have.
async fn waiting(context: &Context) -> Waiting {
    let asked = async {
        let connection = context.connect("settled reconcile").await.ok()?;
        let queue = topology::backlog(&connection, topology::DEAD).await.ok();
        drop(connection.close().await);
        queue
    };
    match asked.await {
        Some((0, _)) => Waiting::AtMost(0),
        Some((ready, consumers)) => {
            Waiting::AtMost(u64::from(ready).saturating_add(u64::from(consumers).saturating_mul(PREFETCH_MAX)))
        }
        None => Waiting::Unknown,
    }
}

/// A quorum queue's limit.
const PREFETCH_MAX: u64 = 2_000;

fn in_order(since: Timestamp, until: Timestamp) -> Result<(), Failure> {
    if since < until {
        return Ok(());
    }
    Err(Failure::usage("the window ends before it begins").hint("--since is the earlier one"))
}

/// `settled 120 = settlements 120`; with the difference, where there is one.
fn sentence(line: &Line) -> String {
    let both = format!(
        "{} {} {} {} {}",
        line.left.what,
        line.left.count,
        line.relation.as_str(),
        line.right.what,
        line.right.count
    );
    if line.ok {
        return both;
    }
    format!("{both}: differs by {}", line.differs_by)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_so_long_ago() {
        assert_eq!(
            moment("2030-01-31T01:00:00.1234+01:00").map(|moment| match moment {
                Moment::At(time) => rfc3339(time),
                Moment::Ago(_) => String::new(),
            }),
            Ok("2030-01-31T00:00:00.123Z".to_owned())
        );
        for (text, seconds) in [
            ("24h", 86_400),
            ("90m", 5_400),
            ("1h 30m", 5_400),
            ("15s", 15),
            ("0s", 0),
        ] {
            assert_eq!(moment(text), Ok(Moment::Ago(Duration::from_secs(seconds))), "{text}");
        }
        for text in ["", "24", "yesterday", "2030-01-31", "-24h", "24h ago"] {
            assert!(moment(text).is_err_and(|why| why.contains("RFC 3339")), "{text}");
        }
        assert!(moment("17520000h").is_ok());
        for text in [
            "17520001h",
            "300000000h",
            "99999999999999999999999h",
            "1h 99999999999999999999999m",
            "9223372036854775807s",
        ] {
            assert!(
                moment(text).is_err_and(|why| why.contains("2,000 years")),
                "{text}: {:?}",
                moment(text)
            );
        }
        for text in ["10000-01-01T00:00:00Z", "0000-01-01T00:00:00Z"] {
            assert!(moment(text).is_err(), "{text}");
        }
    }
}
