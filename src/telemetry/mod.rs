//! Every operational signal as a type: one [`Signal::emit`], one log line, the metrics that it counts, each of which is
//! defined once, in [`catalogue`], and its place in the trace of the batch in hand ([`BatchTrace`]).
//!
//! Nothing else in the worker logs or counts. A signal carries ids, counts and codes, never a body, key or signature.

pub mod catalogue;
mod emit;
mod export;
mod labels;
mod log;
mod metric;
mod recorder;
mod signal;
mod tally;
mod traces;

pub use export::{Answering, Outlet, TraceExport};
pub use labels::{
    ApiRoute, Dependency, Door, EventFate, EventType, PartnerLabels, PauseCause, ReplyResult, SpanFate, Stage,
};
pub use log::{init, stderr_is_terminal};
pub use metric::{Metric, MetricKind};
pub use recorder::install_metrics;
pub use signal::Signal;
pub use tally::{HeldOf, Published, Tally};
pub use traces::{BatchTrace, Traces};

#[cfg(test)]
pub(crate) fn keep_call_sites_on() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        tracing::subscriber::set_global_default(tracing_subscriber::Registry::default()).expect("the only one")
    });
}

#[cfg(test)]
mod tests;
