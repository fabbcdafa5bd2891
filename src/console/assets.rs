//! What a page needs besides itself, compiled in.

use axum::response::Response;
use hyper::{StatusCode, header::CACHE_CONTROL, http::HeaderValue};

use super::answer::with_headers;

/// A file, under a path that changes with the program's version.
pub(super) struct Asset {
    pub(super) path: &'static str,
    kind: &'static str,
    content: &'static [u8],
}

macro_rules! asset {
    ($name:literal, $kind:literal) => {
        Asset {
            path: concat!("/assets/", env!("CARGO_PKG_VERSION"), "-", $name),
            kind: $kind,
            content: include_bytes!(concat!("assets/", $name)),
        }
    };
}

pub(super) const STYLE: Asset = asset!("console.css", "text/css; charset=utf-8");
pub(super) const SCRIPT: Asset = asset!("console.js", "text/javascript; charset=utf-8");
/// Of the package htmx.org; its licence lies beside it.
pub(super) const HTMX: Asset = asset!("htmx-2.0.11.min.js", "text/javascript; charset=utf-8");
pub(super) const ICON: Asset = asset!("icon.svg", "image/svg+xml");

pub(super) fn asset(name: &str) -> Response {
    let found = [STYLE, SCRIPT, HTMX, ICON]
        .into_iter()
        .find(|asset| asset.path.strip_prefix("/assets/") == Some(name));
    let Some(Asset { kind, content, .. }) = found else {
        return with_headers(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "no such file\n");
    };
    let mut response = with_headers(StatusCode::OK, kind, content);
    let an_hour = HeaderValue::from_static("private, max-age=3600");
    response.headers_mut().insert(CACHE_CONTROL, an_hour);
    response
}
