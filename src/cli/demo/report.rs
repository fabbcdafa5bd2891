//! What the demo came to, for people and for programs.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;
use uuid::Uuid;

use super::{chaos::Hit, child::Stopped};
use crate::{
    broker::topology::Depths,
    cli::{
        Failure,
        output::{Mood, Output, plain},
        simulate::{
            account::{Accounting, Findings, Latency},
            latency,
            plan::{Balances, Plan},
            rate_of, reasons, round, unexpected, verdicts,
        },
    },
    desk::{BalanceRecord, Books},
};

/// What was found when all was over.
pub(super) struct Evidence {
    pub(super) chaos: bool,
    pub(super) hits: Vec<Hit>,
    pub(super) republished: usize,
    pub(super) depths: Depths,
    pub(super) parked_left: u64,
    pub(super) before: Balances,
    pub(super) after: Balances,
    pub(super) books: Books,
    pub(super) stopped: Stopped,
    pub(super) sample: Option<(String, String)>,
    pub(super) seconds: f64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    pub(super) ok: bool,
    messages: usize,
    seconds: f64,
    #[serde(flatten)]
    findings: Findings,
    event: Option<Event>,
    dead_letter_queue: DeadLetterQueue,
    balances: Vec<BalanceLine>,
    books: BookCheck,
    speed: Speed,
    worker_exit: Option<i32>,
    chaos: Option<ChaosReport>,
    /// What does not add up, beside messages.
    wrong: Vec<String>,
    #[serde(skip)]
    names: BTreeMap<Uuid, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Event {
    routing_key: String,
    /// As received.
    body: Box<serde_json::value::RawValue>,
}

#[derive(Serialize)]
struct DeadLetterQueue {
    expected: usize,
    actual: u32,
}

#[derive(Serialize)]
struct BalanceLine {
    account: String,
    owner: Option<Uuid>,
    currency: String,
    before: String,
    after: String,
    expected: String,
}

#[derive(Serialize)]
struct BookCheck {
    ok: bool,
    problems: Vec<String>,
    counted: BTreeMap<&'static str, i64>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Speed {
    paced_messages: usize,
    paced_per_second: f64,
    paced_latency_ms: Latency,
    burst_messages: usize,
    burst_per_second: f64,
    burst_latency_ms: Latency,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChaosReport {
    hits: Vec<Hit>,
    republished: usize,
}

/// By account; what the database does not list is zero.
pub(super) fn balances(records: &[BalanceRecord]) -> Balances {
    records
        .iter()
        .map(|record| {
            let key = (record.account.clone(), record.owner, record.currency.clone());
            // The demo's sums are far below the limit.
            (key, record.balance.parse().unwrap_or(i128::MAX))
        })
        .collect()
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        account: &Accounting,
        findings: Findings,
        evidence: Evidence,
        burst: Range<usize>,
    ) -> Self {
        let mut wrong = Vec::new();
        let Evidence {
            chaos,
            hits,
            republished,
            depths,
            parked_left,
            before,
            after,
            books,
            stopped,
            sample,
            seconds,
        } = evidence;
        let rejected = findings.expected.rejected;
        let dead = usize::try_from(depths.dead).unwrap_or(usize::MAX);
        // A crash between commit and acknowledgement publishes again: at least once is the promise.
        if dead < rejected || (dead > rejected && !chaos) {
            wrong.push(format!("settlement.dead holds {dead} messages instead of {rejected}"));
        }
        if depths.updates > 0 || depths.unreadable > 0 {
            wrong.push(format!(
                "{} messages are left in settlement.updates, {} in settlement.unreadable",
                depths.updates, depths.unreadable
            ));
        }
        if parked_left > 0 {
            wrong.push(format!("{parked_left} messages are still parked"));
        }
        let worker_exit = stopped.status.and_then(|status| status.code());
        if worker_exit != Some(0) {
            wrong.push(format!("the worker did not stop in order: {}", stopped.sentence()));
        }
        let mut names = BTreeMap::new();
        for partner in plan.partners.iter().chain([&plan.bound, &plan.suspended]) {
            names.insert(partner.client_id, partner.enterprise_id.clone());
            names.insert(partner.connection_id, partner.enterprise_id.clone());
        }
        let keys: std::collections::BTreeSet<_> =
            before.keys().chain(after.keys()).chain(plan.balances.keys()).collect();
        let at = |balances: &Balances, key| balances.get(key).copied().unwrap_or_default();
        let mut lines = Vec::new();
        for key in keys {
            let (was, is, must) = (at(&before, key), at(&after, key), at(&plan.balances, key));
            let (kind, owner, currency) = key;
            if is != must {
                wrong.push(format!(
                    "account {kind} {currency} of {owner:?} holds {is} instead of {must}"
                ));
            }
            lines.push(BalanceLine {
                account: kind.clone(),
                owner: *owner,
                currency: currency.clone(),
                before: was.to_string(),
                after: is.to_string(),
                expected: must.to_string(),
            });
        }
        if !books.problems.is_empty() {
            wrong.push("the books are wrong".to_owned());
        }
        let paced = 0..burst.start;
        let per_second = |items: &Range<usize>| round(rate_of(items.len(), account.span(items.clone()).as_secs_f64()));
        let speed = Speed {
            paced_messages: paced.len(),
            paced_per_second: per_second(&paced),
            paced_latency_ms: account.latency(paced),
            burst_messages: burst.len(),
            burst_per_second: per_second(&burst),
            burst_latency_ms: account.latency(burst),
        };
        Self {
            ok: wrong.is_empty() && findings.all_right(),
            messages: plan.items.len(),
            seconds: round(seconds),
            findings,
            event: sample.and_then(|(routing_key, text)| {
                let body = serde_json::value::RawValue::from_string(text).ok()?;
                Some(Event { routing_key, body })
            }),
            dead_letter_queue: DeadLetterQueue {
                expected: rejected,
                actual: depths.dead,
            },
            balances: lines,
            books: BookCheck {
                ok: books.problems.is_empty(),
                problems: books.problems,
                counted: books.counted,
            },
            speed,
            worker_exit,
            chaos: chaos.then_some(ChaosReport { hits, republished }),
            wrong,
            names,
        }
    }

    pub(super) fn tell(&self, out: &Output) -> Result<(), Failure> {
        let heading = |text: &str| out.line(format!("\n{}", out.coloured(Mood::Good, text)));
        heading("What became of the messages")?;
        verdicts(out, &self.findings)?;
        let events: Vec<String> = self
            .findings
            .events
            .iter()
            .map(|(name, count)| format!("{count} {name}"))
            .collect();
        out.line(format!("settled: {}", events.join(", ")))?;
        out.line(format!(
            "{} were parked on the way, because their allocation was not there yet",
            self.findings.parked_on_the_way
        ))?;

        heading("Every way to be refused")?;
        reasons(out, &self.findings)?;
        let queue = &self.dead_letter_queue;
        out.line(format!(
            "dead-letter queue settlement.dead: {} messages, {} expected; {} of them seen byte for byte as published",
            queue.actual, queue.expected, self.findings.dead_letters
        ))?;

        heading("One event as a subscriber saw it")?;
        if let Some(event) = &self.event {
            out.line(format!("{} → {}", "settlement.events", plain(&event.routing_key)))?;
            for line in pretty(event.body.get()).lines() {
                out.line(plain(line))?;
            }
        }

        heading("Balances before and after")?;
        self.tell_balances(out)?;
        let counted: Vec<String> = self
            .books
            .counted
            .iter()
            .map(|(table, count)| format!("{count} {table}"))
            .collect();
        out.line(format!(
            "books: {} ({})",
            if self.books.ok { "right" } else { "WRONG" },
            counted.join(", ")
        ))?;
        for problem in &self.books.problems {
            out.line(format!("  {} {}", out.coloured(Mood::Bad, "✗"), plain(problem)))?;
        }

        if let Some(chaos) = &self.chaos {
            heading("What was hit")?;
            let rows = chaos.hits.iter().map(|hit| {
                vec![
                    hit.target.name().to_owned(),
                    format!("{:.1} s", hit.at),
                    hit.in_flight.to_string(),
                    format!("{:.1} s", hit.down_seconds),
                    format!("{:.1} s", hit.silent_seconds),
                ]
            });
            let header = ["SIGKILL to", "at", "in flight", "up again after", "next event after"];
            out.table(&header, rows.collect(), "nothing")?;
            out.line(format!(
                "published again because unconfirmed: {}; extra copies of events, same id and bytes: {}",
                chaos.republished, self.findings.extra_copies
            ))?;
        }

        heading("Speed, from publishing to the event received")?;
        let speed = &self.speed;
        out.line(format!(
            "{} messages at {:.0}/s: {}",
            speed.paced_messages,
            speed.paced_per_second,
            latency(speed.paced_latency_ms)
        ))?;
        if speed.burst_messages > 0 {
            out.line(format!(
                "{} at once: {:.0}/s, {}",
                speed.burst_messages,
                speed.burst_per_second,
                latency(speed.burst_latency_ms)
            ))?;
        }

        unexpected(out, &self.findings)?;
        for wrong in &self.wrong {
            out.line(format!("{} {}", out.coloured(Mood::Bad, "✗"), plain(wrong)))?;
        }
        let (mood, sentence) = if self.ok {
            let sentence = format!(
                "Everything adds up: {} messages, every one answered as expected, in {:.0} s.",
                self.messages, self.seconds
            );
            (Mood::Good, sentence)
        } else {
            (Mood::Bad, "It does not add up: see ✗ above.".to_owned())
        };
        out.line(format!("\n{}", out.coloured(mood, &sentence)))
    }

    /// A line for each partner and currency: its client's funds, what is held, what the partner may use.
    fn tell_balances(&self, out: &Output) -> Result<(), Failure> {
        let mut lines: BTreeMap<(String, String), [String; 3]> = BTreeMap::new();
        for line in &self.balances {
            let name = match line.owner {
                Some(owner) => self.names.get(&owner).cloned().unwrap_or_else(|| owner.to_string()),
                None => "(outside)".to_owned(),
            };
            let column = match line.account.as_str() {
                "held" => 1,
                "allocated" => 2,
                _ => 0,
            };
            let row = lines.entry((name, line.currency.clone())).or_default();
            if let Some(cell) = row.get_mut(column) {
                let (before, after) = (units(&line.before, &line.currency), units(&line.after, &line.currency));
                *cell = if before == after {
                    after
                } else {
                    format!("{before} → {after}")
                };
            }
        }
        let rows = lines.into_iter().map(|((name, currency), cells)| {
            let [available, held, allocated] = cells;
            vec![name, currency, available, held, allocated]
        });
        let header = ["partner", "", "available (client)", "held", "allocated (partner)"];
        out.table(&header, rows.collect(), "no account was opened")?;
        out.line("what demo-bound holds was reserved, and then only messages without its broker user spoke of it")
    }
}

/// JSON with a line for each member, in the order it came.
fn pretty(json: &str) -> String {
    let mut text = String::with_capacity(json.len() * 2);
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for letter in json.chars() {
        if in_string {
            text.push(letter);
            in_string = escaped || letter != '"';
            escaped = letter == '\\' && !escaped;
            continue;
        }
        let newline = |text: &mut String, depth: usize| {
            text.push('\n');
            text.push_str(&"  ".repeat(depth));
        };
        match letter {
            '{' | '[' => {
                depth += 1;
                text.push(letter);
                newline(&mut text, depth);
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                newline(&mut text, depth);
                text.push(letter);
            }
            ',' => {
                text.push(letter);
                newline(&mut text, depth);
            }
            ':' => text.push_str(": "),
            '"' => {
                in_string = true;
                text.push(letter);
            }
            letter if letter.is_whitespace() => {}
            letter => text.push(letter),
        }
    }
    text
}

/// Base units as people say them, cut to four decimals.
fn units(balance: &str, currency: &str) -> String {
    let decimals = if currency == "BTC" { 8 } else { 18 };
    let (sign, digits) = match balance.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", balance),
    };
    let padded = format!("{digits:0>width$}", width = decimals + 1);
    let (whole, fraction) = padded.split_at(padded.len() - decimals);
    format!("{sign}{whole}.{}", fraction.get(..4).unwrap_or(fraction))
}

#[cfg(test)]
mod tests {
    use super::{pretty, units};

    #[test]
    fn pretty_keeps_order_and_strings() {
        assert_eq!(
            pretty(r#"{"b":[1,null],"a":"x, {\"y\": \\"}"#),
            "{\n  \"b\": [\n    1,\n    null\n  ],\n  \"a\": \"x, {\\\"y\\\": \\\\\"\n}"
        );
    }

    #[test]
    fn units_are_cut_not_rounded() {
        for (balance, currency, text) in [
            ("0", "BTC", "0.0000"),
            ("123456789", "BTC", "1.2345"),
            ("-100000000000", "BTC", "-1000.0000"),
            ("1999999999999999999", "ETH", "1.9999"),
            ("-5", "ETH", "-0.0000"),
        ] {
            assert_eq!(units(balance, currency), text, "{balance} {currency}");
        }
    }
}
