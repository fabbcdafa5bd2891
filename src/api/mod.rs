//! The public API over HTTP: partners send updates and see what became of them, clients see their allocations. Whoever asks has
//! a token of its enterprise; an update goes the way of every update, through the queue and the worker.

mod access;
mod answer;
mod line;
mod outcome;
mod reads;
mod updates;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, RawQuery, State, rejection::PathRejection},
    response::Response,
    routing::{MethodRouter, get, put},
};
use hyper::{HeaderMap, StatusCode, http::HeaderValue};
use tokio::sync::{Semaphore, watch};
use uuid::Uuid;

use self::{
    access::Rates,
    answer::{ApiRefused, REQUEST_ID, text_of},
    line::Line,
    outcome::UpdatesWaiting,
};
use crate::{
    broker::BrokerSettings,
    config::{ApiSettings, ConfigError, HttpSettings, Settings},
    desk::{Desk, OwnedBy, Refusal, RefusalKind, Role},
    domain::allocation::Kind,
    health::Health,
    http::{
        self, HttpError,
        door::{ConnectionBounds, Connections, Pulse},
        server::Served,
    },
    retry::{Backoff, Waited},
    telemetry::{self, ApiRoute, Dependency, Signal},
    tls::ListenerFiles,
    worker::Signals,
};

/// What can be asked, in OpenAPI 3.1.
pub const OPENAPI: &str = include_str!("../../docs/openapi.json");
/// Where that is answered.
const OPENAPI_PATH: &str = "/openapi.json";
/// How often the database is looked at for readiness.
const LOOK: Duration = Duration::from_secs(5);
/// Who pauses, as readiness tells it.
const SCHEMA: &str = "schema";

/// Why the API can not run. Nothing that passes by waiting.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A setting is missing.
    #[error("{}", .0.message())]
    Config(ConfigError),
    /// A setting is wrong.
    #[error("{0}")]
    Setting(String),
    /// An address can not be had.
    #[error("{}", .0.message())]
    Http(HttpError),
    /// The desk can not be opened, or the schema is another.
    #[error("{}", .0.message)]
    Desk(Refusal),
    #[error("{0}")]
    Ours(String),
}

/// What answers are made of.
struct Site {
    desk: Desk,
    settings: ApiSettings,
    line: Line,
    waiting: UpdatesWaiting,
    rates: Rates,
    /// A place for each request in hand.
    places: Semaphore,
    /// As whom we publish.
    login: Option<String>,
}

/// Answers until SIGTERM or SIGINT, and then finishes what is in hand.
///
/// # Errors
/// What waiting can not mend.
pub async fn run(settings: &Settings) -> Result<(), Failure> {
    let metrics = telemetry::install_metrics();
    let api = &settings.api;
    let tls = encryption(api)?;
    let desk = Desk::open(settings).map_err(Failure::Desk)?;
    let broker = BrokerSettings::from_settings(settings).map_err(Failure::Config)?;
    broker.check().map_err(|error| Failure::Setting(error.to_string()))?;
    let mut signals = Signals::new().map_err(|error| Failure::Ours(format!("signals can not be caught: {error}")))?;
    // An older or newer schema does not pass by waiting; a database that is away does.
    match desk.check_schema().await {
        Err(refusal) if refusal.kind != RefusalKind::Away => return Err(Failure::Desk(refusal)),
        Ok(()) | Err(_) => {}
    }
    let (stopper, stop) = watch::channel(false);
    let health = Arc::new(Health::new());
    // What the worker counts consumers by; here the line to the broker says whether it is up.
    health.consumer_attached(true);
    let waiting = UpdatesWaiting::default();
    let login = broker.login();
    let line = Line::open(
        broker,
        &settings.retry,
        waiting.clone(),
        Arc::clone(&health),
        stop.clone(),
    );
    if let Some(listen) = api.watch_listen {
        let watch = HttpSettings {
            listen,
            ..settings.http.clone()
        };
        http::serve(&watch, Arc::clone(&health), metrics, stop.clone())
            .await
            .map_err(|error| Failure::Http(error.of("api.watch_listen", "SETTLED_API__WATCH_LISTEN")))?;
    }
    let (listener, address) = http::bind(api.listen)
        .await
        .map_err(|error| Failure::Http(error.of("api.listen", "SETTLED_API__LISTEN")))?;
    let door = Arc::new(Connections::new(ConnectionBounds {
        connections: api.connections_max,
        per_address: api.connections_per_address_max,
        head: api.head_timeout,
        idle: api.idle_timeout,
        answer: api.body_timeout + api.wait + api.answer_timeout,
    }));
    tokio::spawn(look_at(
        desk.clone(),
        Arc::clone(&health),
        Backoff::new(&settings.retry),
        stop.clone(),
    ));
    let site = Arc::new(Site {
        desk,
        line,
        waiting,
        rates: Rates::default(),
        places: Semaphore::new(api.requests_max),
        login,
        settings: api.clone(),
    });
    let last_words = api.body_timeout + api.wait;
    let served = Served {
        door: Arc::clone(&door),
        routes: routes(site),
        tls: tls.clone(),
        last_words,
    };
    let (accept_stopper, accept_stop) = watch::channel(false);
    tokio::spawn(served.accept(listener, accept_stop));
    Signal::ApiListening {
        address,
        encrypted: tls.is_some(),
        version: env!("CARGO_PKG_VERSION"),
    }
    .emit();
    let name = signals.next().await;
    Signal::Stopping { why: name }.emit();
    // First nobody new, and those in hand are finished; the line to the broker is needed for that.
    accept_stopper.send_replace(true);
    tokio::select! {
        () = door.empty() => {}
        () = tokio::time::sleep(last_words) => {}
        _ = signals.next() => {}
    }
    stopper.send_replace(true);
    Signal::Stopped.emit();
    Ok(())
}

/// Whether it speaks TLS; on another address than loopback it must.
fn encryption(api: &ApiSettings) -> Result<Option<Arc<ListenerFiles>>, Failure> {
    let files = (api.certificate_file.as_deref(), api.key_file.as_deref());
    match ListenerFiles::read("api", files.0, files.1, None).map_err(|error| Failure::Setting(error.to_string()))? {
        None if !api.listen.ip().to_canonical().is_loopback() => Err(Failure::Setting(format!(
            "api.listen is {}, which others can reach, and there is no TLS: tokens would go in the clear. Set \
             api.certificate_file and api.key_file, or listen on loopback behind a proxy that speaks TLS",
            api.listen
        ))),
        files => Ok(files.map(Arc::new)),
    }
}

/// Keeps readiness up to date with the database.
async fn look_at(desk: Desk, health: Arc<Health>, mut backoff: Backoff, mut stop: watch::Receiver<bool>) {
    loop {
        let wait = match desk.check_schema().await {
            Ok(()) => {
                backoff.reset();
                health.set_paused_by(SCHEMA, None);
                health.set_database_ok(true);
                LOOK
            }
            Err(refusal) => {
                let wait = backoff.next();
                match refusal.kind {
                    RefusalKind::Away => health.set_database_ok(false),
                    RefusalKind::Refused | RefusalKind::Usage | RefusalKind::Ours | RefusalKind::Right => {
                        let why = "the database's schema is not the one that this program is written for";
                        health.set_paused_by(SCHEMA, Some(why.to_owned()));
                    }
                }
                Signal::Retrying {
                    dependency: Dependency::Database,
                    attempt: backoff.attempts(),
                    wait,
                    error: &refusal.message,
                }
                .emit();
                wait
            }
        };
        if crate::retry::sleep(wait, &mut stop).await == Waited::Stopping {
            return;
        }
    }
}

type Here = State<Arc<Site>>;
type Enterprise = Result<Path<String>, PathRejection>;
type EnterpriseAnd = Result<Path<(String, String)>, PathRejection>;

fn routes(site: Arc<Site>) -> Router {
    let root = |rest: &str| format!("{}/{{enterpriseId}}/{rest}", reads::ROOT);
    let only = |methods: MethodRouter<Arc<Site>>, allowed: &'static str| {
        methods.fallback(async move || {
            answered(ApiRoute::Other, Uuid::new_v4(), async { Err(wrong_method(allowed)) }).await
        })
    };
    Router::new()
        .route(
            &root("partners/allocations"),
            only(get(partner_allocations).put(update_allocation), "GET, HEAD, PUT"),
        )
        .route(&root("partners/deallocations"), only(put(update_deallocation), "PUT"))
        .route(
            &root("partners/allocations/{allocationId}"),
            only(get(partner_allocation), "GET, HEAD"),
        )
        .route(&root("partners/balances"), only(get(partner_balances), "GET, HEAD"))
        .route(&root("clients/allocations"), only(get(client_allocations), "GET, HEAD"))
        .route(
            &root("clients/allocations/{allocationId}"),
            only(get(client_allocation), "GET, HEAD"),
        )
        .route(&root("receipts"), only(get(receipt_by_query), "GET, HEAD"))
        .route(&root("receipts/{nonce}"), only(get(receipt), "GET, HEAD"))
        .route(OPENAPI_PATH, only(get(openapi), "GET, HEAD"))
        .fallback(async || answered(ApiRoute::Other, Uuid::new_v4(), async { Err(nothing_here()) }).await)
        .with_state(site)
}

fn wrong_method(allowed: &'static str) -> ApiRefused {
    let error = format!("only {allowed}");
    ApiRefused::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", error)
        .allow(allowed)
        .hang_up()
}

fn nothing_here() -> ApiRefused {
    ApiRefused::not_found("there is nothing of this path; /openapi.json says what there is").hang_up()
}

/// Answers, with the request's number on it, and says so.
async fn answered(
    route: ApiRoute,
    request: Uuid,
    work: impl Future<Output = Result<Response, ApiRefused>>,
) -> Response {
    let began = Instant::now();
    let done = work.await;
    let ours = done.as_ref().err().and_then(|refused| refused.ours.clone());
    let mut response = done.unwrap_or_else(|refused| refused.answer(request));
    if let Ok(number) = HeaderValue::from_str(&request.to_string()) {
        response.headers_mut().insert(REQUEST_ID, number);
    }
    Signal::ApiAnswered {
        route,
        status: response.status().as_u16(),
        request,
        elapsed: began.elapsed(),
        error: ours.as_deref(),
    }
    .emit();
    response
}

impl Site {
    /// The same for what asks the database or the broker: so many at once.
    async fn answer(
        &self,
        route: ApiRoute,
        request: Uuid,
        work: impl Future<Output = Result<Response, ApiRefused>>,
    ) -> Response {
        let bounded = async {
            let Ok(_place) = self.places.try_acquire() else {
                return Err(ApiRefused::unavailable("too many requests are in hand: send it again", 1).hang_up());
            };
            work.await
        };
        answered(route, request, bounded).await
    }
}

/// What stands in a path.
fn spoken<T>(path: Result<Path<T>, PathRejection>) -> Result<T, ApiRefused> {
    path.map(|Path(parts)| parts).map_err(|_| {
        ApiRefused::invalid("the path can not be read: it must be UTF-8, percent-encoded where it has to be")
    })
}

async fn update_allocation(
    State(site): Here,
    path: Enterprise,
    Extension(pulse): Extension<Arc<Pulse>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    update(
        &site,
        (ApiRoute::UpdateAllocation, Kind::Allocation),
        path,
        &pulse,
        headers,
        body,
    )
    .await
}

async fn update_deallocation(
    State(site): Here,
    path: Enterprise,
    Extension(pulse): Extension<Arc<Pulse>>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    update(
        &site,
        (ApiRoute::UpdateDeallocation, Kind::Deallocation),
        path,
        &pulse,
        headers,
        body,
    )
    .await
}

async fn update(
    site: &Site,
    (route, kind): (ApiRoute, Kind),
    path: Enterprise,
    pulse: &Pulse,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let request = Uuid::new_v4();
    let work = async {
        let enterprise_id = spoken(path)?;
        // Before its body is read: a stranger's is not. What it has sent of it is not the next request.
        site.admit(&headers, &enterprise_id, Role::Partner)
            .await
            .map_err(ApiRefused::hang_up)?;
        let answer = updates::put(site, (&enterprise_id, kind), request, &headers, body).await;
        pulse.has_all();
        answer
    };
    site.answer(route, request, work).await
}

async fn partner_allocations(
    State(site): Here,
    path: Enterprise,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let work = async {
        let enterprise_id = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Partner).await?;
        reads::allocations(&site, OwnedBy::Partner(&enterprise_id), query.as_deref()).await
    };
    site.answer(ApiRoute::PartnerAllocations, Uuid::new_v4(), work).await
}

async fn partner_allocation(State(site): Here, path: EnterpriseAnd, headers: HeaderMap) -> Response {
    let work = async {
        let (enterprise_id, id) = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Partner).await?;
        reads::allocation(&site, OwnedBy::Partner(&enterprise_id), &id).await
    };
    site.answer(ApiRoute::PartnerAllocation, Uuid::new_v4(), work).await
}

async fn partner_balances(
    State(site): Here,
    path: Enterprise,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let work = async {
        let enterprise_id = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Partner).await?;
        reads::balances(&site, &enterprise_id, query.as_deref()).await
    };
    site.answer(ApiRoute::PartnerBalances, Uuid::new_v4(), work).await
}

async fn client_allocations(
    State(site): Here,
    path: Enterprise,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let work = async {
        let enterprise_id = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Client).await?;
        reads::allocations(&site, OwnedBy::Client(&enterprise_id), query.as_deref()).await
    };
    site.answer(ApiRoute::ClientAllocations, Uuid::new_v4(), work).await
}

async fn client_allocation(State(site): Here, path: EnterpriseAnd, headers: HeaderMap) -> Response {
    let work = async {
        let (enterprise_id, id) = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Client).await?;
        reads::allocation(&site, OwnedBy::Client(&enterprise_id), &id).await
    };
    site.answer(ApiRoute::ClientAllocation, Uuid::new_v4(), work).await
}

async fn receipt(State(site): Here, path: EnterpriseAnd, headers: HeaderMap) -> Response {
    let work = async {
        let (enterprise_id, nonce) = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Partner).await?;
        reads::receipt(&site, &enterprise_id, &nonce).await
    };
    site.answer(ApiRoute::Receipt, Uuid::new_v4(), work).await
}

async fn receipt_by_query(
    State(site): Here,
    path: Enterprise,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let work = async {
        let enterprise_id = spoken(path)?;
        site.admit(&headers, &enterprise_id, Role::Partner).await?;
        let nonce = reads::nonce_of(query.as_deref())?;
        reads::receipt(&site, &enterprise_id, &nonce).await
    };
    site.answer(ApiRoute::Receipt, Uuid::new_v4(), work).await
}

async fn openapi() -> Response {
    answered(ApiRoute::Openapi, Uuid::new_v4(), async {
        Ok(text_of(StatusCode::OK, OPENAPI))
    })
    .await
}
