//! The operator's console in the browser: pages on the desk that the command line asks too. Every act is the command's act,
//! writes the same row of the audit, and shows its command line. Forms do everything; scripts only save waiting.

mod access;
mod acts;
mod answer;
mod aside;
mod assets;
mod chart;
mod entry;
mod fields;
mod groups;
mod letter;
mod letters;
mod live;
mod meet;
mod money;
mod overview;
mod partners;
mod plans;
mod routes;
mod runs;
mod sessions;
mod shown;
mod timeline;
mod trail;
mod workers;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::StatusCode;
use tokio::sync::{Semaphore, SemaphorePermit, watch};
use tokio_rustls::TlsAcceptor;

pub use self::{
    access::{ConsoleRole, Needs},
    routes::{ConsoleRoute, table},
};
use self::{
    access::{FrontDoor, Strangers, is_loopback},
    answer::NotDone,
    live::Live,
    runs::Drivers,
    sessions::Sessions,
};
use crate::{
    config::{ConsoleSettings, Settings},
    desk::{Desk, Refusal, RefusalKind},
    http::{
        self, HttpError,
        door::{ConnectionBounds, Connections},
        server::Served,
    },
    telemetry::Signal,
    tls,
    worker::Signals,
};

/// How long what is in hand is waited for when the program stops.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why the console can not run. Nothing that passes by waiting.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleFailure {
    /// A setting is wrong.
    #[error("{0}")]
    Setting(String),
    /// The address can not be had.
    #[error("{}", .0.message())]
    Http(HttpError),
    /// The desk can not be opened, or the schema is another.
    #[error("{}", .0.message)]
    Desk(Refusal),
    #[error("{0}")]
    Ours(String),
}

/// One line of what the doctor finds.
#[derive(Clone, Debug)]
pub struct Examined {
    pub name: String,
    pub ok: bool,
    pub detail: String,
    pub hint: Option<String>,
}

/// Asks the doctor.
pub type Examine = Box<dyn Fn() -> Pin<Box<dyn Future<Output = Vec<Examined>> + Send>> + Send + Sync>;

/// What whoever starts the console is told.
#[derive(Clone, Debug)]
pub enum ConsoleNews {
    /// It listens; people come through the proxy.
    Listens { url: String },
    /// It lets in whoever opens this, once.
    Link { url: String },
}

/// Whoever starts the console, and what it needs of them.
pub struct Starter {
    /// Whom the one-time link lets in.
    pub operator: String,
    pub examine: Examine,
    pub tell: Box<dyn Fn(&ConsoleNews) + Send + Sync>,
}

/// What answers are made of.
struct Site {
    desk: Desk,
    settings: ConsoleSettings,
    door: FrontDoor,
    sessions: Sessions,
    strangers: Strangers,
    live: Arc<Live>,
    drivers: Drivers,
    /// One proof of the books at a time, and one look of the doctor: both ask much.
    long: Semaphore,
    starter: Starter,
    /// Where it is, as a browser on this machine says it.
    base: String,
    encrypted: bool,
}

impl Site {
    /// The place of whoever asks much.
    fn alone(&self) -> Result<SemaphorePermit<'_>, NotDone> {
        self.long.try_acquire().map_err(|_| {
            NotDone::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "somebody else has the books checked, or asks the doctor, just now: ask again in a moment",
            )
        })
    }

    /// Prints another link.
    fn print_link(&self) {
        let FrontDoor::Link(link) = &self.door else { return };
        if let Ok(secret) = link.renew(Instant::now()) {
            let url = format!("{}/enter?link={secret}", self.base);
            (self.starter.tell)(&ConsoleNews::Link { url });
        }
    }
}

/// Answers until SIGTERM or SIGINT; runs that are driven here are cancelled between two messages.
///
/// # Errors
/// What waiting can not mend.
pub async fn run(settings: &Settings, starter: Starter) -> Result<(), ConsoleFailure> {
    let console = &settings.console;
    let door = FrontDoor::of(console, &starter.operator).map_err(ConsoleFailure::Setting)?;
    let tls = encryption(settings)?;
    let desk = Desk::open(settings).map_err(ConsoleFailure::Desk)?;
    let mut signals =
        Signals::new().map_err(|error| ConsoleFailure::Ours(format!("signals can not be caught: {error}")))?;
    // An older or newer schema does not pass by waiting; a database that is away does.
    match desk.check_schema().await {
        Err(refusal) if refusal.kind != RefusalKind::Away => return Err(ConsoleFailure::Desk(refusal)),
        Ok(()) | Err(_) => {}
    }
    let (listener, address) = http::bind(console.listen)
        .await
        .map_err(|error| ConsoleFailure::Http(error.of("console.listen", "SETTLED_CONSOLE__LISTEN")))?;
    let (stopper, stop) = watch::channel(false);
    let connections = Arc::new(Connections::new(ConnectionBounds {
        connections: console.connections_max,
        per_address: console.connections_per_address_max,
        head: console.head_timeout,
        idle: console.idle_timeout,
        answer: console.answer_timeout,
    }));
    let live = Arc::new(Live::new(console));
    let site = Arc::new(Site {
        drivers: Drivers {
            places: Arc::new(Semaphore::new(console.runs_max)),
            stop: stop.clone(),
        },
        door,
        sessions: Sessions::new(console),
        strangers: Strangers::new(console.rate_of_strangers),
        live: Arc::clone(&live),
        long: Semaphore::new(1),
        starter,
        base: url_of(address, tls.is_some()),
        encrypted: tls.is_some(),
        settings: console.clone(),
        desk,
    });
    tokio::spawn(live::poll(Arc::clone(&site), stop.clone()));
    let served = Served {
        door: Arc::clone(&connections),
        routes: routes::routes(Arc::clone(&site)),
        tls: tls.clone(),
        last_words: Duration::from_secs(1),
    };
    tokio::spawn(served.accept(listener, stop));
    Signal::ConsoleListening {
        address,
        encrypted: tls.is_some(),
        version: env!("CARGO_PKG_VERSION"),
    }
    .emit();
    match &site.door {
        FrontDoor::Link(_) => site.print_link(),
        FrontDoor::Proxy(_) => (site.starter.tell)(&ConsoleNews::Listens { url: site.base.clone() }),
    }
    let name = signals.next().await;
    Signal::Stopping { why: name }.emit();
    stopper.send_replace(true);
    tokio::select! {
        () = async { tokio::join!(connections.empty(), site.drivers.empty(console.runs_max)); } => {}
        () = tokio::time::sleep(LAST_WORDS) => {}
        _ = signals.next() => {}
    }
    Signal::Stopped.emit();
    Ok(())
}

/// As a browser on this machine says it.
fn url_of(address: SocketAddr, encrypted: bool) -> String {
    let scheme = if encrypted { "https" } else { "http" };
    format!("{scheme}://{address}")
}

/// Whether it speaks TLS; on another address than loopback it must, unless the network itself is trusted.
fn encryption(settings: &Settings) -> Result<Option<TlsAcceptor>, ConsoleFailure> {
    let console = &settings.console;
    match (&console.certificate_file, &console.key_file) {
        (Some(certificate), Some(key)) => {
            let config = tls::server_config(certificate, key).map_err(ConsoleFailure::Setting)?;
            Ok(Some(TlsAcceptor::from(Arc::new(config))))
        }
        (None, None) if is_loopback(console.listen) || settings.allow_plaintext => Ok(None),
        (None, None) => Err(ConsoleFailure::Setting(format!(
            "console.listen is {}, which others can reach, and there is no TLS: the proxy's secret would go in the clear. Set \
             console.certificate_file and console.key_file, or, where the network itself is trusted, allow_plaintext = true",
            console.listen
        ))),
        (Some(_), None) => Err(ConsoleFailure::Setting(
            "console.certificate_file is set and console.key_file is not: set both, or none".to_owned(),
        )),
        (None, Some(_)) => Err(ConsoleFailure::Setting(
            "console.key_file is set and console.certificate_file is not: set both, or none".to_owned(),
        )),
    }
}
