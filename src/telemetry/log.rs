//! The log, on stderr: for people or as JSON lines.

use std::fmt;
use std::io::IsTerminal;

use tracing::{Event, Level, Subscriber, debug};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, Registry};

use super::traces;
use crate::config::{LogFormat, LogLevel, LogSettings};
use crate::plain::ForPeople;

/// Starts the log, on stderr. Colour only on a terminal. The first call in a process counts, later ones do nothing.
pub fn init(settings: &LogSettings, to_terminal: bool) {
    let subscriber = Registry::default().with(log_layer(settings, to_terminal, std::io::stderr));
    if subscriber.try_init().is_err() {
        debug!("the log is already set up");
    }
}

/// Whether the log goes to a terminal: what [`init`] wants to know.
pub fn stderr_is_terminal() -> bool {
    std::io::stderr().is_terminal()
}

pub(super) fn log_layer<W>(
    settings: &LogSettings,
    to_terminal: bool,
    writer: W,
) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = filter(settings.level);
    let human = match settings.format {
        LogFormat::Auto => to_terminal,
        LogFormat::Human => true,
        LogFormat::Json => false,
    };
    // A person looks at both; a program gets JSON as it is.
    if human || to_terminal {
        let writer = ForPeople {
            inner: writer,
            json: !human,
        };
        return formatted(writer, human, to_terminal, filter);
    }
    formatted(writer, human, to_terminal, filter)
}

fn formatted<W>(writer: W, human: bool, to_terminal: bool, filter: Targets) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    if human {
        layer
            .with_ansi(to_terminal)
            .with_target(false)
            .map_event_format(|format| Traced {
                format: format.with_ansi(to_terminal),
                is_json: false,
            })
            .with_filter(filter)
            .boxed()
    } else {
        layer
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .map_event_format(|format| Traced { format, is_json: true })
            .with_filter(filter)
            .boxed()
    }
}

/// Lines with the ids of the trace in which they are said, where there is one.
struct Traced<F> {
    format: F,
    is_json: bool,
}

impl<S, N, F> FormatEvent<S, N> for Traced<F>
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some((trace, span)) = traces::ids() else {
            return self.format.format_event(context, writer, event);
        };
        let mut line = String::new();
        self.format.format_event(context, Writer::new(&mut line), event)?;
        let end = if self.is_json { "}\n" } else { "\n" };
        let said = line.strip_suffix(end).unwrap_or(&line);
        if self.is_json {
            writeln!(writer, "{said},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}")
        } else {
            writeln!(writer, "{said} trace_id={trace} span_id={span}")
        }
    }
}

/// Ours at the level asked for, the dependencies' warnings and errors, and nothing of those that we stand on: lapin prints
/// a returned message whole, body and all, and what goes wrong is said once, by whoever handles it.
fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    };
    Targets::new()
        .with_default(LevelFilter::from_level(level.min(Level::WARN)))
        .with_target("lapin", LevelFilter::OFF)
        .with_target("deadpool_postgres", LevelFilter::OFF)
        .with_target("settled", level)
}
