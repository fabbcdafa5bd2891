//! Signing in and out, and who is.

use std::time::Instant;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use uuid::Uuid;

use super::{
    Site,
    access::{ASKED_COOKIE, COOKIE_NAME, FrontDoor, WAY_COOKIE},
    answer::{NotDone, Notice, keep_cookie, page, see},
    ask::Ask,
    fields::Fields,
    frame::Frame,
    routes::Screen,
    sessions::secret,
    shown::{At, lasting},
    who::LetIn,
};
use crate::telemetry::Signal;

#[derive(Template)]
#[template(path = "enter.html")]
struct Enter {
    frame: Frame,
    name: String,
    role: &'static str,
    link: String,
}

#[derive(Template)]
#[template(path = "message.html")]
struct Over {
    frame: Frame,
    heading: &'static str,
    sign_in: bool,
}

fn stranger(title: &str) -> Frame {
    Frame {
        title: title.to_owned(),
        here: "",
        who: None,
        read_only: false,
        notice: None,
    }
}

/// The page behind the link. Looking at it uses nothing up: what looks ahead at links would.
pub(super) fn enter(site: &Site, fields: &Fields) -> Response {
    let given = fields.get("link").unwrap_or_default();
    match &site.door {
        FrontDoor::Link(link) => match link.look(given, Instant::now()) {
            Some(LetIn { name, role, .. }) => {
                let enter = Enter {
                    frame: stranger("Sign in"),
                    name,
                    role: role.as_str(),
                    link: given.to_owned(),
                };
                page(StatusCode::OK, &enter)
            }
            None => over(site),
        },
        FrontDoor::Proxy(_) | FrontDoor::Issuer(_) => see("/"),
    }
}

/// A link that opens nothing. If there is none that does, another one is printed where the program was started.
fn over(site: &Site) -> Response {
    if let FrontDoor::Link(link) = &site.door
        && link.is_over(Instant::now())
    {
        site.print_link();
    }
    let mut frame = stranger("Sign in");
    frame.notice = Some(Notice {
        good: false,
        text: "this link was used, or is too old".to_owned(),
        hint: Some("the newest one stands where `settled console` was started".to_owned()),
    });
    page(
        StatusCode::UNAUTHORIZED,
        &Over {
            frame,
            heading: "Sign in",
            sign_in: false,
        },
    )
}

/// Lets whoever has the link in, once, with a session of its own; and another link is printed.
pub(super) fn sign_in(site: &Site, fields: &Fields, secure: bool) -> Response {
    let FrontDoor::Link(link) = &site.door else {
        return see("/");
    };
    let now = Instant::now();
    let Some(let_in) = link.take(fields.get("link").unwrap_or_default(), now) else {
        return over(site);
    };
    let response = begun(site, let_in, secure, now);
    site.print_link();
    response
}

/// A session for somebody who was let in just now.
fn begun(site: &Site, let_in: LetIn, secure: bool, now: Instant) -> Response {
    match site.sessions.begin(let_in, now) {
        Ok((cookie, viewer)) => {
            Signal::ConsoleSignedIn {
                name: &viewer.name,
                role: viewer.role.as_str(),
                entrance: viewer.entrance.as_str(),
            }
            .emit();
            let mut response = see("/");
            keep_cookie(&mut response, COOKIE_NAME, Some(&cookie), secure);
            response
        }
        Err(why) => not_now(StatusCode::INTERNAL_SERVER_ERROR, Notice::bad(why)),
    }
}

fn not_now(status: StatusCode, notice: Notice) -> Response {
    let mut frame = stranger("Not now");
    frame.notice = Some(notice);
    page(
        status,
        &Over {
            frame,
            heading: "Not now",
            sign_in: false,
        },
    )
}

#[derive(Template)]
#[template(path = "sign-in.html")]
struct AskedFirst {
    frame: Frame,
    token: String,
}

/// Asks whether somebody wants to be signed in, where it is not seen that they do. The page's link has what the browser keeps.
pub(super) fn ask_first(site: &Site, kept: &str, secure: bool) -> Response {
    if let FrontDoor::Link(_) = &site.door {
        return see("/");
    }
    let is_ours = kept.len() == 64 && kept.bytes().all(|byte| byte.is_ascii_hexdigit());
    let token = match is_ours {
        true => kept.to_owned(),
        false => match secret() {
            Ok(token) => token,
            Err(why) => return not_now(StatusCode::INTERNAL_SERVER_ERROR, Notice::bad(why)),
        },
    };
    let asked = AskedFirst {
        frame: stranger("Sign in"),
        token: token.clone(),
    };
    let mut response = page(StatusCode::OK, &asked);
    keep_cookie(&mut response, ASKED_COOKIE, Some(&token), secure);
    response
}

/// To the issuer.
pub(super) async fn leave(site: &Site, secure: bool) -> Response {
    let FrontDoor::Issuer(issuer) = &site.door else {
        return see("/");
    };
    match issuer.depart(Instant::now()).await {
        Ok(departure) => {
            let mut response = see(&departure.url);
            keep_cookie(&mut response, WAY_COOKIE, Some(&departure.browser), secure);
            response
        }
        Err(why) => {
            let mut notice = Notice::bad(format!("the issuer of console.oidc_issuer can not be asked: {why}"));
            notice.hint = Some("nobody is signed in until it answers; who is signed in stays so".to_owned());
            not_now(StatusCode::SERVICE_UNAVAILABLE, notice)
        }
    }
}

/// Back from the issuer.
pub(super) async fn come_back(site: &Site, fields: &Fields, way: &str, secure: bool) -> Response {
    let FrontDoor::Issuer(issuer) = &site.door else {
        return see("/");
    };
    let now = Instant::now();
    let state = fields.get("state").unwrap_or_default();
    let mut response = match issuer.arrive(fields.get("code"), state, way, now).await {
        Ok(let_in) => begun(site, let_in, secure, now),
        Err(why) => site.not_let_in(&why),
    };
    keep_cookie(&mut response, WAY_COOKIE, None, secure);
    response
}

pub(super) fn sign_out(site: &Site, ask: &Ask, secure: bool) -> Response {
    site.sessions.end(ask.viewer.session, true, Instant::now());
    let mut frame = stranger("Signed out");
    frame.notice = Some(Notice::good("you are signed out"));
    let mut response = page(
        StatusCode::OK,
        &Over {
            frame,
            heading: "Signed out",
            sign_in: !matches!(site.door, FrontDoor::Link(_)),
        },
    );
    keep_cookie(&mut response, COOKIE_NAME, None, secure);
    response
}

// Sessions -----------------------------------------------------------------------------------------------------------

#[derive(Template)]
#[template(path = "sessions.html")]
struct SessionsPage {
    frame: Frame,
    name: String,
    role: &'static str,
    entrance: &'static str,
    /// What ending one comes to.
    ended: String,
    lines: Vec<SessionLine>,
    barred: Option<String>,
}

struct SessionLine {
    id: Uuid,
    name: String,
    own: bool,
    role: &'static str,
    entrance: &'static str,
    began: At,
    idle: String,
}

pub(super) fn sessions(site: &Site, ask: &Ask, why_not: Option<NotDone>) -> Response {
    let (status, notice) = NotDone::above(why_not);
    let lines = site.sessions.all(Instant::now()).into_iter().map(|one| SessionLine {
        id: one.viewer.session,
        own: one.viewer.session == ask.viewer.session,
        name: one.viewer.name,
        role: one.viewer.role.as_str(),
        entrance: one.viewer.entrance.as_str(),
        began: At(one.began),
        idle: lasting(one.idle),
    });
    page(
        status,
        &SessionsPage {
            frame: ask.frame("sessions", "Sessions").with(notice),
            name: ask.viewer.name.clone(),
            role: ask.viewer.role.as_str(),
            entrance: ask.viewer.entrance.as_str(),
            ended: match site.door {
                FrontDoor::Proxy(_) => format!(
                    "Whose session is ended stays out for {} (console.ended_for), though the proxy still vouches for them; who \
                     signs out may sign in again.",
                    lasting(site.settings.ended_for)
                ),
                FrontDoor::Link(_) | FrontDoor::Issuer(_) => {
                    "A session that is ended asks for a new sign-in.".to_owned()
                }
            },
            lines: lines.collect(),
            barred: ask.barred(Screen::EndSession),
        },
    )
}

pub(super) fn end_session(site: &Site, ask: &Ask) -> Response {
    let end = |session| {
        site.sessions
            .end(session, session == ask.viewer.session, Instant::now())
    };
    let is_ended = Uuid::parse_str(&ask.part).is_ok_and(end);
    if is_ended {
        return see("/sessions");
    }
    let why_not = NotDone::missing("there is no such session, or not any more; nothing was done");
    sessions(site, ask, Some(why_not))
}
