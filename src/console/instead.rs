//! What is said where a page is not answered as asked for.

use std::time::Duration;

use askama::Template;
use axum::{extract::Request, response::Response};
use hyper::StatusCode;

use super::{
    Site,
    access::FrontDoor,
    answer::{NotDone, Notice, allow, page, see},
    frame::Frame,
    sessions::{KeptOut, Viewer},
    shown::lasting,
    who::NotLetIn,
};

/// A page that only says something.
#[derive(Template)]
#[template(path = "message.html")]
struct Message {
    frame: Frame,
    heading: &'static str,
    /// Whether there is a way in.
    sign_in: bool,
}

/// The heading of pages that are seen before one is signed in.
const SIGN_IN: &str = "Sign in";
const SIGNED_OUT: &str = "Signed out";
const NOT_SIGNED_IN: &str = "you are not signed in, or not any more";

impl Site {
    pub(super) fn message(
        &self,
        status: StatusCode,
        heading: &'static str,
        text: &str,
        viewer: Option<&Viewer>,
    ) -> Response {
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
            sign_in: viewer.is_none()
                && match self.door {
                    FrontDoor::Issuer(_) => true,
                    FrontDoor::Proxy(_) => heading == SIGNED_OUT,
                    FrontDoor::Link(_) => false,
                },
            heading,
        };
        page(status, &message)
    }

    pub(super) fn say_not_done(&self, not_done: &NotDone, viewer: Option<&Viewer>) -> Response {
        let heading = match not_done.status {
            StatusCode::NOT_FOUND => "Nothing of that name",
            StatusCode::SERVICE_UNAVAILABLE => "Not now",
            StatusCode::INTERNAL_SERVER_ERROR => "A fault of ours",
            _ => "Not done",
        };
        self.say(not_done.status, heading, not_done.notice.clone(), viewer)
    }

    /// Said to whom the proxy vouches for after their session was ended.
    pub(super) fn is_ended(&self, ended: KeptOut, left: Duration) -> Response {
        if ended.own {
            return self.message(
                StatusCode::UNAUTHORIZED,
                SIGNED_OUT,
                "you signed out of this console",
                None,
            );
        }
        let text = format!(
            "your session was ended by somebody else: nothing is shown to you for {}",
            lasting(left)
        );
        self.message(StatusCode::FORBIDDEN, "Your session was ended", &text, None)
    }

    pub(super) fn too_often(&self, why: &str) -> Response {
        self.message(StatusCode::TOO_MANY_REQUESTS, "Too often", why, None)
    }

    pub(super) fn sign_in_first(&self) -> Response {
        let notice = match &self.door {
            FrontDoor::Link(_) => Notice {
                good: false,
                text: NOT_SIGNED_IN.to_owned(),
                hint: Some("open the one-time link that `settled console` printed where it was started".to_owned()),
            },
            FrontDoor::Proxy(_) => Notice::bad("you are not signed in, or not any more: load the page again"),
            FrontDoor::Issuer(_) => return self.message(StatusCode::UNAUTHORIZED, SIGN_IN, NOT_SIGNED_IN, None),
        };
        self.say(StatusCode::UNAUTHORIZED, SIGN_IN, notice, None)
    }

    pub(super) fn not_let_in(&self, why: &NotLetIn) -> Response {
        match why {
            NotLetIn::NoClaim(claim) => self.message(
                StatusCode::FORBIDDEN,
                "Who is it?",
                &format!("the issuer does not say who you are: its ID token has no {claim} that can be a name (console.oidc_user_claim)"),
                None,
            ),
            NotLetIn::NotFromHere => self.message(
                StatusCode::UNAUTHORIZED,
                SIGN_IN,
                "this way in was not begun in this browser, was used, or took too long: begin again",
                None,
            ),
            NotLetIn::NotSignedIn => {
                self.message(StatusCode::UNAUTHORIZED, SIGN_IN, "the issuer did not sign you in", None)
            }
            NotLetIn::IssuerAway(why) => self.message(
                StatusCode::SERVICE_UNAVAILABLE,
                SIGN_IN,
                &format!("the issuer (console.oidc_issuer) does not answer as it should: {why}"),
                None,
            ),
            NotLetIn::NotBelieved(why) => self.message(
                StatusCode::UNAUTHORIZED,
                SIGN_IN,
                &format!("what the issuer says can not be believed: {why}"),
                None,
            ),
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
