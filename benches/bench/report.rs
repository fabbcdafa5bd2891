//! What is left of a run: `summary.json`, tables for people, charts.

use std::{fs, path::Path};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde_json::{Map, Value, json};

use crate::{Fallible, chart, figures::Figure};

/// Everything a run found out.
pub(crate) struct Report {
    summary: Value,
    tables: Vec<(String, Table)>,
    notes: Vec<String>,
    /// Name, and median, least and most messages a second.
    rates: Vec<(String, Figure)>,
    /// Name, and milliseconds at [`PERCENTILES`].
    latencies: Vec<(String, Vec<f64>)>,
}

/// What is told of a latency.
pub(crate) const PERCENTILES: [(&str, usize); 5] =
    [("p50", 500), ("p90", 900), ("p99", 990), ("p99.9", 999), ("max", 1_000)];

/// What every summary has, measured or not.
const KEYS: [&str; 17] = [
    "drain.rate",
    "drain.ratio_per_message",
    "drain.ratio_python",
    "drain.ratio_node",
    "drain.floor_share",
    "cpu_us.worker",
    "cpu_us.broker",
    "cpu_us.postgres",
    "wal_bytes",
    "round_trips_per_batch",
    "rejects10.ratio",
    "rejects50.ratio",
    "duplicates.ratio",
    "hot.ratio",
    "age10m.ratio",
    "rss_peak_mb",
    "batched.ratio_per_message",
];

impl Report {
    pub(crate) fn new() -> Self {
        let mut report = Self {
            summary: json!({}),
            tables: Vec::new(),
            notes: Vec::new(),
            rates: Vec::new(),
            latencies: Vec::new(),
        };
        for key in KEYS {
            report.set(key, Value::Null);
        }
        for rate in [100, 1_000, 4_000] {
            for key in ["p50_ms", "p99_ms", "ratio_p50", "ratio_p99"] {
                report.set(&format!("latency.{rate}.{key}"), Value::Null);
            }
        }
        report
    }

    /// Puts a value where a dotted key says.
    pub(crate) fn set(&mut self, key: &str, value: impl Into<Value>) {
        let mut at = &mut self.summary;
        for part in key.split('.') {
            if !at.is_object() {
                *at = Value::Object(Map::new());
            }
            at = &mut at[part];
        }
        *at = value.into();
    }

    pub(crate) fn get(&self, key: &str) -> Option<f64> {
        key.split('.')
            .try_fold(&self.summary, |at, part| at.get(part))?
            .as_f64()
    }

    /// Rows for people; every column but the first holds numbers.
    pub(crate) fn table(&mut self, title: &str, header: &[&str], rows: Vec<Vec<String>>) {
        let mut table = Table::new();
        table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
        table.set_header(header.iter().copied()).add_rows(rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        self.tables.push((title.to_owned(), table));
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// For the chart of rates.
    pub(crate) fn rate(&mut self, name: &str, figure: Option<Figure>) {
        self.rates.extend(figure.map(|figure| (name.to_owned(), figure)));
    }

    /// For the chart of latencies.
    pub(crate) fn latency(&mut self, name: String, milliseconds: Vec<f64>) {
        self.latencies.push((name, milliseconds));
    }

    pub(crate) fn write(&self, directory: &Path) -> Fallible<()> {
        if !self.rates.is_empty() {
            let title = "Messages a second (median, and the spread over rounds)";
            fs::write(directory.join("rates.svg"), chart::bars(title, &self.rates))?;
        }
        if !self.latencies.is_empty() {
            let title = "Publish to event received, by percentile";
            let chart = chart::percentiles(title, &PERCENTILES.map(|(name, _)| name), &self.latencies);
            fs::write(directory.join("latency.svg"), chart)?;
        }
        let path = directory.join("summary.json");
        fs::write(&path, format!("{:#}\n", self.summary))?;
        let mut text = String::new();
        for (title, table) in &self.tables {
            text.push_str(&format!("\n{title}\n\n{table}\n"));
        }
        text.push('\n');
        for note in &self.notes {
            text.push_str(&format!("{note}\n"));
        }
        print!("{text}");
        fs::write(directory.join("summary.txt"), text)?;
        println!("\n{}", path.display());
        Ok(())
    }
}
