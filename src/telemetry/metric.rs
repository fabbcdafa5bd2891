//! What a metric is: its name, kind, unit, labels, help, and what of it stands at zero before anything happened.

use metrics::{
    Label, SharedString, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};

/// How it counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MetricKind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

impl MetricKind {
    pub fn as_str(self) -> &'static str {
        match self {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram(_) => "histogram",
        }
    }
}

/// What a metric is for whom it was made: everything but its numbers.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    pub name: &'static str,
    pub kind: MetricKind,
    pub unit: Unit,
    pub labels: &'static [&'static str],
    pub help: &'static str,
    /// The values of its labels that are there from the beginning, at zero.
    pub(super) starts: fn() -> Vec<Vec<&'static str>>,
}

impl Metric {
    /// Its labels with these values.
    fn of<const N: usize>(&self, values: [SharedString; N]) -> Vec<Label> {
        let labels = self.labels.iter().zip(values);
        labels.map(|(name, value)| Label::new(*name, value)).collect()
    }

    pub(super) fn describe(&self) {
        match self.kind {
            MetricKind::Counter => describe_counter!(self.name, self.unit, self.help),
            MetricKind::Gauge => describe_gauge!(self.name, self.unit, self.help),
            MetricKind::Histogram(_) => describe_histogram!(self.name, self.unit, self.help),
        }
    }

    /// A counter that appears only with its first increment hides that increment from `rate()`.
    pub(super) fn start(&self) {
        for values in (self.starts)() {
            let labels = self.labels.iter().zip(values);
            let labels: Vec<Label> = labels.map(|(name, value)| Label::new(*name, value)).collect();
            match self.kind {
                MetricKind::Counter => counter!(self.name, labels).increment(0),
                MetricKind::Gauge => gauge!(self.name, labels).set(0.0),
                MetricKind::Histogram(_) => drop(histogram!(self.name, labels)),
            }
        }
    }
}

/// Only grows.
pub(super) struct Counter<const LABELS: usize>(pub(super) Metric);

impl<const LABELS: usize> Counter<LABELS> {
    pub(super) fn add(&self, labels: [SharedString; LABELS], count: u64) {
        counter!(self.0.name, self.0.of(labels)).increment(count);
    }
}

/// Goes up and down.
pub(super) struct Gauge<const LABELS: usize>(pub(super) Metric);

impl<const LABELS: usize> Gauge<LABELS> {
    pub(super) fn set(&self, labels: [SharedString; LABELS], value: f64) {
        gauge!(self.0.name, self.0.of(labels)).set(value);
    }

    pub(super) fn add(&self, labels: [SharedString; LABELS], value: f64) {
        gauge!(self.0.name, self.0.of(labels)).increment(value);
    }
}

/// How many of each size.
pub(super) struct Histogram<const LABELS: usize>(pub(super) Metric);

impl<const LABELS: usize> Histogram<LABELS> {
    pub(super) fn record(&self, labels: [SharedString; LABELS], values: impl IntoIterator<Item = f64>) {
        let histogram = histogram!(self.0.name, self.0.of(labels));
        for value in values {
            histogram.record(value);
        }
    }
}

/// Nothing of it is there before something happened.
pub(super) fn nothing() -> Vec<Vec<&'static str>> {
    Vec::new()
}

/// It has no labels, and is there from the beginning.
pub(super) fn itself() -> Vec<Vec<&'static str>> {
    vec![Vec::new()]
}

/// One label with each of these values.
pub(super) fn each(values: impl IntoIterator<Item = &'static str>) -> Vec<Vec<&'static str>> {
    values.into_iter().map(|value| vec![value]).collect()
}
