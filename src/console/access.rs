//! Who is let in, and as what.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hyper::{HeaderMap, header::COOKIE};

use super::sessions::{WayIn, is_same, secret};
use crate::{
    config::{ConsoleSettings, LinkRole},
    desk::Author,
};

/// What somebody may do here. Each may what those before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConsoleRole {
    /// Look.
    Reader,
    /// Act.
    Operator,
    /// Approve what somebody else planned.
    Approver,
}

impl ConsoleRole {
    pub const ALL: [ConsoleRole; 3] = [ConsoleRole::Reader, ConsoleRole::Operator, ConsoleRole::Approver];

    pub fn as_str(self) -> &'static str {
        match self {
            ConsoleRole::Reader => "reader",
            ConsoleRole::Operator => "operator",
            ConsoleRole::Approver => "approver",
        }
    }
}

impl From<LinkRole> for ConsoleRole {
    fn from(role: LinkRole) -> Self {
        match role {
            LinkRole::Reader => ConsoleRole::Reader,
            LinkRole::Operator => ConsoleRole::Operator,
            LinkRole::Approver => ConsoleRole::Approver,
        }
    }
}

/// What a route needs of whoever asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: what one sees before one is signed in.
    Nobody,
    /// To be signed in with this role at least, also where nobody may change anything.
    Look(ConsoleRole),
    /// The same; it changes something.
    Change(ConsoleRole),
}

/// The cookie's name.
pub(super) const COOKIE_NAME: &str = "settled_console";
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
}

impl FrontDoor {
    /// The door that the settings ask for. Another address than loopback has one by a proxy, or none.
    ///
    /// # Errors
    /// A sentence about the setting that is wrong.
    pub(super) fn of(settings: &ConsoleSettings, operator: &str) -> Result<Self, String> {
        match &settings.proxy_secret_file {
            Some(file) => Ok(FrontDoor::Proxy(ProxyDoor::new(settings, file)?)),
            None if is_loopback(settings.listen) => Ok(FrontDoor::Link(OneTimeLink {
                operator: operator.to_owned(),
                role: settings.link_role.into(),
                lasts: settings.link_lasts,
                open: Mutex::default(),
            })),
            None => Err(format!(
                "console.listen is {}, which others can reach, and nobody says who they are: set console.proxy_secret_file and \
                 put a proxy before it that signs people in, or listen on loopback",
                settings.listen
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

/// Whom a link is for.
#[derive(Clone, Debug)]
pub(super) struct LetIn {
    pub(super) name: String,
    pub(super) role: ConsoleRole,
    pub(super) entrance: WayIn,
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
            entrance: WayIn::Link,
        }
    }
}

/// Whom a proxy lets in.
pub(super) struct ProxyDoor {
    secret: String,
    secret_header: String,
    user_header: String,
    groups_header: String,
    lists: [(ConsoleRole, Vec<String>); 3],
}

/// Why a request is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotLetIn {
    /// It did not come through the proxy.
    NotByProxy,
    /// The proxy says no name, or none that can be one.
    NoName,
    /// No list has them.
    Unlisted(String),
}

impl ProxyDoor {
    fn new(settings: &ConsoleSettings, file: &Path) -> Result<Self, String> {
        let wrong = |why: &str| format!("console.proxy_secret_file: {}: {why}", file.display());
        let text = std::fs::read_to_string(file).map_err(|error| wrong(&error.to_string()))?;
        let secret = text.trim();
        if secret.len() < PROXY_SECRET_MIN {
            return Err(wrong("the secret must have 16 bytes or more"));
        }
        Ok(Self {
            secret: secret.to_owned(),
            secret_header: settings.proxy_secret_header.clone(),
            user_header: settings.proxy_user_header.clone(),
            groups_header: settings.proxy_groups_header.clone(),
            lists: [
                (ConsoleRole::Approver, settings.approvers.clone()),
                (ConsoleRole::Operator, settings.operators.clone()),
                (ConsoleRole::Reader, settings.readers.clone()),
            ],
        })
    }

    /// Whom the proxy says it is.
    pub(super) fn admit(&self, headers: &HeaderMap) -> Result<LetIn, NotLetIn> {
        let secret = only(headers, &self.secret_header).ok_or(NotLetIn::NotByProxy)?;
        if !is_same(secret, &self.secret) {
            return Err(NotLetIn::NotByProxy);
        }
        let name = only(headers, &self.user_header)
            .filter(|name| Author::operator(name).is_ok() && !name.chars().any(char::is_control))
            .ok_or(NotLetIn::NoName)?;
        let groups: Vec<&str> = only(headers, &self.groups_header)
            .unwrap_or_default()
            .split(',')
            .map(str::trim)
            .collect();
        let holds = |entry: &String| match entry.strip_prefix('@') {
            Some(group) => groups.contains(&group),
            None => entry == "*" || entry == name,
        };
        let role = self.lists.iter().find(|(_, list)| list.iter().any(holds));
        let (role, _) = role.ok_or_else(|| NotLetIn::Unlisted(name.to_owned()))?;
        Ok(LetIn {
            name: name.to_owned(),
            role: *role,
            entrance: WayIn::Proxy,
        })
    }
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

/// The session's cookie.
pub(super) fn cookie(headers: &HeaderMap) -> Option<&str> {
    let all = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    all.flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(name, _)| *name == COOKIE_NAME)
        .map(|(_, value)| value)
}

/// Requests of everybody who is not signed in.
pub(super) struct Strangers {
    rate: u32,
    left: Mutex<(f64, Instant)>,
}

impl Strangers {
    pub(super) fn new(rate: u32) -> Self {
        Self {
            rate,
            left: Mutex::new((f64::from(rate), Instant::now())),
        }
    }

    /// Whether one more may ask.
    pub(super) fn take(&self, now: Instant) -> bool {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = f64::from(self.rate);
        let (before, at) = *left;
        let there = (before + now.saturating_duration_since(at).as_secs_f64() * rate).min(rate);
        let may = there >= 1.0;
        *left = (if may { there - 1.0 } else { there }, now);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(operators: &[&str], readers: &[&str]) -> ProxyDoor {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        ProxyDoor {
            secret: "a secret of the proxy".to_owned(),
            secret_header: "x-secret".to_owned(),
            user_header: "x-user".to_owned(),
            groups_header: "x-groups".to_owned(),
            lists: [
                (ConsoleRole::Approver, list(&["bob", "@leads"])),
                (ConsoleRole::Operator, list(operators)),
                (ConsoleRole::Reader, list(readers)),
            ],
        }
    }

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

    #[test]
    fn a_proxy_is_believed_for_its_secret_only() {
        let door = proxy(&["ann"], &["@staff"]);
        let right = ("x-secret", "a secret of the proxy");
        let known = |name: &str, role| Ok((name.to_owned(), role));
        assert_eq!(
            asked(&door, &[right, ("x-user", "ann")]),
            known("ann", ConsoleRole::Operator)
        );
        assert_eq!(
            asked(&door, &[right, ("x-user", "bob")]),
            known("bob", ConsoleRole::Approver)
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
        let open = proxy(&[], &["*"]);
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
    fn a_cookie_is_found_among_others() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(COOKIE, text.parse().expect("a value"));
            cookie(&headers).map(str::to_owned)
        };
        assert_eq!(of("a=b; settled_console=x; c=d").as_deref(), Some("x"));
        for none in ["", "xsettled_console=x", "settled_console", "a=settled_console=x"] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
