//! Signing in by OpenID Connect: the way to the issuer, and the way back. What is acted on stands in an ID token that the issuer
//! signed for us, for this browser and for this once.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http_body_util::Full;
use hyper::{Request, Response, Uri, body::Bytes};
use openidconnect::{
    AuthorizationCode, ClientId, ClientSecret, CsrfToken, HttpRequest, HttpResponse, IssuerUrl, Nonce,
    PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, Scope, TokenResponse as _,
    core::{CoreAuthenticationFlow, CoreClient, CoreJwsSigningAlgorithm, CoreProviderMetadata},
};
use rustls::ClientConfig;
use serde_json::Value;

use super::{
    people::People,
    sessions::{is_same, secret},
    who::{LetIn, NotLetIn, WayIn, name_of},
};
use crate::{
    config::{ConsoleSettings, Settings},
    domain::digest::sha256,
    http::ask::Enquiry,
    tls::{self, ClientFiles},
};

/// Bytes of an issuer's answer at most.
const ANSWER_MAX: usize = 1 << 20;
/// How long it has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long somebody may take at the issuer's.
const WAY_LASTS: Duration = Duration::from_secs(600);
/// Those who are on the way at once. One more, and the one who left first has to begin again.
const ON_THE_WAY_MAX: usize = 1_000;
/// How long the issuer's own description is believed: a key that it no longer uses counts no longer.
const DESCRIBED_FOR: Duration = Duration::from_secs(60);
/// How long an issuer that did not answer is not asked again: whoever comes meanwhile is told so at once.
const FAILED_FOR: Duration = Duration::from_secs(5);
/// By which algorithms a token may be signed: those whose key the issuer alone has.
const SIGNED_BY: [CoreJwsSigningAlgorithm; 9] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha384,
    CoreJwsSigningAlgorithm::RsaSsaPssSha512,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
    CoreJwsSigningAlgorithm::EcdsaP384Sha384,
    CoreJwsSigningAlgorithm::EdDsa,
];

/// An issuer that signs people in.
pub(super) struct IssuerDoor {
    issuer: IssuerUrl,
    client_id: ClientId,
    client_secret: ClientSecret,
    redirect: RedirectUrl,
    scopes: Vec<Scope>,
    user_claim: String,
    groups_claim: String,
    people: People,
    trusted: Arc<ClientConfig>,
    allow_plaintext: bool,
    described: tokio::sync::Mutex<Described>,
    /// By the digest of the state that the issuer hands back.
    on_the_way: Mutex<HashMap<[u8; 32], OnTheWay>>,
}

/// What the issuer said of itself last, or why it did not; each with when that was.
#[derive(Default)]
struct Described {
    known: Option<(CoreProviderMetadata, Instant)>,
    failed: Option<(String, Instant)>,
}

/// Somebody who went to the issuer.
struct OnTheWay {
    /// Digest of what their browser keeps meanwhile.
    browser: [u8; 32],
    nonce: Nonce,
    verifier: PkceCodeVerifier,
    left: Instant,
}

/// Where to send a browser, and what it is to keep meanwhile.
pub(super) struct Departure {
    pub(super) url: String,
    pub(super) browser: String,
}

impl IssuerDoor {
    /// As the settings have it. The issuer is not asked yet.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub(super) fn of(settings: &Settings) -> Result<Self, String> {
        let console = &settings.console;
        let wanted = |name: &str, is_there: bool| match is_there {
            true => Ok(()),
            false => Err(format!(
                "console.oidc_issuer is set, and console.{name} is not: set both"
            )),
        };
        wanted("oidc_client_id", !console.oidc_client_id.is_empty())?;
        wanted("public_url", !console.public_url.is_empty())?;
        let file = console.oidc_client_secret_file.as_deref();
        wanted("oidc_client_secret_file", file.is_some())?;
        let url = |name: &str, text: &str| match is_safe(text, settings.allow_plaintext) {
            Ok(()) => Ok(()),
            Err(why) => Err(format!("console.{name} is {text:?}: {why}")),
        };
        url("oidc_issuer", &console.oidc_issuer)?;
        url("public_url", &console.public_url)?;
        let public = public_url(console);
        if public.parse::<Uri>().is_ok_and(|uri| uri.path() != "/") {
            return Err(format!("console.public_url is {public:?}: it must have no path"));
        }
        let wrong = |name: &str| format!("console.{name} is no URL");
        Ok(Self {
            issuer: IssuerUrl::new(console.oidc_issuer.clone()).map_err(|_| wrong("oidc_issuer"))?,
            client_id: ClientId::new(console.oidc_client_id.clone()),
            client_secret: ClientSecret::new(client_secret(file.unwrap_or(Path::new("")))?),
            redirect: RedirectUrl::new(format!("{public}/signed-in")).map_err(|_| wrong("public_url"))?,
            scopes: console.oidc_scopes.iter().cloned().map(Scope::new).collect(),
            user_claim: console.oidc_user_claim.clone(),
            groups_claim: console.oidc_groups_claim.clone(),
            people: People::of(console)?,
            trusted: Arc::new(
                ClientFiles {
                    section: "console",
                    ca_file: console.oidc_ca_file.clone(),
                    ..ClientFiles::default()
                }
                .config()
                .map_err(|error| error.to_string())?,
            ),
            allow_plaintext: settings.allow_plaintext,
            described: tokio::sync::Mutex::default(),
            on_the_way: Mutex::default(),
        })
    }

    fn on_the_way(&self) -> MutexGuard<'_, HashMap<[u8; 32], OnTheWay>> {
        self.on_the_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One question to the issuer.
    async fn ask(&self, request: HttpRequest) -> Result<HttpResponse, NoAnswer> {
        let uri = request.uri().clone();
        is_safe(&uri.to_string(), self.allow_plaintext).map_err(NoAnswer)?;
        let is_tls = uri.scheme_str() == Some("https");
        let enquiry = Enquiry {
            host: uri.host().unwrap_or_default(),
            port: uri.port_u16().unwrap_or(if is_tls { 443 } else { 80 }),
            tls: is_tls.then(|| Arc::clone(&self.trusted)),
            most: ANSWER_MAX,
            within: ANSWER_TIMEOUT,
        };
        let (mut head, body) = request.into_parts();
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        head.uri = path
            .parse()
            .map_err(|_| NoAnswer("its address can not be asked for".to_owned()))?;
        let request = Request::from_parts(head, Full::new(Bytes::from(body)));
        let (head, body) = enquiry.ask(request).await.map_err(NoAnswer)?.into_parts();
        Ok(Response::from_parts(head, body.to_vec()))
    }

    /// What the issuer says of itself. One asks it at a time, and whoever waited for that has its answer too, or that there is
    /// none.
    async fn described(&self, now: Instant) -> Result<CoreProviderMetadata, String> {
        let mut described = self.described.lock().await;
        let is_young = |at: Instant, most| now.saturating_duration_since(at) < most;
        if let Some((known, at)) = &described.known
            && is_young(*at, DESCRIBED_FOR)
        {
            return Ok(known.clone());
        }
        if let Some((why, at)) = &described.failed
            && is_young(*at, FAILED_FOR)
        {
            return Err(why.clone());
        }
        let ask = |request| self.ask(request);
        match CoreProviderMetadata::discover_async(self.issuer.clone(), &ask).await {
            Ok(known) => {
                *described = Described {
                    known: Some((known.clone(), now)),
                    failed: None,
                };
                Ok(known)
            }
            Err(error) => {
                let why = in_full(&error);
                described.failed = Some((why.clone(), Instant::now()));
                Err(why)
            }
        }
    }

    /// Sends somebody to the issuer.
    ///
    /// # Errors
    /// Why it can not be now.
    pub(super) async fn depart(&self, now: Instant) -> Result<Departure, String> {
        let known = self.described(now).await?;
        let browser = secret()?;
        let state = secret()?;
        let (challenge, verifier) = PkceCodeChallenge::new_random_sha256();
        let client =
            CoreClient::from_provider_metadata(known, self.client_id.clone(), Some(self.client_secret.clone()))
                .set_redirect_uri(self.redirect.clone());
        let own_state = state.clone();
        let (url, _, nonce) = client
            .authorize_url(
                CoreAuthenticationFlow::AuthorizationCode,
                move || CsrfToken::new(own_state.clone()),
                Nonce::new_random,
            )
            .add_scopes(self.scopes.iter().cloned())
            .set_pkce_challenge(challenge)
            .url();
        let mut on_the_way = self.on_the_way();
        on_the_way.retain(|_, one| now.saturating_duration_since(one.left) < WAY_LASTS);
        if on_the_way.len() >= ON_THE_WAY_MAX
            && let Some(first) = on_the_way.iter().min_by_key(|(_, one)| one.left).map(|(key, _)| *key)
        {
            on_the_way.remove(&first);
        }
        on_the_way.insert(
            sha256(state.as_bytes()),
            OnTheWay {
                browser: sha256(browser.as_bytes()),
                nonce,
                verifier,
                left: now,
            },
        );
        Ok(Departure {
            url: url.to_string(),
            browser,
        })
    }

    /// Who somebody is that comes back from the issuer: in the browser that left, and once.
    ///
    /// # Errors
    /// Why they are not let in.
    pub(super) async fn arrive(
        &self,
        code: Option<&str>,
        state: &str,
        browser: &str,
        now: Instant,
    ) -> Result<LetIn, NotLetIn> {
        // Whatever comes of it, this way is gone.
        let one = self.on_the_way().remove(&sha256(state.as_bytes()));
        let is_theirs = |one: &OnTheWay| {
            now.saturating_duration_since(one.left) < WAY_LASTS
                && is_same(&hex::encode(sha256(browser.as_bytes())), &hex::encode(one.browser))
        };
        let one = one.filter(is_theirs).ok_or(NotLetIn::NotFromHere)?;
        let code = code.ok_or(NotLetIn::NotSignedIn)?;
        let known = self.described(now).await.map_err(NotLetIn::IssuerAway)?;
        let client =
            CoreClient::from_provider_metadata(known, self.client_id.clone(), Some(self.client_secret.clone()))
                .set_redirect_uri(self.redirect.clone());
        let ask = |request| self.ask(request);
        let answer = client
            .exchange_code(AuthorizationCode::new(code.to_owned()))
            .map_err(|error| NotLetIn::IssuerAway(error.to_string()))?
            .set_pkce_verifier(one.verifier)
            .request_async(&ask)
            .await
            .map_err(|error| NotLetIn::IssuerAway(in_full(&error)))?;
        let token = answer
            .id_token()
            .ok_or_else(|| NotLetIn::IssuerAway("it answered without an ID token".to_owned()))?;
        let verifier = client.id_token_verifier().set_allowed_algs(SIGNED_BY);
        // By its keys, for us, not over, and for this once.
        token
            .claims(&verifier, &one.nonce)
            .map_err(|error| NotLetIn::NotBelieved(error.to_string()))?;
        let claims = claims_of(&token.to_string()).unwrap_or_default();
        self.known_as(&claims)
    }

    /// Who it is, by the claims of a token that is believed.
    fn known_as(&self, claims: &Value) -> Result<LetIn, NotLetIn> {
        // An address that nobody proved to be theirs says nothing of who it is.
        let is_proven = self.user_claim != "email" || claims["email_verified"] == true;
        let name = claims[&self.user_claim]
            .as_str()
            .filter(|_| is_proven)
            .and_then(name_of)
            .ok_or_else(|| NotLetIn::NoClaim(self.user_claim.clone()))?;
        let groups: Vec<String> = claims[&self.groups_claim]
            .as_array()
            .map(|groups| groups.iter().filter_map(Value::as_str).map(str::to_owned).collect())
            .unwrap_or_default();
        let (role, partners) = self
            .people
            .find(name, &groups)
            .ok_or_else(|| NotLetIn::Unlisted(name.to_owned()))?;
        Ok(LetIn {
            name: name.to_owned(),
            role,
            partners,
            entrance: WayIn::Issuer,
        })
    }
}

/// Why the issuer's answer is none.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoAnswer(String);

/// An error with what caused it.
fn in_full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Where browsers reach the console, without a slash at its end.
pub(super) fn public_url(settings: &ConsoleSettings) -> &str {
    settings.public_url.trim_end_matches('/')
}

/// Whether nobody on the way can read or change what goes to such a URL.
fn is_safe(text: &str, allow_plaintext: bool) -> Result<(), String> {
    let uri: Uri = text.parse().map_err(|_| "that is no URL".to_owned())?;
    let host = uri.host().unwrap_or_default();
    match uri.scheme_str() {
        Some("https") if !host.is_empty() => Ok(()),
        Some("http") if allow_plaintext || tls::is_loopback(host) => Ok(()),
        _ => Err("it must begin with https://, unless it is on this machine or allow_plaintext is on".to_owned()),
    }
}

fn client_secret(file: &Path) -> Result<String, String> {
    let wrong = |why: &str| format!("console.oidc_client_secret_file: {}: {why}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
    match text.trim() {
        "" => Err(wrong("it is empty")),
        text => Ok(text.to_owned()),
    }
}

/// The claims of a token that was verified.
fn claims_of(token: &str) -> Option<Value> {
    let part = token.split('.').nth(1)?;
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_to_an_issuer_goes_in_secret() {
        for text in [
            "https://sso.example/realms/ops",
            "http://127.0.0.1:1/x",
            "http://localhost:8080",
        ] {
            assert_eq!(is_safe(text, false), Ok(()), "{text}");
        }
        for text in [
            "http://sso.example",
            "ftp://sso.example",
            "sso.example",
            "https://",
            "",
            "http://127.0.0.1.evil.example",
        ] {
            assert!(is_safe(text, false).is_err(), "{text}");
        }
        assert_eq!(is_safe("http://sso.example", true), Ok(()));
    }

    #[test]
    fn claims_are_read_off_a_token() {
        let token = format!("h.{}.s", BASE64_URL_SAFE_NO_PAD.encode(r#"{"email":"a@b"}"#));
        assert_eq!(claims_of(&token).expect("claims")["email"], "a@b");
        assert!(claims_of("h").is_none() && claims_of("h.%.s").is_none());
    }
}
