//! The operator's console in the browser: pages on the desk that the command line asks too. Every act is the command's act,
//! writes the same row of the audit, and shows its command line. Forms do everything; scripts only save waiting.

mod access;
mod acts;
mod again;
mod answer;
mod aside;
mod ask;
mod assets;
mod beside;
mod chart;
mod doctor;
mod entry;
mod export;
mod fields;
mod frame;
mod groups;
mod instead;
mod issuer;
mod letter;
mod letters;
mod live;
mod looks;
mod meet;
mod money;
mod overview;
mod partners;
mod people;
mod plans;
mod proof;
mod routes;
mod runs;
mod sessions;
mod shared;
mod shown;
mod timeline;
mod traffic;
mod trail;
mod who;
mod workers;

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
};

use self::{
    access::{FrontDoor, Strangers, is_loopback},
    doctor::Examinations,
    issuer::public_url,
    live::Live,
    proof::Proofs,
    runs::{Drivers, WatchedRuns},
    sessions::Sessions,
};
pub use self::{
    beside::{Beside, beside},
    routes::{ConsoleRoute, table},
    who::{ConsoleRole, Needs},
};
use crate::{
    config::{ConsoleSettings, Settings},
    desk::{Desk, Refusal, RefusalKind},
    http::{
        self, HttpError,
        door::{ConnectionBounds, Connections},
        server::Served,
    },
    retry::stopped,
    telemetry::Signal,
    tls::{Callers, ListenerFiles},
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

/// A part of what the doctor looks at: what is away keeps nobody from seeing the others.
pub struct ExaminedPart {
    pub name: &'static str,
    pub look: Pin<Box<dyn Future<Output = Vec<Examined>> + Send>>,
}

/// Asks the doctor.
pub type Examine = Box<dyn Fn() -> Vec<ExaminedPart> + Send + Sync>;

/// What whoever starts the console is told.
#[derive(Clone, Debug)]
pub enum ConsoleNews {
    /// It listens; a proxy or an issuer signs people in.
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
    watched: WatchedRuns,
    proofs: Proofs,
    examined: Examinations,
    starter: Starter,
    /// Where it is, as a browser on this machine says it.
    base: String,
    /// Whether browsers reach it by TLS alone.
    secure: bool,
}

impl Site {
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
    let mut signals =
        Signals::new().map_err(|error| ConsoleFailure::Ours(format!("signals can not be caught: {error}")))?;
    let opened = Opened::new(settings, starter).await?;
    let (stopper, stop) = watch::channel(false);
    let serving = opened.serve(stop);
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => {}
        name = signals.next() => {
            Signal::Stopping { why: name }.emit();
            stopper.send_replace(true);
            tokio::select! {
                () = serving => {}
                _ = signals.next() => {}
            }
        }
    }
    Signal::Stopped.emit();
    Ok(())
}

/// A console that has its address, and answers nobody yet.
struct Opened {
    site: Site,
    listener: TcpListener,
    address: SocketAddr,
    tls: Option<Arc<ListenerFiles>>,
    connections: ConnectionBounds,
}

impl Opened {
    async fn new(settings: &Settings, starter: Starter) -> Result<Self, ConsoleFailure> {
        let console = &settings.console;
        let door = FrontDoor::of(settings, &starter.operator).map_err(ConsoleFailure::Setting)?;
        let tls = encryption(settings)?;
        let desk = Desk::open(settings).map_err(ConsoleFailure::Desk)?;
        // An older or newer schema does not pass by waiting; a database that is away does.
        match desk.check_schema().await {
            Err(refusal) if refusal.kind != RefusalKind::Away => return Err(ConsoleFailure::Desk(refusal)),
            Ok(()) | Err(_) => {}
        }
        let (listener, address) = http::bind(console.listen)
            .await
            .map_err(|error| ConsoleFailure::Http(error.of("console.listen", "SETTLED_CONSOLE__LISTEN")))?;
        let base = match &door {
            FrontDoor::Issuer(_) => public_url(console).to_owned(),
            FrontDoor::Link(_) | FrontDoor::Proxy(_) => url_of(address, tls.is_some()),
        };
        Ok(Self {
            site: Site {
                // Whoever serves says when it stops.
                drivers: Drivers {
                    places: Arc::new(Semaphore::new(console.runs_max)),
                    stop: watch::channel(false).1,
                },
                door,
                sessions: Sessions::new(console),
                strangers: Strangers::new(console),
                live: Arc::new(Live::new(&desk, console)),
                watched: WatchedRuns::default(),
                proofs: Proofs::default(),
                examined: Examinations::default(),
                starter,
                secure: base.starts_with("https://"),
                base,
                settings: console.clone(),
                desk,
            },
            listener,
            address,
            tls,
            connections: ConnectionBounds {
                connections: console.connections_max,
                per_address: console.connections_per_address_max,
                head: console.head_timeout,
                idle: console.idle_timeout,
                answer: console.answer_timeout,
            },
        })
    }

    /// Answers until it is told to stop, and a little longer, for what is in hand.
    async fn serve(mut self, mut stop: watch::Receiver<bool>) {
        self.site.drivers.stop = stop.clone();
        let site = Arc::new(self.site);
        let connections = Arc::new(Connections::new(self.connections));
        let is_encrypted = self.tls.is_some();
        tokio::spawn(live::poll(Arc::clone(&site), stop.clone()));
        let served = Served {
            door: Arc::clone(&connections),
            routes: meet::router(Arc::clone(&site)),
            tls: self.tls,
            last_words: Duration::from_secs(1),
        };
        tokio::spawn(served.accept(self.listener, stop.clone()));
        Signal::ConsoleListening {
            address: self.address,
            encrypted: is_encrypted,
            version: env!("CARGO_PKG_VERSION"),
        }
        .emit();
        match &site.door {
            FrontDoor::Link(_) => site.print_link(),
            FrontDoor::Proxy(_) | FrontDoor::Issuer(_) => {
                (site.starter.tell)(&ConsoleNews::Listens { url: site.base.clone() });
            }
        }
        stopped(&mut stop).await;
        let most = site.settings.runs_max;
        let in_hand = async { tokio::join!(connections.empty(), site.drivers.empty(most)) };
        drop(tokio::time::timeout(LAST_WORDS, in_hand).await);
    }
}

/// As a browser on this machine says it.
fn url_of(address: SocketAddr, encrypted: bool) -> String {
    let scheme = if encrypted { "https" } else { "http" };
    format!("{scheme}://{address}")
}

/// Whether it speaks TLS; on another address than loopback it must, unless the network itself is trusted.
fn encryption(settings: &Settings) -> Result<Option<Arc<ListenerFiles>>, ConsoleFailure> {
    let console = &settings.console;
    let files = (console.certificate_file.as_deref(), console.key_file.as_deref());
    let callers = console.proxy_ca_file.as_ref().map(|ca_file| Callers {
        ca_file: ca_file.clone(),
        names: console.proxy_names.clone(),
    });
    let asks = callers.is_some();
    match ListenerFiles::read("console", files.0, files.1, callers)
        .map_err(|error| ConsoleFailure::Setting(error.to_string()))?
    {
        None if asks => Err(ConsoleFailure::Setting(
            "console.proxy_ca_file is set, and there is no TLS in which a proxy could show its certificate: set \
             console.certificate_file and console.key_file"
                .to_owned(),
        )),
        None if !is_loopback(console.listen) && !settings.allow_plaintext => Err(ConsoleFailure::Setting(format!(
            "console.listen is {}, which others can reach, and there is no TLS: secrets and sessions would go in the clear. Set \
             console.certificate_file and console.key_file, or, where the network itself is trusted, allow_plaintext = true",
            console.listen
        ))),
        files => Ok(files.map(Arc::new)),
    }
}
