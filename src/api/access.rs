//! Who asks: the bearer token, its enterprise and role, and how often it may ask.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use hyper::{HeaderMap, StatusCode, header::AUTHORIZATION};
use uuid::Uuid;

use super::{Site, answer::ApiRefused};
use crate::desk::{Role, Token, TokenHolder};

/// Tokens whose rate is remembered at most; beyond that those go that have all of it left.
const REMEMBERED_MAX: usize = 10_000;

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
        headers: &HeaderMap,
        enterprise_id: &str,
        role: Role,
    ) -> Result<TokenHolder, ApiRefused> {
        let token = bearer(headers).ok_or_else(ApiRefused::unauthorized)?;
        let holder = self.desk.holder(&token).await?.ok_or_else(ApiRefused::unauthorized)?;
        let rate = holder.rate.and_then(|rate| u32::try_from(rate).ok());
        let rate = rate.unwrap_or(self.settings.rate_per_token);
        if !self.rates.take(holder.token, rate, Instant::now()) {
            return Err(ApiRefused::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_requests",
                format!("this token may ask {rate} times a second"),
            )
            .again_after(1));
        }
        if holder.enterprise_id != enterprise_id || holder.role != role {
            return Err(ApiRefused::forbidden());
        }
        Ok(holder)
    }
}

/// How much each token has left of its rate: as much as a second brings, and no more.
#[derive(Debug, Default)]
pub(super) struct Rates(Mutex<HashMap<Uuid, Left>>);

#[derive(Clone, Copy, Debug)]
struct Left {
    requests: f64,
    at: Instant,
    rate: u32,
}

impl Left {
    fn now(&self, now: Instant) -> f64 {
        let rate = f64::from(self.rate);
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        (self.requests + passed * rate).min(rate)
    }
}

impl Rates {
    /// Whether a token may ask once more.
    fn take(&self, token: Uuid, rate: u32, now: Instant) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED_MAX && !all.contains_key(&token) {
            all.retain(|_, left| left.now(now) < f64::from(left.rate));
        }
        let left = all.entry(token).or_insert(Left {
            requests: f64::from(rate),
            at: now,
            rate,
        });
        let requests = Left { rate, ..*left }.now(now);
        let may = requests >= 1.0;
        *left = Left {
            requests: if may { requests - 1.0 } else { requests },
            at: now,
            rate,
        };
        may
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_token_has_as_many_requests_as_a_second_brings() {
        let (rates, start) = (Rates::default(), Instant::now());
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let taken = |token, after: u64| {
            let now = start + Duration::from_millis(after);
            (0..20).filter(|_| rates.take(token, 10, now)).count()
        };
        assert_eq!(taken(one, 0), 10);
        assert_eq!(taken(one, 0), 0);
        assert_eq!(taken(other, 0), 10, "each has its own");
        assert_eq!(taken(one, 350), 3);
        assert_eq!(taken(one, 60_000), 10, "and no more than that");
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
