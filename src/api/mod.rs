//! The public API over HTTP: partners send updates and see what became of them, clients see their allocations. Whoever asks has
//! a token of its enterprise; an update goes the way of every update, through the queue and the worker.

mod access;
mod answer;
mod line;
mod outcome;
mod places;
mod reads;
mod updates;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{Path, RawQuery, State, rejection::PathRejection},
    response::Response,
    routing::{MethodRouter, get, put},
};
use hyper::{StatusCode, http::HeaderValue};
use tokio::sync::watch;
use uuid::Uuid;

use self::{
    access::{Asker, UnknownTokens, too_many},
    answer::{ApiRefused, REQUEST_ID, text_of},
    line::Line,
    outcome::UpdatesWaiting,
    places::{CallKind, NoShare, Places},
    reads::ListParameters,
};
use crate::{
    broker::BrokerSettings,
    config::{ApiSettings, ConfigError, HttpSettings, Settings},
    desk::{Desk, OwnedBy, Refusal, RefusalKind, Role},
    domain::allocation::Kind,
    health::Health,
    http::{
        self, HttpError, Pieces,
        door::{ConnectionBounds, Connections},
        rates::{REMEMBERED_MAX, Rates},
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
/// How often the database is looked at for readiness, and for the tokens that there are.
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
    rates: Rates<Uuid>,
    strangers: Arc<UnknownTokens>,
    places: Places,
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
    let strangers = Arc::new(UnknownTokens::new(api));
    // An older or newer schema does not pass by waiting; a database that is away does.
    let looked = async {
        desk.check_schema().await?;
        look_up_tokens(&desk, &strangers).await
    };
    match looked.await {
        Err(refusal) if refusal.kind != RefusalKind::Away => return Err(Failure::Desk(refusal)),
        Ok(()) | Err(_) => {}
    }
    let (stopper, stop) = watch::channel(false);
    let health = Arc::new(Health::new());
    // What the worker counts consumers by; here the line to the broker says whether it is up.
    health.consumer_attached(true);
    let waiting = UpdatesWaiting::default();
    let login = broker.login();
    // All that a request may take, one thing after the other: its body, the broker's confirm, what becomes of it, and the rest.
    let in_hand = api.body_timeout + broker.publish_deadline + api.wait + api.answer_timeout;
    let line = Line::open(
        (broker, api.refusals_max),
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
        tokio::spawn(http::tell_readiness(Arc::clone(&health), stop.clone()));
    }
    let (listener, address) = http::bind(api.listen)
        .await
        .map_err(|error| Failure::Http(error.of("api.listen", "SETTLED_API__LISTEN")))?;
    let door = Arc::new(Connections::new(ConnectionBounds {
        connections: api.connections_max,
        per_address: api.connections_per_address_max,
        head: api.head_timeout,
        idle: api.idle_timeout,
        answer: in_hand,
    }));
    tokio::spawn(look_at(
        (desk.clone(), Arc::clone(&strangers)),
        Arc::clone(&health),
        Backoff::new(&settings.retry),
        stop.clone(),
    ));
    let site = Arc::new(Site {
        desk,
        line,
        waiting,
        rates: Rates::default(),
        strangers,
        places: Places::new(api),
        login,
        settings: api.clone(),
    });
    let served = Served {
        door: Arc::clone(&door),
        routes: routes(site),
        tls: tls.clone(),
        last_words: in_hand,
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
        () = tokio::time::sleep(in_hand) => {}
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

/// Looks which tokens there are.
async fn look_up_tokens(desk: &Desk, strangers: &UnknownTokens) -> Result<(), Refusal> {
    strangers.know_all(desk.valid_tokens(REMEMBERED_MAX).await?);
    Ok(())
}

/// Keeps readiness and the tokens up to date with the database.
async fn look_at(
    (desk, strangers): (Desk, Arc<UnknownTokens>),
    health: Arc<Health>,
    mut backoff: Backoff,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let looked = async {
            desk.check_schema_is_not_older().await?;
            look_up_tokens(&desk, &strangers).await
        };
        let wait = match looked.await {
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
                        health.set_paused_by(SCHEMA, Some(refusal.message.clone()));
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

/// What is asked, and of whom.
#[derive(Clone, Copy)]
struct Call {
    route: ApiRoute,
    role: Role,
    work: CallKind,
    request: Uuid,
}

impl Call {
    fn new(route: ApiRoute, role: Role, work: CallKind) -> Self {
        let request = Uuid::new_v4();
        Self {
            route,
            role,
            work,
            request,
        }
    }
}

impl Site {
    /// The same for what asks the database or the broker: for who may ask, and so many at once.
    async fn answer<P, W>(
        &self,
        call: Call,
        asker: &Asker,
        path: Result<(String, P), PathRejection>,
        work: impl FnOnce(String, P) -> W,
    ) -> Response
    where
        W: Future<Output = Result<Response, ApiRefused>>,
    {
        let bounded = async {
            let full = || ApiRefused::unavailable("too many requests are in hand: send it again", 1).hang_up();
            let place = self.places.take().ok_or_else(full)?;
            let admitted = async {
                let (enterprise_id, rest) = spoken(path)?;
                self.admit(asker, &enterprise_id, call.role).await?;
                let share = self
                    .places
                    .share(&enterprise_id, call.work)
                    .map_err(|none| match none {
                        NoShare::Enterprise => {
                            too_many("too many requests of this enterprise are in hand: send it again")
                        }
                        NoShare::Updates => full(),
                    })?;
                Ok((enterprise_id, rest, share))
            };
            let (enterprise_id, rest, share) = admitted.await.map_err(|refused: ApiRefused| match call.work {
                CallKind::Read => refused,
                // Its body is not read: what comes of it is not the next request.
                CallKind::Update => refused.hang_up(),
            })?;
            let response = work(enterprise_id, rest).await?;
            Ok(response.map(|body| Body::new(Pieces::of(body, (place, share)))))
        };
        answered(call.route, call.request, bounded).await
    }
}

/// What stands in a path.
fn spoken<T>(path: Result<T, PathRejection>) -> Result<T, ApiRefused> {
    path.map_err(|_| {
        ApiRefused::invalid("the path can not be read: it must be UTF-8, percent-encoded where it has to be")
    })
}

/// An enterprise, and nothing else.
fn alone(path: Enterprise) -> Result<(String, ()), PathRejection> {
    path.map(|Path(enterprise_id)| (enterprise_id, ()))
}

/// An enterprise, and something of it.
fn with(path: EnterpriseAnd) -> Result<(String, String), PathRejection> {
    path.map(|Path(both)| both)
}

async fn update_allocation(State(site): Here, path: Enterprise, asker: Asker, body: Body) -> Response {
    update(
        &site,
        (ApiRoute::UpdateAllocation, Kind::Allocation),
        path,
        &asker,
        body,
    )
    .await
}

async fn update_deallocation(State(site): Here, path: Enterprise, asker: Asker, body: Body) -> Response {
    let kind = (ApiRoute::UpdateDeallocation, Kind::Deallocation);
    update(&site, kind, path, &asker, body).await
}

async fn update(site: &Site, (route, kind): (ApiRoute, Kind), path: Enterprise, asker: &Asker, body: Body) -> Response {
    let call = Call::new(route, Role::Partner, CallKind::Update);
    let work = |enterprise_id: String, ()| async move {
        let answer = updates::put(site, (&enterprise_id, kind), call.request, &asker.headers, body).await;
        asker.pulse.iter().for_each(|pulse| pulse.has_all());
        answer
    };
    site.answer(call, asker, alone(path), work).await
}

/// A list, whose parameters stand in the query and in the body.
async fn listed(
    site: &Site,
    call: Call,
    (path, RawQuery(query), asker, body): (Enterprise, RawQuery, Asker, Body),
    read: impl AsyncFnOnce(&str, &ListParameters) -> Result<Response, ApiRefused>,
) -> Response {
    let (query, pulse) = (query.as_deref(), &asker.pulse);
    let work = |enterprise_id: String, ()| async move {
        let body = site.whole(body).await?;
        pulse.iter().for_each(|pulse| pulse.has_all());
        let parameters = ListParameters::read(query, &body)?;
        read(&enterprise_id, &parameters).await
    };
    site.answer(call, &asker, alone(path), work).await
}

async fn partner_allocations(
    State(site): Here,
    path: Enterprise,
    query: RawQuery,
    asker: Asker,
    body: Body,
) -> Response {
    let call = Call::new(ApiRoute::PartnerAllocations, Role::Partner, CallKind::Read);
    let read =
        async |id: &str, parameters: &ListParameters| reads::allocations(&site, OwnedBy::Partner(id), parameters).await;
    listed(&site, call, (path, query, asker, body), read).await
}

async fn partner_allocation(State(site): Here, path: EnterpriseAnd, asker: Asker) -> Response {
    let site = &site;
    let call = Call::new(ApiRoute::PartnerAllocation, Role::Partner, CallKind::Read);
    let work = |enterprise_id: String, id: String| async move {
        reads::allocation(site, OwnedBy::Partner(&enterprise_id), &id).await
    };
    site.answer(call, &asker, with(path), work).await
}

async fn partner_balances(State(site): Here, path: Enterprise, query: RawQuery, asker: Asker, body: Body) -> Response {
    let call = Call::new(ApiRoute::PartnerBalances, Role::Partner, CallKind::Read);
    let read = async |id: &str, parameters: &ListParameters| reads::balances(&site, id, parameters).await;
    listed(&site, call, (path, query, asker, body), read).await
}

async fn client_allocations(
    State(site): Here,
    path: Enterprise,
    query: RawQuery,
    asker: Asker,
    body: Body,
) -> Response {
    let call = Call::new(ApiRoute::ClientAllocations, Role::Client, CallKind::Read);
    let read =
        async |id: &str, parameters: &ListParameters| reads::allocations(&site, OwnedBy::Client(id), parameters).await;
    listed(&site, call, (path, query, asker, body), read).await
}

async fn client_allocation(State(site): Here, path: EnterpriseAnd, asker: Asker) -> Response {
    let site = &site;
    let call = Call::new(ApiRoute::ClientAllocation, Role::Client, CallKind::Read);
    let work = |enterprise_id: String, id: String| async move {
        reads::allocation(site, OwnedBy::Client(&enterprise_id), &id).await
    };
    site.answer(call, &asker, with(path), work).await
}

async fn receipt(State(site): Here, path: EnterpriseAnd, asker: Asker) -> Response {
    let site = &site;
    let call = Call::new(ApiRoute::Receipt, Role::Partner, CallKind::Read);
    let work = |enterprise_id: String, nonce: String| async move { reads::receipt(site, &enterprise_id, &nonce).await };
    site.answer(call, &asker, with(path), work).await
}

async fn receipt_by_query(State(site): Here, path: Enterprise, RawQuery(query): RawQuery, asker: Asker) -> Response {
    let (site, query) = (&site, query.as_deref());
    let call = Call::new(ApiRoute::Receipt, Role::Partner, CallKind::Read);
    let work = |id: String, ()| async move {
        let nonce = reads::nonce_of(query)?;
        reads::receipt(site, &id, &nonce).await
    };
    site.answer(call, &asker, alone(path), work).await
}

async fn openapi() -> Response {
    answered(ApiRoute::Openapi, Uuid::new_v4(), async {
        Ok(text_of(StatusCode::OK, OPENAPI))
    })
    .await
}
