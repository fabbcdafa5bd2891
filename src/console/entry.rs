//! Signing in and out, and who is.

use std::time::Instant;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use uuid::Uuid;

use super::{
    Site,
    access::{FrontDoor, LetIn},
    answer::{NotDone, Notice, keep_cookie, page, see},
    fields::Fields,
    meet::{Ask, Frame},
    routes::Screen,
    shown::{At, lasting},
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
        FrontDoor::Proxy(_) => see("/"),
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
    match site.sessions.begin(&let_in.name, let_in.role, let_in.entrance, now) {
        Ok((cookie, viewer)) => {
            Signal::ConsoleSignedIn {
                name: &viewer.name,
                role: viewer.role.as_str(),
                entrance: viewer.entrance.as_str(),
            }
            .emit();
            let mut response = see("/");
            keep_cookie(&mut response, Some(&cookie), secure);
            site.print_link();
            response
        }
        Err(why) => {
            let mut frame = stranger("Not now");
            frame.notice = Some(Notice::bad(why));
            page(
                StatusCode::INTERNAL_SERVER_ERROR,
                &Over {
                    frame,
                    heading: "Not now",
                },
            )
        }
    }
}

pub(super) fn sign_out(site: &Site, ask: &Ask, secure: bool) -> Response {
    site.sessions.end(ask.viewer.session);
    let mut frame = stranger("Signed out");
    frame.notice = Some(Notice::good("you are signed out"));
    let mut response = page(
        StatusCode::OK,
        &Over {
            frame,
            heading: "Signed out",
        },
    );
    keep_cookie(&mut response, None, secure);
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

pub(super) fn sessions(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let lines = site.sessions.all(Instant::now()).into_iter().map(|one| SessionLine {
        id: one.viewer.session,
        own: one.viewer.session == ask.viewer.session,
        name: one.viewer.name,
        role: one.viewer.role.as_str(),
        entrance: one.viewer.entrance.as_str(),
        began: At(one.began),
        idle: lasting(one.idle),
    });
    Ok(page(
        StatusCode::OK,
        &SessionsPage {
            frame: ask.frame("sessions", "Sessions"),
            name: ask.viewer.name.clone(),
            role: ask.viewer.role.as_str(),
            entrance: ask.viewer.entrance.as_str(),
            lines: lines.collect(),
            barred: ask.barred(Screen::EndSession),
        },
    ))
}

pub(super) fn end_session(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let session = Uuid::parse_str(&ask.part).map_err(|_| NotDone::missing("there is no such session"))?;
    if !site.sessions.end(session) {
        return Err(NotDone::missing("there is no such session, or not any more"));
    }
    Ok(see("/sessions"))
}
