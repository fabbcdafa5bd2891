//! Who is let in, and as what.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hyper::{HeaderMap, header::COOKIE};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::{
    issuer::IssuerDoor,
    people::People,
    sessions::{is_same, secret},
    who::{ConsoleRole, LetIn, NotLetIn, WayIn, name_of},
};
use crate::{
    config::{ConsoleSettings, Settings},
    http::rates::Rates,
};

/// The cookie's name.
pub(super) const COOKIE_NAME: &str = "settled_console";
/// The name of the one that a browser keeps while somebody is at the issuer's.
pub(super) const WAY_COOKIE: &str = "settled_console_way";
/// The name of the one by which a page that asks whether to sign in is told from another's link.
pub(super) const ASKED_COOKIE: &str = "settled_console_asked";
/// The shortest secret of a proxy.
const PROXY_SECRET_MIN: usize = 16;
/// How often another link may be printed because somebody opened one that is too old.
const PRINT_AGAIN: Duration = Duration::from_secs(60);

/// Who may come in.
pub(super) enum FrontDoor {
    /// Whoever opens the one-time link.
    Link(OneTimeLink),
    /// Whom a proxy signs in.
    Proxy(ProxyDoor),
    /// Whom an issuer signs in.
    Issuer(Box<IssuerDoor>),
}

impl FrontDoor {
    /// The door that the settings ask for. On another address than loopback somebody signs people in, or there is none.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub(super) fn of(settings: &Settings, operator: &str) -> Result<Self, String> {
        let console = &settings.console;
        let by_proxy = console.proxy_secret_file.is_some() || console.proxy_ca_file.is_some();
        match (by_proxy, !console.oidc_issuer.is_empty()) {
            (true, true) => Err(
                "console.oidc_issuer is set, and console.proxy_secret_file or console.proxy_ca_file as well: \
                                 either an issuer signs people in, or a proxy does"
                    .to_owned(),
            ),
            (true, false) => Ok(FrontDoor::Proxy(ProxyDoor::new(console)?)),
            (false, true) => Ok(FrontDoor::Issuer(Box::new(IssuerDoor::of(settings)?))),
            (false, false) if is_loopback(console.listen) => Ok(FrontDoor::Link(OneTimeLink {
                operator: operator.to_owned(),
                role: console.link_role.into(),
                lasts: console.link_lasts,
                open: Mutex::default(),
            })),
            (false, false) => Err(format!(
                "console.listen is {}, which others can reach, and nobody says who they are: set console.oidc_issuer, or put a \
                 proxy before it that signs people in (console.proxy_secret_file or console.proxy_ca_file), or listen on loopback",
                console.listen
            )),
        }
    }
}

pub(super) fn is_loopback(listen: SocketAddr) -> bool {
    listen.ip().to_canonical().is_loopback()
}

/// A link that lets whoever opens it in, once.
pub(super) struct OneTimeLink {
    operator: String,
    role: ConsoleRole,
    lasts: Duration,
    open: Mutex<Option<OpenLink>>,
}

struct OpenLink {
    secret: String,
    made: Instant,
}

impl OneTimeLink {
    /// Another link; the one before it opens nothing any more.
    ///
    /// # Errors
    /// The system has no chance to give.
    pub(super) fn renew(&self, now: Instant) -> Result<String, String> {
        let fresh = secret()?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open = Some(OpenLink {
            secret: fresh.clone(),
            made: now,
        });
        Ok(fresh)
    }

    /// Whom a link's secret would let in; it stays good.
    pub(super) fn look(&self, given: &str, now: Instant) -> Option<LetIn> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let one = open.as_ref()?;
        let is_young = now.saturating_duration_since(one.made) < self.lasts;
        (is_young && is_same(given, &one.secret)).then(|| self.let_in())
    }

    /// The same, and it opens nothing any more.
    pub(super) fn take(&self, given: &str, now: Instant) -> Option<LetIn> {
        let found = self.look(given, now)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        // Two may have looked at once.
        let is_it = open.as_ref().is_some_and(|one| is_same(given, &one.secret));
        is_it.then(|| {
            *open = None;
            found
        })
    }

    /// Whether another one should be printed: the last is used or too old, and not only just.
    pub(super) fn is_over(&self, now: Instant) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.as_ref().is_none_or(|one| {
            let age = now.saturating_duration_since(one.made);
            age >= self.lasts && age >= PRINT_AGAIN.min(self.lasts)
        })
    }

    fn let_in(&self) -> LetIn {
        LetIn {
            name: self.operator.clone(),
            role: self.role,
            partners: None,
            entrance: WayIn::Link,
        }
    }
}

/// Whom a proxy lets in.
pub(super) struct ProxyDoor {
    /// None: its certificate says that it is the proxy.
    secret: Option<String>,
    secret_header: String,
    user_header: String,
    groups_header: String,
    people: People,
}

impl ProxyDoor {
    fn new(settings: &ConsoleSettings) -> Result<Self, String> {
        Ok(Self {
            secret: settings.proxy_secret_file.as_deref().map(proxy_secret).transpose()?,
            secret_header: settings.proxy_secret_header.clone(),
            user_header: settings.proxy_user_header.clone(),
            groups_header: settings.proxy_groups_header.clone(),
            people: People::of(settings)?,
        })
    }

    /// Whom the proxy says it is.
    pub(super) fn admit(&self, headers: &HeaderMap) -> Result<LetIn, NotLetIn> {
        if let Some(secret) = &self.secret {
            let given = only(headers, &self.secret_header).ok_or(NotLetIn::NotByProxy)?;
            if !is_same(given, secret) {
                return Err(NotLetIn::NotByProxy);
            }
        }
        let name = only(headers, &self.user_header)
            .and_then(name_of)
            .ok_or(NotLetIn::NoName)?;
        let groups: Vec<String> = only(headers, &self.groups_header)
            .unwrap_or_default()
            .split(',')
            .map(|group| group.trim().to_owned())
            .collect();
        let found = self.people.find(name, &groups);
        let (role, partners) = found.ok_or_else(|| NotLetIn::Unlisted(name.to_owned()))?;
        Ok(LetIn {
            name: name.to_owned(),
            role,
            partners,
            entrance: WayIn::Proxy,
        })
    }
}

fn proxy_secret(file: &Path) -> Result<String, String> {
    let wrong = |why: &str| format!("console.proxy_secret_file: {}: {why}", file.display());
    let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
    let secret = text.trim();
    if secret.len() < PROXY_SECRET_MIN {
        return Err(wrong("the secret must have 16 bytes or more"));
    }
    Ok(secret.to_owned())
}

/// A header that stands there once. A second one may be the asker's own, which the proxy let through.
fn only<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut all = headers.get_all(name).iter();
    match (all.next(), all.next()) {
        // As bytes: a name may have letters beyond ASCII.
        (Some(one), None) => std::str::from_utf8(one.as_bytes()).ok().map(str::trim),
        _ => None,
    }
}

/// A cookie that a browser has.
pub(super) fn cookie<'h>(headers: &'h HeaderMap, wanted: &str) -> Option<&'h str> {
    let all = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    all.flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == wanted)
        .map(|(_, value)| value)
}

/// Who asks without being signed in: how often each address may, how often all of them together, and how many at once.
pub(super) struct Strangers {
    rate: u32,
    of_all: u32,
    /// By address; none: all together.
    rates: Rates<Option<IpAddr>>,
    places: Semaphore,
}

impl Strangers {
    pub(super) fn new(settings: &ConsoleSettings) -> Self {
        Self {
            rate: settings.rate_of_strangers,
            of_all: settings.rate_of_all_strangers,
            rates: Rates::default(),
            places: Semaphore::new(settings.strangers_max),
        }
    }

    /// Whether one more may ask from this address.
    pub(super) fn take(&self, from: IpAddr, now: Instant) -> bool {
        self.rates.take(&[(None, self.of_all), (Some(from), self.rate)], now)
    }

    /// A place for one whose answer takes time; none where there is none.
    pub(super) fn place(&self) -> Option<SemaphorePermit<'_>> {
        self.places.try_acquire().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Sources;

    fn asked(door: &ProxyDoor, headers: &[(&'static str, &str)]) -> Result<(String, ConsoleRole), NotLetIn> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                *name,
                hyper::http::HeaderValue::from_bytes(value.as_bytes()).expect("a value"),
            );
        }
        door.admit(&map).map(|let_in| (let_in.name, let_in.role))
    }

    fn console_settings() -> ConsoleSettings {
        let defaults = Settings::load(Sources {
            file: None,
            environment: std::iter::empty(),
            flags: Vec::new(),
        });
        defaults.expect("the defaults").console
    }

    fn proxy(readers: &[&str]) -> ProxyDoor {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let mut settings = console_settings();
        settings.approvers = list(&["bob", "@leads"]);
        settings.operators = list(&["ann"]);
        settings.readers = list(readers);
        ProxyDoor {
            secret: Some("a secret of the proxy".to_owned()),
            secret_header: "x-secret".to_owned(),
            user_header: "x-user".to_owned(),
            groups_header: "x-groups".to_owned(),
            people: People::of(&settings).expect("they can be read"),
        }
    }

    #[test]
    fn a_proxy_is_believed_for_its_secret_only() {
        let door = proxy(&["@staff"]);
        let right = ("x-secret", "a secret of the proxy");
        let known = |name: &str, role| Ok((name.to_owned(), role));
        assert_eq!(
            asked(&door, &[right, ("x-user", "ann")]),
            known("ann", ConsoleRole::Operator)
        );
        assert_eq!(
            asked(&door, &[right, ("x-user", "zoë"), ("x-groups", "x, leads")]),
            known("zoë", ConsoleRole::Approver)
        );
        assert_eq!(
            asked(&door, &[right, ("x-user", "eve"), ("x-groups", "staff")]),
            known("eve", ConsoleRole::Reader)
        );
        assert_eq!(
            asked(&door, &[right, ("x-user", "eve")]),
            Err(NotLetIn::Unlisted("eve".to_owned()))
        );
        for wrong in [
            &[("x-user", "ann")][..],
            &[("x-user", "ann"), ("x-secret", "another secret here")],
            &[("x-user", "ann"), ("x-secret", "")],
            &[("x-user", "ann"), right, right],
        ] {
            assert_eq!(asked(&door, wrong), Err(NotLetIn::NotByProxy), "{wrong:?}");
        }
        for nameless in [
            &[right][..],
            &[right, ("x-user", "")],
            &[right, ("x-user", "ann"), ("x-user", "bob")],
        ] {
            assert_eq!(asked(&door, nameless), Err(NotLetIn::NoName), "{nameless:?}");
        }
        let open = proxy(&["*"]);
        assert_eq!(
            asked(&open, &[right, ("x-user", "eve")]),
            known("eve", ConsoleRole::Reader)
        );
    }

    #[test]
    fn a_link_opens_once_and_for_a_while() {
        let link = OneTimeLink {
            operator: "ann".to_owned(),
            role: ConsoleRole::Operator,
            lasts: Duration::from_secs(100),
            open: Mutex::default(),
        };
        let now = Instant::now();
        let later = |seconds| now + Duration::from_secs(seconds);
        assert!(link.is_over(now));
        let secret = link.renew(now).expect("chance");
        assert!(link.look(&secret, later(99)).is_some() && link.take("another", now).is_none());
        assert!(link.look(&secret, later(100)).is_none() && link.is_over(later(100)) && !link.is_over(later(99)));
        let let_in = link.take(&secret, now).expect("it is good");
        assert_eq!((let_in.name.as_str(), let_in.role), ("ann", ConsoleRole::Operator));
        assert!(link.take(&secret, now).is_none() && link.look(&secret, now).is_none());
        let first = link.renew(now).expect("chance");
        link.renew(now).expect("chance");
        assert!(link.take(&first, now).is_none(), "another one is printed");
    }

    #[test]
    fn strangers_are_bounded_by_address_and_together() {
        let mut settings = console_settings();
        (settings.rate_of_strangers, settings.rate_of_all_strangers) = (3, 5);
        let start = Instant::now();
        let strangers = Strangers::new(&settings);
        let asks = |last: u8, now| strangers.take(IpAddr::from([10, 0, 0, last]), now);
        assert_eq!((0..9).filter(|_| asks(1, start)).count(), 3);
        assert!(asks(2, start), "another address has its own");
        assert_eq!((0..9).filter(|_| asks(3, start)).count(), 1, "they are five together");
        let later = start + Duration::from_secs(1);
        assert!(asks(1, later), "a second later");
        // At once there are only so many.
        let strangers = Strangers::new(&ConsoleSettings {
            strangers_max: 1,
            ..settings
        });
        let first = strangers.place();
        assert!(first.is_some() && strangers.place().is_none());
        drop(first);
        assert!(strangers.place().is_some());
    }

    #[test]
    fn a_cookie_is_found_among_others() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(COOKIE, text.parse().expect("a value"));
            cookie(&headers, COOKIE_NAME).map(str::to_owned)
        };
        assert_eq!(of("a=b; settled_console=x; c=d").as_deref(), Some("x"));
        for none in ["", "xsettled_console=x", "settled_console", "a=settled_console=x"] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
