//! A request, from the door to its page: who asks, whether they may, what they sent.

use std::{net::IpAddr, sync::Arc, time::Instant};

use askama::Template;
use axum::{
    body::{Body, Bytes},
    extract::Request,
    response::Response,
};
use hyper::{
    HeaderMap, StatusCode,
    header::{CONTENT_TYPE, HOST},
};
use jiff::Timestamp;

use super::{
    Site,
    access::{ConsoleRole, FrontDoor, LetIn, Needs, NotLetIn, cookie},
    acts,
    answer::{NotDone, Notice, again_after, allow, keep_cookie, page, see},
    assets, entry,
    fields::Fields,
    groups, letter, letters, live, money, overview, partners, plans,
    routes::{Method, RouteLine, Screen},
    runs,
    sessions::{Found, Viewer, WayIn, is_same},
    timeline, trail,
};
use crate::{
    desk::{Desk, PartnerAct},
    http::door::Pulse,
    telemetry::Signal,
};

/// What is asked, and by whom.
pub(super) struct Ask {
    pub(super) viewer: Viewer,
    pub(super) part: String,
    pub(super) fields: Fields,
    /// The desk, for this one's name.
    pub(super) desk: Desk,
    pub(super) read_only: bool,
}

impl Ask {
    /// Why this one may not ask for something; none: they may.
    pub(super) fn barred(&self, screen: Screen) -> Option<String> {
        barred(screen.needs(), Some(self.viewer.role), self.read_only)
    }

    /// The number in the path.
    pub(super) fn number(&self, what: &str) -> Result<i64, NotDone> {
        self.part
            .parse()
            .map_err(|_| NotDone::missing(format!("there is no {what} {:?}", self.part)))
    }

    /// A page around which everything else stands.
    pub(super) fn frame(&self, here: &'static str, title: impl Into<String>) -> Frame {
        Frame {
            title: title.into(),
            here,
            who: Some(self.viewer.clone()),
            read_only: self.read_only,
            notice: None,
        }
    }
}

/// What stands around every page.
pub(super) struct Frame {
    pub(super) title: String,
    /// Which of the places to go one is at.
    pub(super) here: &'static str,
    pub(super) who: Option<Viewer>,
    pub(super) read_only: bool,
    pub(super) notice: Option<Notice>,
}

/// A place to go.
pub(super) struct Place {
    pub(super) key: &'static str,
    pub(super) path: &'static str,
    pub(super) name: &'static str,
}

impl Frame {
    pub(super) fn with(mut self, notice: Option<Notice>) -> Self {
        self.notice = notice;
        self
    }

    pub(super) fn places(&self) -> [Place; 11] {
        let place = |key, path, name| Place { key, path, name };
        [
            place("overview", "/", "Overview"),
            place("groups", "/groups", "Groups"),
            place("letters", "/letters", "Letters"),
            place("plans", "/plans", "Plans"),
            place("runs", "/runs", "Runs"),
            place("timeline", "/timeline", "Timeline"),
            place("partners", "/partners", "Partners"),
            place("ledger", "/ledger", "Ledger"),
            place("outbox", "/outbox", "Outbox"),
            place("audit", "/audit", "Audit"),
            place("doctor", "/doctor", "Doctor"),
        ]
    }

    pub(super) fn style(&self) -> &'static str {
        assets::STYLE.path
    }

    pub(super) fn scripts(&self) -> [&'static str; 2] {
        [assets::HTMX.path, assets::SCRIPT.path]
    }

    pub(super) fn icon(&self) -> &'static str {
        assets::ICON.path
    }

    pub(super) fn form_token(&self) -> &str {
        self.who.as_ref().map_or("", |who| who.form_token.as_str())
    }

    pub(super) fn now(&self) -> super::shown::At {
        super::shown::At(Timestamp::now())
    }
}

/// A page that only says something.
#[derive(Template)]
#[template(path = "message.html")]
struct Message {
    frame: Frame,
    heading: &'static str,
}

/// Why somebody in a role may not; none: they may.
fn barred(needs: Needs, role: Option<ConsoleRole>, read_only: bool) -> Option<String> {
    let at_least = |least: ConsoleRole| match role {
        Some(role) if role >= least => None,
        Some(role) => Some(format!(
            "this needs the role {}; yours is {}",
            least.as_str(),
            role.as_str()
        )),
        None => Some("sign in first".to_owned()),
    };
    match needs {
        Needs::Nobody => None,
        Needs::Look(least) => at_least(least),
        Needs::Change(_) if read_only && role.is_some() => {
            Some("this console is for looking only (console.read_only)".to_owned())
        }
        Needs::Change(least) => at_least(least),
    }
}

/// Whoever asks, and the cookie that they are to get.
struct Met {
    viewer: Option<Viewer>,
    fresh: Option<String>,
}

impl Site {
    /// Answers a request.
    pub(super) async fn meet(self: &Arc<Self>, line: &RouteLine, request: Request) -> Response {
        let began = Instant::now();
        let response = match self.let_in(line, request.headers()) {
            Err(refused) => refused,
            Ok(met) => {
                let secure = self.encrypted || is_forwarded_securely(request.headers());
                let fresh = met.fresh.clone();
                let mut response = self.answer(line, met, secure, request).await;
                if let Some(cookie) = fresh {
                    keep_cookie(&mut response, Some(&cookie), secure);
                }
                response
            }
        };
        Signal::ConsoleAnswered {
            path: line.path,
            status: response.status().as_u16(),
            elapsed: began.elapsed(),
        }
        .emit();
        response
    }

    /// Who asks.
    #[expect(clippy::result_large_err, reason = "an answer is what it is")]
    fn let_in(&self, line: &RouteLine, headers: &HeaderMap) -> Result<Met, Response> {
        let now = Instant::now();
        let found = cookie(headers).map_or(Found::Nobody, |cookie| {
            // Being watched live is not being used.
            self.sessions.find(cookie, line.screen != Screen::Live, now)
        });
        let viewer = match found {
            Found::Viewer(viewer) => Some(viewer),
            Found::Nobody => None,
            Found::TooOften => return Err(again_after(self.too_often("this session asks too often"), 1)),
        };
        if viewer.is_none() && !self.strangers.take(now) {
            return Err(again_after(
                self.too_often("too many people who are not signed in ask at once"),
                1,
            ));
        }
        match &self.door {
            // A page of another name that leads here is none of ours.
            FrontDoor::Link(_) if !is_named_loopback(headers) => Err(self.message(
                StatusCode::MISDIRECTED_REQUEST,
                "Not here",
                "this console answers by its address on this machine only",
                None,
            )),
            FrontDoor::Link(_) => Ok(Met {
                viewer: viewer.filter(|viewer| viewer.entrance == WayIn::Link),
                fresh: None,
            }),
            FrontDoor::Proxy(_) if line.needs == Needs::Nobody => Ok(Met {
                viewer: None,
                fresh: None,
            }),
            FrontDoor::Proxy(proxy) => {
                let let_in = proxy.admit(headers).map_err(|why| self.not_let_in(&why))?;
                self.through_proxy(viewer, let_in, now)
            }
        }
    }

    /// The session of whom the proxy names: the one that the cookie says if it is theirs, or a new one.
    #[expect(clippy::result_large_err, reason = "an answer is what it is")]
    fn through_proxy(&self, viewer: Option<Viewer>, let_in: LetIn, now: Instant) -> Result<Met, Response> {
        if let Some(mut viewer) =
            viewer.filter(|viewer| viewer.entrance == let_in.entrance && viewer.name == let_in.name)
        {
            if viewer.role != let_in.role {
                viewer.role = let_in.role;
                self.sessions.is_now(viewer.session, let_in.role);
            }
            return Ok(Met {
                viewer: Some(viewer),
                fresh: None,
            });
        }
        let begun = self
            .sessions
            .begin(&let_in.name, let_in.role, let_in.entrance, now)
            .map_err(|why| self.message(StatusCode::INTERNAL_SERVER_ERROR, "Not now", &why, None))?;
        Signal::ConsoleSignedIn {
            name: &let_in.name,
            role: let_in.role.as_str(),
            entrance: let_in.entrance.as_str(),
        }
        .emit();
        let (cookie, viewer) = begun;
        Ok(Met {
            viewer: Some(viewer),
            fresh: Some(cookie),
        })
    }

    async fn answer(self: &Arc<Self>, line: &RouteLine, met: Met, secure: bool, request: Request) -> Response {
        let role = met.viewer.as_ref().map(|viewer| viewer.role);
        if let Some(why) = barred(line.needs, role, self.settings.read_only) {
            return match &met.viewer {
                None => self.sign_in_first(),
                Some(_) => self.message(StatusCode::FORBIDDEN, "Not for you", &why, met.viewer.as_ref()),
            };
        }
        let part = line.part_of(request.uri().path()).unwrap_or_default();
        let fields = match self.fields(line, request, met.viewer.as_ref()).await {
            Ok(fields) => fields,
            Err(not_done) => return self.say_not_done(&not_done, met.viewer.as_ref()),
        };
        let Some(viewer) = met.viewer else {
            return match line.screen {
                Screen::Enter => entry::enter(self, &fields),
                Screen::SignIn => entry::sign_in(self, &fields, secure),
                Screen::Asset => assets::asset(&part),
                _ => self.sign_in_first(),
            };
        };
        let desk = match viewer.entrance {
            // The name is the program's starter's word, and no more than on a command line.
            WayIn::Link => self.desk.clone(),
            WayIn::Proxy => self.desk.vouched_for(&viewer.name),
        };
        let ask = Ask {
            viewer,
            part,
            fields,
            desk,
            read_only: self.settings.read_only,
        };
        match self.screen(line.screen, &ask, secure).await {
            Ok(response) => response,
            Err(not_done) => self.say_not_done(&not_done, Some(&ask.viewer)),
        }
    }

    async fn screen(self: &Arc<Self>, screen: Screen, ask: &Ask, secure: bool) -> Result<Response, NotDone> {
        match screen {
            Screen::Overview => overview::overview(self, ask).await,
            Screen::Live => live::watch(self, ask),
            Screen::Groups => groups::groups(self, ask).await,
            Screen::Letters => letters::letters(self, ask).await,
            Screen::Letter => letter::letter(ask, None, false).await,
            Screen::LetterBody => letter::letter(ask, None, true).await,
            Screen::Export => letters::export(ask).await,
            Screen::AskDiscard => acts::ask(ask, crate::desk::StateChange::Discard, None).await,
            Screen::Discard => acts::change(ask, crate::desk::StateChange::Discard).await,
            Screen::AskRestore => acts::ask(ask, crate::desk::StateChange::Restore, None).await,
            Screen::Restore => acts::change(ask, crate::desk::StateChange::Restore).await,
            Screen::AskPurge => acts::ask_purge(ask, None).await,
            Screen::Purge => acts::purge(ask).await,
            Screen::Plans => plans::plans(self, ask).await,
            Screen::MakePlan => plans::make(ask).await,
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
            Screen::Partner => partners::partner(ask, None).await,
            Screen::Suspend => partners::act(ask, PartnerAct::Suspend).await,
            Screen::Quarantine => partners::act(ask, PartnerAct::Quarantine).await,
            Screen::ResumePartner => partners::act(ask, PartnerAct::Resume).await,
            Screen::Ledger => money::ledger(ask).await,
            Screen::Check => money::check(self, ask).await,
            Screen::Outbox => trail::outbox(self, ask, None).await,
            Screen::Retry => trail::retry(self, ask).await,
            Screen::Audit => trail::audit(self, ask).await,
            Screen::Doctor => trail::doctor(self, ask).await,
            Screen::Sessions => entry::sessions(self, ask),
            Screen::EndSession => entry::end_session(self, ask),
            Screen::SignOut => Ok(entry::sign_out(self, ask, secure)),
            // Who is signed in already has no need of it.
            Screen::Enter | Screen::SignIn => Ok(see("/")),
            Screen::Asset => Ok(assets::asset(&ask.part)),
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

    // What is said instead of a page ------------------------------------------------------------------------------------

    fn message(&self, status: StatusCode, heading: &'static str, text: &str, viewer: Option<&Viewer>) -> Response {
        self.say(status, heading, Notice::bad(text), viewer)
    }

    fn say(&self, status: StatusCode, heading: &'static str, notice: Notice, viewer: Option<&Viewer>) -> Response {
        let message = Message {
            frame: Frame {
                title: heading.to_owned(),
                here: "",
                who: viewer.cloned(),
                read_only: self.settings.read_only,
                notice: Some(notice),
            },
            heading,
        };
        page(status, &message)
    }

    fn say_not_done(&self, not_done: &NotDone, viewer: Option<&Viewer>) -> Response {
        let heading = match not_done.status {
            StatusCode::NOT_FOUND => "Nothing of that name",
            StatusCode::SERVICE_UNAVAILABLE => "Not now",
            StatusCode::INTERNAL_SERVER_ERROR => "A fault of ours",
            _ => "Not done",
        };
        self.say(not_done.status, heading, not_done.notice.clone(), viewer)
    }

    fn too_often(&self, why: &str) -> Response {
        self.message(StatusCode::TOO_MANY_REQUESTS, "Too often", why, None)
    }

    fn sign_in_first(&self) -> Response {
        let notice = match &self.door {
            FrontDoor::Link(_) => Notice {
                good: false,
                text: "you are not signed in, or not any more".to_owned(),
                hint: Some("open the one-time link that `settled console` printed where it was started".to_owned()),
            },
            FrontDoor::Proxy(_) => Notice::bad("you are not signed in, or not any more: load the page again"),
        };
        self.say(StatusCode::UNAUTHORIZED, "Sign in", notice, None)
    }

    fn not_let_in(&self, why: &NotLetIn) -> Response {
        match why {
            NotLetIn::NotByProxy => self.message(
                StatusCode::UNAUTHORIZED,
                "Not this way",
                "this console is reached through its proxy, which says who asks",
                None,
            ),
            NotLetIn::NoName => self.message(
                StatusCode::UNAUTHORIZED,
                "Who is it?",
                "the proxy does not say who asks: it must send one name (console.proxy_user_header)",
                None,
            ),
            NotLetIn::Unlisted(name) => self.message(
                StatusCode::FORBIDDEN,
                "Not for you",
                &format!("{name} is on no list: console.readers, console.operators or console.approvers"),
                None,
            ),
        }
    }

    /// What is said where a page broke in the middle.
    pub(super) fn broke(&self) -> Response {
        self.message(
            StatusCode::INTERNAL_SERVER_ERROR,
            "A fault of ours",
            "the page broke while it was made; the log says more",
            None,
        )
    }

    /// A form's address that is only looked at, after a reload perhaps: what it is about is one step up.
    pub(super) fn wrong_method(&self, request: &Request) -> Response {
        let above = request.uri().path().rsplit_once('/').map(|(above, _)| above);
        match (request.method().as_str(), above) {
            ("GET" | "HEAD", Some("")) => see("/letters"),
            ("GET" | "HEAD", Some(above)) => see(above),
            _ => allow(
                self.message(
                    StatusCode::METHOD_NOT_ALLOWED,
                    "Not like this",
                    "this is asked for in another way",
                    None,
                ),
                "GET, HEAD, POST",
            ),
        }
    }

    pub(super) fn nothing_here(&self, _: &Request) -> Response {
        self.message(StatusCode::NOT_FOUND, "Nothing here", "there is no such page", None)
    }
}

fn forged() -> NotDone {
    NotDone::new(
        StatusCode::FORBIDDEN,
        "this form is none of this session's; nothing was done",
    )
    .hint("go back, load the page again, and send its form")
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

    #[test]
    fn a_role_may_what_it_may() {
        use ConsoleRole::{Approver, Operator, Reader};
        let may = |needs, role, read_only| barred(needs, role, read_only).is_none();
        for read_only in [false, true] {
            assert!(may(Needs::Nobody, None, read_only) && !may(Needs::Look(Reader), None, read_only));
            assert!(may(Needs::Look(Reader), Some(Reader), read_only));
            assert!(!may(Needs::Look(Operator), Some(Reader), read_only));
            assert_eq!(may(Needs::Change(Operator), Some(Approver), read_only), !read_only);
            assert!(!may(Needs::Change(Approver), Some(Operator), read_only));
            assert!(!may(Needs::Change(Reader), None, read_only));
        }
    }
}
