//! A request, from the door to its page: who asks, whether they may, what they sent.

use std::{net::IpAddr, sync::Arc, time::Instant};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Request, State},
    response::Response,
    routing::{MethodFilter, MethodRouter},
};
use hyper::{
    HeaderMap, StatusCode, Version,
    header::{CONTENT_TYPE, HOST},
};

use super::{
    Site,
    access::{ASKED_COOKIE, COOKIE_NAME, FrontDoor, WAY_COOKIE, cookie},
    acts,
    answer::{NotDone, again_after, see},
    aside,
    ask::Ask,
    assets, doctor, entry,
    fields::Fields,
    frame::barred,
    groups, letter, letters, live, money, overview, partners, plans, proof,
    routes::{Method, RouteLine, Screen, TABLE},
    runs,
    sessions::{ByName, Found, Viewer, is_same},
    timeline, trail,
    who::{LetIn, Needs, WayIn},
};
use crate::{desk::PartnerAct, http::door::Pulse, telemetry::Signal};

impl Site {
    /// Answers a request. What came with it is read before a page takes a thread: whoever is slow takes none.
    pub(super) async fn meet(self: &Arc<Self>, line: RouteLine, request: Request) -> Response {
        let began = Instant::now();
        let from = request
            .extensions()
            .get::<Arc<Pulse>>()
            .map_or(IpAddr::from([0, 0, 0, 0]), |pulse| pulse.network);
        let let_in = self.let_in(&line, &request, from);
        let response = match let_in {
            Err(refused) => refused,
            Ok(viewer) => self.answer(line, viewer, request).await,
        };
        Signal::ConsoleAnswered {
            path: line.path,
            status: response.status().as_u16(),
            elapsed: began.elapsed(),
        }
        .emit();
        response
    }

    /// Who asks; none: somebody who is not signed in.
    #[expect(clippy::result_large_err, reason = "an answer is what it is")]
    fn let_in(&self, line: &RouteLine, request: &Request, from: IpAddr) -> Result<Option<Viewer>, Response> {
        let headers = request.headers();
        let now = Instant::now();
        // Being watched live is not being used.
        let counts = line.screen != Screen::Live;
        let entrance = match &self.door {
            FrontDoor::Proxy(proxy) => {
                return match proxy.admit(headers) {
                    Ok(let_in) => self.through_proxy(line, let_in, is_meant(line, request), now),
                    Err(why) => {
                        self.as_stranger(from, now)?;
                        match line.needs {
                            Needs::Nobody => Ok(None),
                            Needs::Look(_) | Needs::Change(_) => Err(self.not_let_in(&why)),
                        }
                    }
                };
            }
            // A page of another name that leads here is none of ours.
            FrontDoor::Link(_) if !is_named_loopback(headers) => {
                return Err(self.message(
                    StatusCode::MISDIRECTED_REQUEST,
                    "Not here",
                    "this console answers by its address on this machine only",
                    None,
                ));
            }
            FrontDoor::Link(_) => WayIn::Link,
            FrontDoor::Issuer(_) => WayIn::Issuer,
        };
        let found =
            cookie(headers, COOKIE_NAME).map_or(Found::Nobody, |cookie| self.sessions.find(cookie, counts, now));
        match found {
            Found::Viewer(viewer) if viewer.entrance == entrance => Ok(Some(viewer)),
            Found::TooOften => Err(again_after(self.too_often("this session asks too often"), 1)),
            Found::Viewer(_) | Found::Nobody => self.as_stranger(from, now).map(|()| None),
        }
    }

    #[expect(clippy::result_large_err, reason = "an answer is what it is")]
    fn as_stranger(&self, from: IpAddr, now: Instant) -> Result<(), Response> {
        if self.strangers.take(from, now) {
            return Ok(());
        }
        let why = "who is not signed in asks too often from your address, or from everywhere";
        Err(again_after(self.too_often(why), 1))
    }

    /// The session of whom the proxy names.
    #[expect(clippy::result_large_err, reason = "an answer is what it is")]
    fn through_proxy(
        &self,
        line: &RouteLine,
        let_in: LetIn,
        signs_in: bool,
        now: Instant,
    ) -> Result<Option<Viewer>, Response> {
        if signs_in {
            self.sessions.welcome(&let_in.name);
        }
        let named = self
            .sessions
            .of_name(let_in, line.screen != Screen::Live, now)
            .map_err(|why| self.message(StatusCode::INTERNAL_SERVER_ERROR, "Not now", &why, None))?;
        match named {
            ByName::Viewer(viewer, is_new) => {
                if is_new {
                    Signal::ConsoleSignedIn {
                        name: &viewer.name,
                        role: viewer.role.as_str(),
                        entrance: viewer.entrance.as_str(),
                    }
                    .emit();
                }
                Ok(Some(viewer))
            }
            ByName::TooOften => Err(again_after(self.too_often("you ask too often"), 1)),
            ByName::KeptOut(..) if line.needs == Needs::Nobody => Ok(None),
            ByName::KeptOut(ended, left) => Err(self.is_ended(ended, left)),
        }
    }

    async fn answer(self: &Arc<Self>, line: RouteLine, viewer: Option<Viewer>, request: Request) -> Response {
        if let Some(why) = barred((line.needs, line.limits), viewer.as_ref(), self.settings.read_only) {
            return match &viewer {
                None => self.sign_in_first(),
                Some(_) => self.message(StatusCode::FORBIDDEN, "Not for you", &why, viewer.as_ref()),
            };
        }
        if line.screen == Screen::Export && request.version() < Version::HTTP_11 {
            return self.say_not_done(&too_old(), viewer.as_ref());
        }
        let secure = self.secure || is_forwarded_securely(request.headers());
        let part = line.part_of(request.uri().path()).unwrap_or_default();
        if line.screen == Screen::Asset {
            return assets::asset(&part);
        }
        let Some(viewer) = viewer else {
            return self.meet_stranger(line, secure, request).await;
        };
        let fields = match self.fields(&line, request, Some(&viewer)).await {
            Ok(fields) => fields,
            Err(not_done) => return self.say_not_done(&not_done, Some(&viewer)),
        };
        let desk = match viewer.entrance {
            // The name is the program's starter's word, and no more than on a command line.
            WayIn::Link => self.desk.clone(),
            WayIn::Proxy | WayIn::Issuer => self.desk.vouched_for(&viewer.name),
        };
        let ask = Ask {
            desk: desk.limited_to(viewer.partners.clone()),
            viewer,
            part,
            fields,
            read_only: self.settings.read_only,
        };
        let site = Arc::clone(self);
        let shown = move || async move {
            match site.screen(line.screen, &ask, secure).await {
                Ok(response) => response,
                Err(not_done) => site.say_not_done(&not_done, Some(&ask.viewer)),
            }
        };
        aside::soon(shown).await.unwrap_or_else(|| self.broke())
    }

    /// Somebody who is not signed in: they ask no desk, and take no thread that those have who are.
    async fn meet_stranger(self: &Arc<Self>, line: RouteLine, secure: bool, request: Request) -> Response {
        let is_link = matches!(self.door, FrontDoor::Link(_));
        // Where there is no link, nothing that is sent along is read.
        if line.method == Method::Post && !is_link {
            return see("/");
        }
        let Some(_place) = self.strangers.place() else {
            return again_after(self.too_often("too many people are on their way in at once"), 1);
        };
        let [way, asked] =
            [WAY_COOKIE, ASKED_COOKIE].map(|name| cookie(request.headers(), name).unwrap_or_default().to_owned());
        let is_meant = is_meant(&line, &request);
        let fields = match self.fields(&line, request, None).await {
            Ok(fields) => fields,
            Err(not_done) => return self.say_not_done(&not_done, None),
        };
        match line.screen {
            Screen::Enter => entry::enter(self, &fields),
            Screen::SignIn => entry::sign_in(self, &fields, secure),
            Screen::Leave if !is_meant => entry::ask_first(self, &asked, secure),
            Screen::Leave | Screen::ComeBack => {
                let site = Arc::clone(self);
                let asked = aside::apart(move || async move {
                    match line.screen {
                        Screen::Leave => entry::leave(&site, secure).await,
                        _ => entry::come_back(&site, &fields, &way, secure).await,
                    }
                });
                asked.await.unwrap_or_else(|| self.broke())
            }
            _ => self.sign_in_first(),
        }
    }

    async fn screen(self: &Arc<Self>, screen: Screen, ask: &Ask, secure: bool) -> Result<Response, NotDone> {
        match screen {
            // What everybody has in sum is not theirs.
            Screen::Overview if ask.viewer.partners.is_some() => Ok(see("/groups")),
            Screen::Overview => overview::overview(self, ask).await,
            Screen::Live => live::watch(self, ask),
            Screen::Groups => groups::groups(self, ask).await,
            Screen::Letters => letters::letters(self, ask, None).await,
            Screen::Letter => letter::letter(ask, None, false).await,
            Screen::LetterBody => letter::letter(ask, None, true).await,
            Screen::Export => letters::export(self, ask).await,
            Screen::AskDiscard => acts::ask(ask, crate::desk::StateChange::Discard, None).await,
            Screen::Discard => acts::change(ask, crate::desk::StateChange::Discard).await,
            Screen::AskRestore => acts::ask(ask, crate::desk::StateChange::Restore, None).await,
            Screen::Restore => acts::change(ask, crate::desk::StateChange::Restore).await,
            Screen::AskPurge => acts::ask_purge(ask, None).await,
            Screen::Purge => acts::purge(ask).await,
            Screen::Plans => plans::plans(self, ask).await,
            Screen::MakePlan => plans::make(self, ask).await,
            Screen::Plan => plans::plan(ask, None).await,
            Screen::Approve => plans::approve(ask).await,
            Screen::Replay => plans::replay(self, ask).await,
            Screen::DiscardPlan => plans::change(ask, crate::desk::StateChange::Discard).await,
            Screen::RestorePlan => plans::change(ask, crate::desk::StateChange::Restore).await,
            Screen::Runs => runs::runs(self, ask).await,
            Screen::Run => runs::run(self, ask, None).await,
            Screen::Cancel => runs::cancel(self, ask).await,
            Screen::Resume => runs::resume(self, ask).await,
            Screen::Timeline => timeline::timeline(ask).await,
            Screen::Partners => partners::partners(ask).await,
            Screen::Partner => partners::partner(self, ask, None).await,
            Screen::Suspend => partners::act(self, ask, PartnerAct::Suspend).await,
            Screen::Quarantine => partners::act(self, ask, PartnerAct::Quarantine).await,
            Screen::ResumePartner => partners::act(self, ask, PartnerAct::Resume).await,
            Screen::Ledger => money::ledger(ask).await,
            Screen::Check => proof::check(self, ask).await,
            Screen::Outbox => trail::outbox(self, ask, None).await,
            Screen::Retry => trail::retry(self, ask).await,
            Screen::Audit => trail::audit(self, ask).await,
            Screen::Doctor => doctor::doctor(self, ask).await,
            Screen::Sessions => Ok(entry::sessions(self, ask, None)),
            Screen::EndSession => Ok(entry::end_session(self, ask)),
            Screen::SignOut => Ok(entry::sign_out(self, ask, secure)),
            // Who is signed in already has no need of it.
            Screen::Enter | Screen::SignIn | Screen::Leave | Screen::ComeBack | Screen::Asset => Ok(see("/")),
        }
    }

    /// What came with a request. A form must be one of this session's.
    async fn fields(&self, line: &RouteLine, request: Request, viewer: Option<&Viewer>) -> Result<Fields, NotDone> {
        if line.method == Method::Get {
            return Ok(Fields::read(request.uri().query().unwrap_or_default().as_bytes()));
        }
        let (parts, body) = request.into_parts();
        let kind = parts.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let is_form = kind.is_some_and(|kind| {
            let kind = kind.split(';').next().unwrap_or_default();
            kind.trim().eq_ignore_ascii_case("application/x-www-form-urlencoded")
        });
        if !is_form {
            return Err(NotDone::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "only forms are taken here",
            ));
        }
        // A browser says where a form stood; one that says nothing has the token to show.
        let site = parts
            .headers
            .get("sec-fetch-site")
            .and_then(|value| value.to_str().ok());
        if site.is_some_and(|site| !matches!(site, "same-origin" | "none")) {
            return Err(forged());
        }
        let body = self.body(body).await?;
        if let Some(pulse) = parts.extensions.get::<Arc<Pulse>>() {
            pulse.has_all();
        }
        let fields = Fields::read(&body);
        if let Some(viewer) = viewer {
            let given = fields.get("form_token").unwrap_or_default();
            if !is_same(given, &viewer.form_token) {
                return Err(forged());
            }
        }
        Ok(fields)
    }

    async fn body(&self, body: Body) -> Result<Bytes, NotDone> {
        let read = axum::body::to_bytes(body, self.settings.body_max);
        match tokio::time::timeout(self.settings.body_timeout, read).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(_)) => Err(NotDone::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "the form is larger than console.body_max, or broke off; nothing was done",
            )),
            Err(_) => Err(NotDone::new(
                StatusCode::REQUEST_TIMEOUT,
                "the form did not come within console.body_timeout; nothing was done",
            )),
        }
    }
}

/// The door of each line of the table.
pub(super) fn router(site: Arc<Site>) -> Router {
    let mut router = Router::new();
    for line in TABLE {
        let filter = match line.method {
            Method::Get => MethodFilter::GET,
            Method::Post => MethodFilter::POST,
        };
        let answer = async move |State(site): State<Arc<Site>>, request: Request| site.meet(line, request).await;
        router = router.route(line.path, MethodRouter::new().on(filter, answer));
    }
    router
        .method_not_allowed_fallback(async |State(site): State<Arc<Site>>, request: Request| {
            site.wrong_method(&request)
        })
        .fallback(async |State(site): State<Arc<Site>>, request: Request| site.nothing_here(&request))
        .with_state(site)
}

/// An answer of unknown length ends with its connection there, however it ends.
fn too_old() -> NotDone {
    NotDone::new(
        StatusCode::HTTP_VERSION_NOT_SUPPORTED,
        "an export takes HTTP/1.1: by an older one a file that broke off looks whole; nothing was exported",
    )
    .hint("a proxy between you and the console speaks the older one: have it speak HTTP/1.1 (nginx: proxy_http_version 1.1)")
}

fn forged() -> NotDone {
    NotDone::new(
        StatusCode::FORBIDDEN,
        "this form is none of this session's; nothing was done",
    )
    .hint("go back, load the page again, and send its form")
}

/// Whether somebody wants to be signed in: by a link on a page of ours. Another's that leads here, or a redirect, would undo that
/// they signed out.
fn is_meant(line: &RouteLine, request: &Request) -> bool {
    let is_asked = line.screen == Screen::Leave;
    let headers = request.headers();
    match headers.get("sec-fetch-site") {
        Some(site) => is_asked && site.as_bytes() == b"same-origin",
        // A browser that does not say it has what the page that asked left with it.
        None => {
            let fields = Fields::read(request.uri().query().unwrap_or_default().as_bytes());
            let given = fields.get("token").unwrap_or_default();
            is_asked && !given.is_empty() && cookie(headers, ASKED_COOKIE).is_some_and(|kept| is_same(given, kept))
        }
    }
}

/// Whether the name that the browser asked for is this machine itself.
fn is_named_loopback(headers: &HeaderMap) -> bool {
    let host = headers
        .get(HOST)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|address| address.to_canonical().is_loopback())
}

fn is_forwarded_securely(headers: &HeaderMap) -> bool {
    headers
        .get("x-forwarded-proto")
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"https"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_s_names_are_answered_on_loopback() {
        let named = |host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HOST, host.parse().expect("a value"));
            is_named_loopback(&headers)
        };
        for host in [
            "127.0.0.1:9470",
            "127.0.0.1",
            "localhost:1",
            "LOCALHOST",
            "[::1]:9470",
            "[::1]",
            "127.9.9.9:1",
        ] {
            assert!(named(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "evil.example:9470",
            "localhost.evil.example",
            "10.0.0.1:9470",
            "127.0.0.1.evil:1",
        ] {
            assert!(!named(host), "{host}");
        }
    }
}
