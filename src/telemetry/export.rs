//! Spans on their way out: a bounded queue, and one task that exports what is in it, as OTLP over HTTP. Who settles never waits
//! for it, and a receiver that is away is told once.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::{Request, Response, Uri, body::Bytes};
use opentelemetry::{InstrumentationScope, KeyValue, trace::TracerProvider as _};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_COMPRESSION, OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TRACES_COMPRESSION, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, RetryPolicy, SpanExporter,
    WithHttpConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{SdkTracerProvider, Span, SpanData, SpanExporter as _, SpanProcessor},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{labels::SpanFate, signal::Signal, traces::Traces};
use crate::config::TraceSettings;

/// An answer that is on its way.
pub type Answering = Pin<Box<dyn Future<Output = Result<Response<Bytes>, String>> + Send>>;

/// How a request is sent, and which addresses may be told a secret: telemetry itself connects to nothing.
pub struct Outlet {
    pub send: Box<dyn Fn(Request<Bytes>) -> Answering + Send + Sync>,
    pub is_safe: Box<dyn Fn(&Uri) -> bool + Send + Sync>,
}

/// The task that exports, until the program stops.
pub struct TraceExport {
    provider: SdkTracerProvider,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    queue: Queue,
    deadline: Duration,
}

impl Traces {
    /// As OpenTelemetry's own variables say: off unless one of them names a receiver. What is wrong with them is told, and
    /// then they are off too: nobody settles less because of it.
    pub fn start(
        settings: &TraceSettings,
        worker: &str,
        outlet: impl FnOnce() -> Result<Outlet, String>,
    ) -> (Self, Option<TraceExport>) {
        let started = match receiver(&variable) {
            Ok(None) => return (Self::default(), None),
            Ok(Some(receiver)) => outlet().and_then(|outlet| started(settings, worker, receiver, outlet)),
            Err(why) => Err(why),
        };
        match started {
            Ok((traces, export)) => (traces, Some(export)),
            Err(why) => {
                Signal::TracesOff { why: &why }.emit();
                (Self::default(), None)
            }
        }
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Who is to have the traces, where that is said.
struct Receiver {
    address: Uri,
    /// Headers of the user's own go with each export; they may be a password.
    has_headers: bool,
}

/// # Errors
/// What is wrong with what is said. It repeats nothing that may be secret.
fn receiver(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Receiver>, String> {
    let of = |name: &'static str, general: &'static str| {
        variable(name)
            .map(|value| (name, value))
            .or_else(|| variable(general).map(|value| (general, value)))
    };
    let is = |name: &str, wanted: &str| variable(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return Ok(None);
    }
    let Some((name, address)) = of(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT) else {
        return Ok(None);
    };
    let address = address.parse::<Uri>().ok().filter(|address| {
        let is_plain = address
            .authority()
            .is_some_and(|authority| !authority.as_str().contains('@'));
        is_plain && matches!(address.scheme_str(), Some("http" | "https"))
    });
    let address = address.ok_or_else(|| {
        format!("{name} must be a URL such as http://127.0.0.1:4318, with no user in it ({OTEL_EXPORTER_OTLP_HEADERS} has secrets)")
    })?;
    for (name, general, only) in [
        (
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
            OTEL_EXPORTER_OTLP_PROTOCOL,
            "http/protobuf",
        ),
        (
            OTEL_EXPORTER_OTLP_TRACES_COMPRESSION,
            OTEL_EXPORTER_OTLP_COMPRESSION,
            "none",
        ),
        ("OTEL_TRACES_EXPORTER", "OTEL_TRACES_EXPORTER", "otlp"),
    ] {
        if let Some((name, _)) = of(name, general).filter(|(_, value)| !value.eq_ignore_ascii_case(only)) {
            return Err(format!("{name} must be {only}, or not set: nothing else is spoken"));
        }
    }
    check_sampler(variable)?;
    let headers = of(OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_EXPORTER_OTLP_HEADERS);
    Ok(Some(Receiver {
        address,
        has_headers: headers.is_some(),
    }))
}

/// The SDK takes what it does not know for "all of them".
fn check_sampler(variable: &dyn Fn(&str) -> Option<String>) -> Result<(), String> {
    const SAMPLERS: [&str; 6] = [
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ];
    let Some(sampler) = variable("OTEL_TRACES_SAMPLER") else {
        return Ok(());
    };
    if !SAMPLERS.contains(&sampler.as_str()) {
        return Err(format!("OTEL_TRACES_SAMPLER must be one of {}", SAMPLERS.join(", ")));
    }
    let argument = variable("OTEL_TRACES_SAMPLER_ARG").and_then(|argument| argument.parse::<f64>().ok());
    if sampler.ends_with("ratio") && !argument.is_some_and(|ratio| (0.0..=1.0).contains(&ratio)) {
        return Err(format!(
            "OTEL_TRACES_SAMPLER is {sampler}: OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1"
        ));
    }
    Ok(())
}

fn started(
    settings: &TraceSettings,
    worker: &str,
    receiver: Receiver,
    outlet: Outlet,
) -> Result<(Traces, TraceExport), String> {
    if receiver.has_headers && !(outlet.is_safe)(&receiver.address) {
        return Err(format!(
            "{OTEL_EXPORTER_OTLP_HEADERS} would leave in the clear: the endpoint must begin with https:// unless it is on this \
             machine or allow_plaintext is on"
        ));
    }
    let name = receiver
        .address
        .authority()
        .map_or("", |authority| authority.as_str())
        .to_owned();
    let failure = Arc::new(Mutex::new(None));
    let client = Client {
        outlet,
        failure: Arc::clone(&failure),
    };
    let mut exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(client)
        // It would sleep on the thread that it is on.
        .with_retry_policy(RetryPolicy::disabled())
        .build()
        .map_err(|_| format!("{OTEL_EXPORTER_OTLP_ENDPOINT} can not be exported to"))?;
    let resource = resource(worker);
    exporter.set_resource(&resource);
    let (sender, spans) = mpsc::channel(settings.queue_max);
    let queue = Queue {
        spans: sender,
        dropped: Arc::default(),
    };
    // The sampler, and other limits than ours, it reads in the environment by itself.
    let provider = SdkTracerProvider::builder()
        .with_span_processor(queue.clone())
        .with_resource(resource)
        .with_max_links_per_span(settings.links_max)
        .build();
    let scope = InstrumentationScope::builder("settled")
        .with_version(env!("CARGO_PKG_VERSION"))
        .build();
    let tracer = provider.tracer_with_scope(scope);
    Signal::TracesExported { receiver: &name }.emit();
    let (stop, stopping) = oneshot::channel();
    let exporting = Exporting {
        exporter,
        spans,
        dropped: Arc::clone(&queue.dropped),
        failure,
        receiver: name,
        settings: settings.clone(),
        is_away: false,
    };
    let export = TraceExport {
        provider,
        stop,
        task: tokio::spawn(exporting.run(stopping)),
        queue,
        deadline: settings.flush_deadline,
    };
    Ok((Traces::with(tracer, settings.states_max), export))
}

/// Who we are, unless the environment says otherwise.
fn resource(worker: &str) -> Resource {
    let ours = Resource::builder_empty()
        .with_service_name("settled")
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", worker.to_owned()),
        ])
        .with_detectors(&[
            Box::new(TelemetryResourceDetector),
            Box::new(EnvResourceDetector::new()),
        ]);
    match variable("OTEL_SERVICE_NAME") {
        Some(name) => ours.with_service_name(name).build(),
        None => ours.build(),
    }
}

/// Where spans go when they end. There is room or there is not: nobody waits.
#[derive(Clone, Debug)]
struct Queue {
    spans: mpsc::Sender<SpanData>,
    /// Not told yet.
    dropped: Arc<AtomicU64>,
}

impl SpanProcessor for Queue {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        if self.spans.try_send(span).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

impl Queue {
    fn waiting(&self) -> usize {
        self.spans.max_capacity().saturating_sub(self.spans.capacity())
    }
}

/// What the exporter sends with.
struct Client {
    outlet: Outlet,
    /// Why nothing was answered, in words that the exporter does not pass on.
    failure: Arc<Mutex<Option<String>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl HttpClient for Client {
    fn send_bytes<'life, 'answer>(
        &'life self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'answer>>
    where
        'life: 'answer,
        Self: 'answer,
    {
        Box::pin(async move {
            let answered = (self.outlet.send)(request).await;
            let failure = answered.as_ref().err().cloned();
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = failure;
            Ok(answered?)
        })
    }
}

struct Exporting {
    exporter: SpanExporter,
    spans: mpsc::Receiver<SpanData>,
    dropped: Arc<AtomicU64>,
    failure: Arc<Mutex<Option<String>>>,
    receiver: String,
    settings: TraceSettings,
    is_away: bool,
}

impl Exporting {
    async fn run(mut self, mut stopping: oneshot::Receiver<()>) {
        let most = self.settings.export_max;
        loop {
            let mut spans = Vec::new();
            let is_over = tokio::select! {
                biased;
                _ = &mut stopping => true,
                taken = self.spans.recv_many(&mut spans, most) => taken == 0,
            };
            let is_over = is_over || self.fill(&mut spans, &mut stopping).await;
            self.export(spans).await;
            if is_over {
                break;
            }
        }
        loop {
            let mut spans = Vec::new();
            while spans.len() < most
                && let Ok(span) = self.spans.try_recv()
            {
                spans.push(span);
            }
            if spans.is_empty() {
                return;
            }
            self.export(spans).await;
        }
    }

    /// Waits for more, up to a full export; says whether the program stops.
    async fn fill(&mut self, spans: &mut Vec<SpanData>, stopping: &mut oneshot::Receiver<()>) -> bool {
        let until = Instant::now() + self.settings.export_interval;
        while let missing @ 1.. = self.settings.export_max.saturating_sub(spans.len()) {
            tokio::select! {
                biased;
                _ = &mut *stopping => return true,
                () = sleep_until(until) => return false,
                taken = self.spans.recv_many(spans, missing) => if taken == 0 {
                    return true;
                },
            }
        }
        false
    }

    async fn export(&mut self, spans: Vec<SpanData>) {
        tell(SpanFate::Dropped, self.dropped.swap(0, Ordering::Relaxed));
        let count = u64::try_from(spans.len()).unwrap_or(u64::MAX);
        if count == 0 {
            return;
        }
        let within = self.settings.export_timeout;
        let exported = match timeout(within, self.exporter.export(spans)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
                Err(failure.unwrap_or_else(|| error.to_string()))
            }
            Err(_) => Err(format!("no answer within {within:?}")),
        };
        let receiver = self.receiver.as_str();
        let was_away = std::mem::replace(&mut self.is_away, exported.is_err());
        match exported {
            Ok(()) => {
                tell(SpanFate::Exported, count);
                if was_away {
                    Signal::TracesTaken { receiver }.emit();
                }
            }
            Err(error) => {
                tell(SpanFate::Failed, count);
                if !was_away {
                    let error = error.as_str();
                    Signal::TracesRefused { receiver, error }.emit();
                }
            }
        }
    }
}

fn tell(fate: SpanFate, spans: u64) {
    if spans > 0 {
        Signal::Spans { fate, spans }.emit();
    }
}

impl TraceExport {
    /// Exports what waits, as far as there is time. Spans that end later are none.
    pub async fn finish(self) {
        let Self {
            provider,
            stop,
            mut task,
            queue,
            deadline,
        } = self;
        // It ended before where its receiver of stops is gone.
        stop.send(()).ok();
        let finished = timeout(deadline, &mut task).await;
        task.abort();
        // Nothing waits for this: the processor is ours.
        drop(provider.shutdown_with_timeout(Duration::ZERO));
        let left = u64::try_from(queue.waiting()).unwrap_or(u64::MAX);
        if finished.is_err() {
            tell(SpanFate::Dropped, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(variables: &[(&str, &str)]) -> Result<Option<(String, bool)>, String> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(of, _)| *of == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let asked = receiver(&variable)?;
        Ok(asked.map(|receiver| (receiver.address.to_string(), receiver.has_headers)))
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");

    #[test]
    fn they_are_off_unless_a_receiver_is_named() {
        for variables in [
            &[][..],
            &[("OTEL_SERVICE_NAME", "settled"), ("OTEL_TRACES_SAMPLER", "nonsense")],
            &[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")],
            &[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert_eq!(asked(variables), Ok(None), "{variables:?}");
        }
        let general = Ok(Some(("http://collector:4318/".to_owned(), false)));
        for variables in [
            &[ENDPOINT][..],
            &[ENDPOINT, ("OTEL_SDK_DISABLED", "false")],
            &[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")],
            &[ENDPOINT, ("OTEL_EXPORTER_OTLP_COMPRESSION", "none")],
            &[ENDPOINT, ("OTEL_TRACES_EXPORTER", "otlp")],
            &[ENDPOINT, ("OTEL_TRACES_SAMPLER", "always_off")],
            &[
                ENDPOINT,
                ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
                ("OTEL_TRACES_SAMPLER_ARG", "0.01"),
            ],
        ] {
            assert_eq!(asked(variables), general, "{variables:?}");
        }
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces:4318/here");
        let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=x");
        let expected = Ok(Some(("https://traces:4318/here".to_owned(), true)));
        assert_eq!(asked(&[ENDPOINT, own, headers]), expected);
    }

    #[test]
    fn what_is_wrong_is_said_and_repeats_no_secret() {
        for (variables, sentence) in [
            (
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")][..],
                "must be a URL",
            ),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector")], "must be a URL"),
            (
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://ann:hunter2@collector:4318")],
                "with no user in it",
            ),
            (
                &[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")],
                "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf",
            ),
            (
                &[ENDPOINT, ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "gzip")],
                "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION must be none",
            ),
            (&[ENDPOINT, ("OTEL_TRACES_EXPORTER", "zipkin")], "must be otlp"),
            (&[ENDPOINT, ("OTEL_TRACES_SAMPLER", "some")], "must be one of always_on"),
            (
                &[ENDPOINT, ("OTEL_TRACES_SAMPLER", "traceidratio")],
                "a number from 0 to 1",
            ),
            (
                &[
                    ENDPOINT,
                    ("OTEL_TRACES_SAMPLER", "traceidratio"),
                    ("OTEL_TRACES_SAMPLER_ARG", "1%"),
                ],
                "a number from 0 to 1",
            ),
        ] {
            let said = asked(variables).expect_err("wrong");
            assert!(said.contains(sentence) && !said.contains("hunter2"), "{said}");
        }
    }
}
