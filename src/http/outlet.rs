//! The way out for traces: a question to their receiver for each export.

use std::sync::{Arc, OnceLock};

use http_body_util::Full;
use hyper::{Request, Uri};
use rustls::ClientConfig;

use super::ask::Enquiry;
use crate::{
    config::Settings,
    telemetry::Outlet,
    tls::{self, ClientFiles},
};

/// Bytes of a receiver's answer at most.
const ANSWER_MAX: usize = 64 * 1024;

/// # Errors
/// `traces.ca_file` can not be used.
pub(crate) fn outlet(settings: &Settings) -> Result<Outlet, String> {
    let within = settings.traces.export_timeout;
    let files = ClientFiles {
        section: "traces",
        ca_file: settings.traces.ca_file.clone(),
        ..ClientFiles::default()
    };
    let trusted = OnceLock::new();
    // The system's authorities are read when they are needed first, which most never are; a file of one's own is checked now.
    if files.ca_file.is_some() {
        trusted.get_or_init(|| config(&files)).as_ref().map_err(String::clone)?;
    }
    let trusted = Arc::new((trusted, files));
    let allow_plaintext = settings.allow_plaintext;
    Ok(Outlet {
        send: Box::new(move |request| {
            let trusted = Arc::clone(&trusted);
            Box::pin(async move {
                let (mut head, body) = request.into_parts();
                let address = std::mem::take(&mut head.uri);
                let is_tls = address.scheme_str() == Some("https");
                let tls = match is_tls {
                    true => Some(trusted.0.get_or_init(|| config(&trusted.1)).clone()?),
                    false => None,
                };
                let path = address.path_and_query().map_or("/", |path| path.as_str());
                head.uri = path
                    .parse()
                    .map_err(|_| "its address can not be asked for".to_owned())?;
                let enquiry = Enquiry {
                    host: address.host().unwrap_or_default(),
                    port: address.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
                    tls,
                    most: ANSWER_MAX,
                    within,
                };
                enquiry.ask(Request::from_parts(head, Full::new(body))).await
            })
        }),
        is_safe: Box::new(move |address: &Uri| {
            let is_here = address.host().is_some_and(tls::is_loopback);
            address.scheme_str() == Some("https") || is_here || allow_plaintext
        }),
    })
}

fn config(files: &ClientFiles) -> Result<Arc<ClientConfig>, String> {
    files.config().map(Arc::new).map_err(|error| error.to_string())
}
