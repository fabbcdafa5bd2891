//! What was done, what it met, and what recovered when.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde_json::{Value, json};

use super::{Act, Step};

/// Everything that was counted.
pub(crate) struct Tally {
    began: Instant,
    /// Acts, those that met something, and what they met.
    acts: BTreeMap<Act, [usize; 3]>,
    recoveries: BTreeMap<&'static str, Vec<Duration>>,
    steps: Vec<Value>,
    rounds: usize,
    messages: usize,
    settled: i64,
    wires: usize,
    /// The command that does the same again, for whoever sees it fail.
    pub(crate) again: String,
}

impl Tally {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            acts: BTreeMap::new(),
            recoveries: BTreeMap::new(),
            steps: Vec::new(),
            rounds: 0,
            messages: 0,
            settled: 0,
            wires: 0,
            again: String::new(),
        }
    }

    pub(super) fn note(&mut self, step: Step, hits: usize, took: Duration, recovery: Option<(&'static str, Duration)>) {
        let [acts, met, pieces] = self.acts.entry(step.act).or_default();
        *acts += 1;
        *met += usize::from(hits > 0);
        *pieces += hits;
        self.steps.push(json!({
            "at_ms": milliseconds(self.began.elapsed()),
            "round": self.rounds + 1,
            "act": step.act.name(),
            "draws": step.draws,
            "met": hits,
            "took_ms": milliseconds(took),
            "recovered": recovery.map(|(what, _)| what),
            "recovery_ms": recovery.map(|(_, recovery)| milliseconds(recovery)),
        }));
        if let Some((what, recovery)) = recovery {
            self.recoveries.entry(what).or_default().push(recovery);
        }
    }

    pub(super) fn round_is_over(&mut self, messages: usize, settled: i64, wires: usize) {
        self.rounds += 1;
        self.messages += messages;
        self.settled += settled;
        self.wires += wires;
    }

    pub(crate) fn acts(&self) -> usize {
        self.acts.values().map(|[acts, ..]| acts).sum()
    }

    /// How often an act was done that met something.
    pub(crate) fn met(&self, act: Act) -> usize {
        self.acts.get(&act).map_or(0, |[_, met, _]| *met)
    }

    pub(crate) fn line(&self) -> String {
        format!(
            "{} rounds, {} acts, {} pieces on the wires, {} messages, {} settled, {:.0?}",
            self.rounds,
            self.acts(),
            self.wires,
            self.messages,
            self.settled,
            self.began.elapsed()
        )
    }

    pub(crate) fn table(&self) -> String {
        let mut acts = table(&["act", "times", "met something", "pieces"], 1);
        for (act, numbers) in &self.acts {
            let mut row = vec![act.name().to_owned()];
            row.extend(numbers.map(|number| number.to_string()));
            acts.add_row(row);
        }
        let mut recoveries = table(&["until the next settlement", "times", "p50 ms", "p99 ms", "max ms"], 1);
        for (what, times) in &self.recoveries {
            let [p50, p99, max] = quantiles(times);
            let numbers = [times.len() as u64, p50, p99, max].map(|number| number.to_string());
            let mut row = vec![(*what).to_owned()];
            row.extend(numbers);
            recoveries.add_row(row);
        }
        format!("{acts}\n\n{recoveries}\n\n{}", self.line())
    }

    pub(crate) fn document(&self, seed: u64) -> Value {
        let acts: BTreeMap<&str, Value> = self
            .acts
            .iter()
            .map(|(act, [acts, met, pieces])| (act.name(), json!({"times": acts, "met": met, "pieces": pieces})))
            .collect();
        let recoveries: BTreeMap<&str, Value> = self
            .recoveries
            .iter()
            .map(|(what, times)| {
                let [p50, p99, max] = quantiles(times);
                (
                    *what,
                    json!({"times": times.len(), "p50_ms": p50, "p99_ms": p99, "max_ms": max}),
                )
            })
            .collect();
        json!({
            "seed": seed,
            "seconds": self.began.elapsed().as_secs(),
            "rounds": self.rounds,
            "messages": self.messages,
            "settled": self.settled,
            "wires": self.wires,
            "acts": acts,
            "recoveries": recoveries,
            "steps": self.steps,
        })
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.table());
            let last = self.steps.len().saturating_sub(8);
            for step in self.steps.iter().skip(last) {
                eprintln!("{step}");
            }
            eprintln!("again: {}", self.again);
        }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The middle, the last of a hundred, the last.
fn quantiles(times: &[Duration]) -> [u64; 3] {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    [50, 99, 100].map(|share| {
        let at = (sorted.len() * share).div_ceil(100).saturating_sub(1);
        milliseconds(sorted.get(at).copied().unwrap_or_default())
    })
}

fn table(header: &[&str], numbers_from: usize) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('-').junction('-')));
    table.set_header(header);
    for column in table.column_iter_mut().skip(numbers_from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
