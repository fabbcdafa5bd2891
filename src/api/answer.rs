//! How answers look: JSON, and for what is refused the public API's error: `error`, a sentence; `name`, for programs;
//! `requestId`; and `context`, what more there is to say.

use std::borrow::Cow;

use axum::{body::Body, response::Response};
use hyper::{
    StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE},
    http::HeaderValue,
};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::desk::{Refusal, RefusalKind};

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A request that is not done.
#[derive(Debug)]
pub(super) struct ApiRefused {
    status: StatusCode,
    name: Cow<'static, str>,
    error: String,
    context: Option<Box<Value>>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// What the operator is to know of it, and the one who asked is not.
    pub(super) ours: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shape<'a> {
    error: &'a str,
    name: &'a str,
    request_id: Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<&'a Value>,
}

impl ApiRefused {
    pub(super) fn new(status: StatusCode, name: impl Into<Cow<'static, str>>, error: impl Into<String>) -> Self {
        Self {
            status,
            name: name.into(),
            error: error.into(),
            context: None,
            headers: Vec::new(),
            ours: None,
        }
    }

    /// What was asked is not what can be asked.
    pub(super) fn invalid(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", error)
    }

    /// No token, or none that counts. Which of it, is nobody's business.
    pub(super) fn unauthorized() -> Self {
        Self::new(
            StatusCode::UNAUTHORIZED,
            "unauthorized",
            "send a token that counts: Authorization: Bearer ...",
        )
        .challenge()
    }

    /// The token is another's: whether there is what was asked for is not said.
    pub(super) fn forbidden() -> Self {
        Self::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            "this token may not ask for this: it is of another enterprise, or of another role",
        )
    }

    pub(super) fn not_found(what: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", what)
    }

    /// Nothing is wrong with the request: it may be sent again.
    pub(super) fn unavailable(error: impl Into<String>, again_after: u32) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", error).again_after(again_after)
    }

    pub(super) fn again_after(mut self, seconds: u32) -> Self {
        self.headers.push((RETRY_AFTER, HeaderValue::from(seconds)));
        self
    }

    /// A 401 says how to do better.
    pub(super) fn challenge(mut self) -> Self {
        self.headers
            .push((WWW_AUTHENTICATE, HeaderValue::from_static("Bearer")));
        self
    }

    pub(super) fn allow(mut self, methods: &'static str) -> Self {
        self.headers.push((ALLOW, HeaderValue::from_static(methods)));
        self
    }

    /// What is left of the request is not read.
    pub(super) fn hang_up(mut self) -> Self {
        self.headers.push((CONNECTION, HeaderValue::from_static("close")));
        self
    }

    pub(super) fn context(mut self, context: Value) -> Self {
        self.context = Some(Box::new(context));
        self
    }

    fn because(mut self, ours: String) -> Self {
        self.ours = Some(ours);
        self
    }

    pub(super) fn answer(&self, request: Uuid) -> Response {
        let shape = Shape {
            error: &self.error,
            name: &self.name,
            request_id: request,
            context: self.context.as_deref(),
        };
        let mut response = json(self.status, &shape);
        response.headers_mut().extend(self.headers.iter().cloned());
        response
    }
}

/// What the desk can not do is ours, whatever it is: the words are for the operator's log.
impl From<Refusal> for ApiRefused {
    fn from(refusal: Refusal) -> Self {
        match refusal.kind {
            RefusalKind::Away => {
                ApiRefused::unavailable("the service can not answer now; send the same request again", 5)
                    .because(refusal.message)
            }
            RefusalKind::Refused | RefusalKind::Usage | RefusalKind::Ours | RefusalKind::Right => {
                internal(refusal.message)
            }
        }
    }
}

/// A fault of ours.
pub(super) fn internal(ours: String) -> ApiRefused {
    ApiRefused::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        "the service has a fault; its operator is told, and the same request may be sent again later",
    )
    .because(ours)
}

/// A document.
pub(super) fn json(status: StatusCode, document: &impl Serialize) -> Response {
    match serde_json::to_vec(document) {
        Ok(text) => text_of(status, text),
        // Maps with keys that are no text; none of ours has such.
        Err(_) => text_of(StatusCode::INTERNAL_SERVER_ERROR, b"{}".to_vec()),
    }
}

pub(super) fn text_of(status: StatusCode, text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An answer that says where to look later.
pub(super) fn at(mut response: Response, location: &str) -> Response {
    if let Ok(location) = HeaderValue::from_str(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}
