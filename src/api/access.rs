//! Who asks: the bearer token, its enterprise and role, and how often it may ask. Who is not known yet is a stranger.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use axum::extract::FromRequestParts;
use hyper::{HeaderMap, StatusCode, header::AUTHORIZATION, http::request::Parts};
use uuid::Uuid;

use super::{Site, answer::ApiRefused};
use crate::{
    config::ApiSettings,
    desk::{Role, Token, TokenHolder},
    http::{
        door::Pulse,
        rates::{REMEMBERED_MAX, Rates},
    },
};

/// What a request brings along: its headers, and its connection.
pub(super) struct Asker {
    pub(super) headers: HeaderMap,
    pub(super) pulse: Option<Arc<Pulse>>,
}

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self {
            headers: parts.headers.clone(),
            pulse: parts.extensions.get().cloned(),
        })
    }
}

impl Asker {
    fn from(&self) -> IpAddr {
        self.pulse
            .as_ref()
            .map_or(Ipv4Addr::UNSPECIFIED.into(), |pulse| pulse.network)
    }
}

/// The token of a request. A second one, another scheme or another form is none.
fn bearer(headers: &HeaderMap) -> Option<Token> {
    let mut all = headers.get_all(AUTHORIZATION).iter();
    let (first, second) = (all.next()?, all.next());
    if second.is_some() {
        return None;
    }
    let (scheme, token) = first.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    Token::parse(token.trim_matches(' '))
}

impl Site {
    /// Whoever asks for an enterprise, in a role: who it is, or why not.
    pub(super) async fn admit(
        &self,
        asker: &Asker,
        enterprise_id: &str,
        role: Role,
    ) -> Result<TokenHolder, ApiRefused> {
        let token = bearer(&asker.headers).ok_or_else(ApiRefused::unauthorized)?;
        let stranger = self.strangers.meet(&token, asker.from(), Instant::now())?;
        let Some(holder) = self.desk.holder(&token).await? else {
            self.strangers.forget(&token);
            return Err(ApiRefused::unauthorized());
        };
        if let Some(stranger) = stranger {
            self.strangers.know(&token, &stranger);
        }
        let rate = holder.rate.and_then(|rate| u32::try_from(rate).ok());
        let rate = rate.unwrap_or(self.settings.rate_per_token);
        if !self.rates.take(&[(holder.token, rate)], Instant::now()) {
            return Err(too_many(format!("this token may ask {rate} times a second")));
        }
        if holder.enterprise_id != enterprise_id || holder.role != role {
            return Err(ApiRefused::forbidden());
        }
        Ok(holder)
    }
}

/// Nothing is wrong but how often, or how many at once.
pub(super) fn too_many(error: impl Into<String>) -> ApiRefused {
    ApiRefused::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", error).again_after(1)
}

/// How often is asked with tokens that do not count. Anybody can make up such, and each costs a question to the database: so many
/// a second are asked of one address and of all, and the next is turned away before. A token that is known to count is none of
/// these, whatever others do: those that there are, are looked up before anybody is met, and now and then.
#[derive(Debug)]
pub(super) struct UnknownTokens {
    of_all: u32,
    of_one: u32,
    /// By address; none: all together.
    rates: Rates<Option<IpAddr>>,
    /// Digests of the secrets of those that counted when they were looked up last.
    known: Mutex<HashMap<Uuid, [u8; 32]>>,
}

/// Of whom it was taken that an unknown token came.
#[derive(Debug)]
pub(super) struct Stranger(Vec<(Option<IpAddr>, u32)>);

impl UnknownTokens {
    pub(super) fn new(settings: &ApiSettings) -> Self {
        Self {
            of_all: settings.rate_of_strangers,
            of_one: settings.rate_of_strangers_per_address,
            rates: Rates::default(),
            known: Mutex::default(),
        }
    }

    /// Whether the database may be asked for a token: yes for one that is known, and else for so many.
    fn meet(&self, token: &Token, from: IpAddr, now: Instant) -> Result<Option<Stranger>, ApiRefused> {
        if self.known().get(&token.id) == Some(&token.digest()) {
            return Ok(None);
        }
        let mut of = vec![(None, self.of_all)];
        // From this machine everybody comes by a proxy.
        if !from.is_loopback() {
            of.push((Some(from), self.of_one));
        }
        if self.rates.take(&of, now) {
            return Ok(Some(Stranger(of)));
        }
        Err(too_many(
            "too many tokens were tried that do not count: send this request again",
        ))
    }

    /// It counts: it is none of the strangers, and was none.
    fn know(&self, token: &Token, Stranger(of): &Stranger) {
        self.rates.give_back(of);
        self.know_all([(token.id, token.digest())]);
    }

    /// These count. One more than there is room for, and those who ask again are known again.
    pub(super) fn know_all(&self, tokens: impl IntoIterator<Item = (Uuid, [u8; 32])>) {
        let mut known = self.known();
        if known.len() >= 2 * REMEMBERED_MAX {
            known.clear();
        }
        known.extend(tokens);
    }

    /// It does not count, or no more.
    fn forget(&self, token: &Token) {
        self.known().remove(&token.id);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Uuid, [u8; 32]>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn strangers_have_a_rate_and_who_is_known_has_not() {
        let strangers = UnknownTokens {
            of_all: 7,
            of_one: 5,
            rates: Rates::default(),
            known: Mutex::default(),
        };
        let token = |number: u128| {
            let text = format!("stl_{}_{}", Uuid::from_u128(number).simple(), "a".repeat(64));
            Token::parse(&text).expect("a token")
        };
        let start = Instant::now();
        let met = |token: &Token, from: &str| strangers.meet(token, from.parse().expect("an address"), start);
        let tried = |from: &str| (0..20).filter(|_| met(&token(9), from).is_ok()).count();
        // Before the flood: it counts, and takes nothing from anybody.
        let stranger = met(&token(1), "192.0.2.1").expect("let in").expect("a stranger");
        strangers.know(&token(1), &stranger);
        assert_eq!(tried("192.0.2.1"), 5, "of one address");
        assert_eq!(tried("192.0.2.2"), 2, "of all");
        assert_eq!(tried("192.0.2.3"), 0);
        assert!(met(&token(2), "192.0.2.9").is_err(), "who was never seen waits");
        assert!(met(&token(1), "192.0.2.1").expect("known").is_none());
        // Another secret under a known id is a stranger's.
        let forged = Token::parse(&format!("stl_{}_{}", Uuid::from_u128(1).simple(), "b".repeat(64)));
        assert!(met(&forged.expect("a token"), "192.0.2.1").is_err());
        strangers.forget(&token(1));
        assert!(met(&token(1), "192.0.2.1").is_err(), "it counts no more");
        // What was looked up is known in the flood, its secret only.
        strangers.know_all([(token(1).id, token(1).digest()), (token(3).id, [0; 32])]);
        assert!(met(&token(1), "192.0.2.1").expect("known").is_none());
        assert!(met(&token(3), "192.0.2.3").is_err());
        // By a proxy on this machine everybody comes from one address.
        let later = start + Duration::from_secs(60);
        let by_proxy = |_: &usize| strangers.meet(&token(9), IpAddr::from([127, 0, 0, 1]), later).is_ok();
        assert_eq!((0..20).filter(by_proxy).count(), 7);
    }

    #[test]
    fn only_one_bearer_token_counts() {
        let text = format!("stl_{}_{}", "0".repeat(32), "a".repeat(64));
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, value.parse().expect("a header"));
            }
            bearer(&headers).is_some()
        };
        for scheme in ["Bearer ", "bearer ", "BEARER  "] {
            assert!(of(&[&format!("{scheme}{text}")]), "{scheme}");
        }
        let right = format!("Bearer {text}");
        for wrong in [
            &[][..],
            &["Bearer"],
            &["Bearer "],
            &[&text],
            &[&format!("Basic {text}")],
            &[&format!("Bearer {text},{text}")],
            &[&right, &right],
        ] {
            assert!(!of(wrong), "{wrong:?}");
        }
    }
}
