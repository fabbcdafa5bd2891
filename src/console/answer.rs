//! How answers look: pages, with what a browser is told about them; and what is not done, said on a page.

use askama::Template;
use axum::{body::Body, response::Response};
use hyper::{
    HeaderMap, StatusCode,
    header::{
        ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER, SET_COOKIE,
    },
    http::HeaderValue,
};

use super::shown::fit;
use crate::desk::{Refusal, RefusalKind};

/// No script, style, frame, form target or connection but our own, and none in a page itself.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// Something that is to be said above a page.
#[derive(Clone, Debug)]
pub(super) struct Notice {
    pub(super) good: bool,
    pub(super) text: String,
    pub(super) hint: Option<String>,
}

impl Notice {
    pub(super) fn good(text: impl Into<String>) -> Self {
        Self {
            good: true,
            text: text.into(),
            hint: None,
        }
    }

    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self {
            good: false,
            text: text.into(),
            hint: None,
        }
    }
}

/// With which status a page is answered, by what is said above it after an act.
pub(super) fn status_under(notice: Option<&Notice>) -> StatusCode {
    match notice {
        Some(notice) if !notice.good => StatusCode::CONFLICT,
        _ => StatusCode::OK,
    }
}

impl From<&Refusal> for Notice {
    fn from(refusal: &Refusal) -> Self {
        Self {
            good: false,
            text: refusal.message.clone(),
            hint: refusal.hint.clone(),
        }
    }
}

/// Why a page is not answered as asked.
#[derive(Clone, Debug)]
pub(super) struct NotDone {
    pub(super) status: StatusCode,
    pub(super) notice: Notice,
}

impl NotDone {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            notice: Notice::bad(text),
        }
    }

    /// A form or a link that says what can not be.
    pub(super) fn wrong(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    pub(super) fn missing(text: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, text)
    }

    /// Something is not as the one who asked saw it.
    pub(super) fn changed(text: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, text)
    }

    /// With which status a page is answered that stands there again, and what is said above it.
    pub(super) fn above(why_not: Option<Self>) -> (StatusCode, Option<Notice>) {
        why_not.map_or((StatusCode::OK, None), |not_done| {
            (not_done.status, Some(not_done.notice))
        })
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.notice.hint = Some(hint.into());
        self
    }
}

impl From<Refusal> for NotDone {
    fn from(refusal: Refusal) -> Self {
        let status = match refusal.kind {
            RefusalKind::Refused => StatusCode::CONFLICT,
            RefusalKind::Usage => StatusCode::BAD_REQUEST,
            RefusalKind::Away => StatusCode::SERVICE_UNAVAILABLE,
            RefusalKind::Right => StatusCode::FORBIDDEN,
            RefusalKind::Ours => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self {
            status,
            notice: Notice::from(&refusal),
        }
    }
}

/// A template as a page.
pub(super) fn page(status: StatusCode, template: &impl Template) -> Response {
    match template.render() {
        Ok(text) => with_headers(status, "text/html; charset=utf-8", fit(&text)),
        // A string takes everything, and no template of ours fails by itself.
        Err(_) => with_headers(
            StatusCode::INTERNAL_SERVER_ERROR,
            "text/plain; charset=utf-8",
            "the page could not be made",
        ),
    }
}

/// What a browser is told with everything that it gets.
pub(super) fn with_headers(status: StatusCode, kind: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    guard(headers);
    response
}

fn guard(headers: &mut HeaderMap) {
    let of = |name: &'static str| HeaderName::from_static(name);
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (of("x-frame-options"), "DENY"),
        (of("x-content-type-options"), "nosniff"),
        (of("referrer-policy"), "no-referrer"),
        (of("cross-origin-opener-policy"), "same-origin"),
        (of("cross-origin-resource-policy"), "same-origin"),
        (
            of("permissions-policy"),
            "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
        ),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// After something was done: look there.
pub(super) fn see(place: &str) -> Response {
    let mut response = with_headers(StatusCode::SEE_OTHER, "text/plain; charset=utf-8", "");
    if let Ok(place) = HeaderValue::from_str(place) {
        response.headers_mut().insert(LOCATION, place);
    }
    response
}

pub(super) fn allow(mut response: Response, methods: &'static str) -> Response {
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

pub(super) fn again_after(mut response: Response, seconds: u32) -> Response {
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    response
}

/// Gives a browser a cookie, or takes it away.
pub(super) fn keep_cookie(response: &mut Response, name: &str, cookie: Option<&str>, secure: bool) {
    let secure = if secure { "; Secure" } else { "" };
    let text = match cookie {
        Some(cookie) => format!("{name}={cookie}; Path=/; HttpOnly; SameSite=Lax{secure}"),
        None => format!("{name}=; Path=/; HttpOnly; SameSite=Lax; Max-Age=0{secure}"),
    };
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().append(SET_COOKIE, value);
    }
}
