//! Who is signed in: sessions in memory, short, and over when somebody says so. What is kept of a cookie is its digest.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::who::{ConsoleRole, LetIn, Partners, WayIn};
use crate::{config::ConsoleSettings, domain::digest::sha256, http::rates::Rates};

/// Bytes of chance in a cookie, a link, or a form's token.
const SECRET: usize = 32;

/// Whoever asks.
#[derive(Clone, Debug)]
pub(super) struct Viewer {
    /// Of the session; it is no secret.
    pub(super) session: Uuid,
    pub(super) name: String,
    pub(super) role: ConsoleRole,
    pub(super) partners: Partners,
    pub(super) entrance: WayIn,
    /// What each form of this session carries.
    pub(super) form_token: String,
}

/// A session, as a list shows it.
#[derive(Clone, Debug)]
pub(super) struct SessionShown {
    pub(super) viewer: Viewer,
    pub(super) began: Timestamp,
    pub(super) idle: Duration,
}

/// That a name is not let in, though the proxy vouches for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeptOut {
    /// They signed out, and may sign in again.
    pub(super) own: bool,
    until: Instant,
}

struct Kept {
    viewer: Viewer,
    began: Timestamp,
    begun: Instant,
    used: Instant,
}

/// Something that nobody guesses, in hexadecimal.
///
/// # Errors
/// The system has no chance to give.
pub(super) fn secret() -> Result<String, String> {
    let mut bytes = [0; SECRET];
    getrandom::fill(&mut bytes).map_err(|error| format!("the system gives no random bytes: {error}"))?;
    Ok(hex::encode(bytes))
}

/// Whether two texts are the same, in a time that says nothing of where they differ.
pub(super) fn is_same(left: &str, right: &str) -> bool {
    sha256(left.as_bytes()).ct_eq(&sha256(right.as_bytes())).into()
}

/// What came of looking for a session.
#[derive(Debug)]
pub(super) enum Found {
    Viewer(Viewer),
    /// It asks too often.
    TooOften,
    Nobody,
}

/// What came of somebody whom the proxy names.
#[derive(Debug)]
pub(super) enum ByName {
    /// With whether their session has just begun.
    Viewer(Viewer, bool),
    TooOften,
    KeptOut(KeptOut, Duration),
}

/// The sessions that there are.
pub(super) struct Sessions {
    idle: Duration,
    lasts: Duration,
    most: usize,
    rate: u32,
    rates: Rates<[u8; 32]>,
    ended_for: Duration,
    kept: Mutex<HashMap<[u8; 32], Kept>>,
    ended: Mutex<HashMap<String, KeptOut>>,
}

impl Sessions {
    pub(super) fn new(settings: &ConsoleSettings) -> Self {
        Self {
            idle: settings.session_idle,
            lasts: settings.session_lasts,
            most: settings.sessions_max,
            rate: settings.rate_per_session,
            rates: Rates::default(),
            ended_for: settings.ended_for,
            kept: Mutex::default(),
            ended: Mutex::default(),
        }
    }

    fn ended(&self) -> MutexGuard<'_, HashMap<String, KeptOut>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<[u8; 32], Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one, and answers its cookie. No cookie that somebody brings along becomes a session.
    ///
    /// # Errors
    /// The system has no chance to give.
    pub(super) fn begin(&self, let_in: LetIn, now: Instant) -> Result<(String, Viewer), String> {
        let cookie = secret()?;
        let viewer = self.keep(sha256(cookie.as_bytes()), let_in, now)?;
        Ok((cookie, viewer))
    }

    fn keep(&self, key: [u8; 32], let_in: LetIn, now: Instant) -> Result<Viewer, String> {
        let viewer = Viewer {
            session: Uuid::new_v4(),
            name: let_in.name,
            role: let_in.role,
            partners: let_in.partners,
            entrance: let_in.entrance,
            form_token: secret()?,
        };
        let mut kept = self.kept();
        kept.retain(|_, one| self.is_alive(one, now));
        // Of two first requests of a name at once the second finds the first one's: a cookie's key is nobody else's.
        if let Some(one) = kept.get(&key) {
            return Ok(one.viewer.clone());
        }
        if kept.len() >= self.most
            && let Some(oldest) = kept.iter().min_by_key(|(_, one)| one.used).map(|(key, _)| *key)
        {
            kept.remove(&oldest);
        }
        kept.insert(
            key,
            Kept {
                viewer: viewer.clone(),
                began: Timestamp::now(),
                begun: now,
                used: now,
            },
        );
        Ok(viewer)
    }

    /// The session of somebody whom the proxy names with every request: one for each name, whatever browsers they have and
    /// whatever cookies these lose.
    ///
    /// # Errors
    /// The system has no chance to give.
    pub(super) fn of_name(&self, let_in: LetIn, counts: bool, now: Instant) -> Result<ByName, String> {
        if let Some(ended) = self.ended().get(&let_in.name).filter(|ended| ended.until > now) {
            return Ok(ByName::KeptOut(*ended, ended.until.saturating_duration_since(now)));
        }
        let key = sha256(format!("name {}", let_in.name).as_bytes());
        match self.look(key, counts, now) {
            Found::TooOften => Ok(ByName::TooOften),
            Found::Viewer(mut viewer) => {
                // What the proxy says counts at once.
                if (viewer.role, &viewer.partners) != (let_in.role, &let_in.partners) {
                    (viewer.role, viewer.partners) = (let_in.role, let_in.partners);
                    self.is_now(&viewer);
                }
                Ok(ByName::Viewer(viewer, false))
            }
            Found::Nobody => {
                self.keep(key, let_in, now)?;
                // It is used, as any other is.
                match self.look(key, counts, now) {
                    Found::Viewer(viewer) => Ok(ByName::Viewer(viewer, true)),
                    Found::TooOften | Found::Nobody => Ok(ByName::TooOften),
                }
            }
        }
    }

    /// Lets somebody in again who signed out.
    pub(super) fn welcome(&self, name: &str) {
        let mut ended = self.ended();
        if ended.get(name).is_some_and(|one| one.own) {
            ended.remove(name);
        }
    }

    fn is_alive(&self, one: &Kept, now: Instant) -> bool {
        now.saturating_duration_since(one.used) < self.idle && now.saturating_duration_since(one.begun) < self.lasts
    }

    /// Whose cookie it is. Being asked is being used; where it does not count, it only looks.
    pub(super) fn find(&self, cookie: &str, counts: bool, now: Instant) -> Found {
        self.look(sha256(cookie.as_bytes()), counts, now)
    }

    fn look(&self, key: [u8; 32], counts: bool, now: Instant) -> Found {
        let mut kept = self.kept();
        let Some(one) = kept.get_mut(&key) else {
            return Found::Nobody;
        };
        if !self.is_alive(one, now) {
            kept.remove(&key);
            return Found::Nobody;
        }
        if !counts {
            return Found::Viewer(one.viewer.clone());
        }
        one.used = now;
        if !self.rates.take(&[(key, self.rate)], now) {
            return Found::TooOften;
        }
        Found::Viewer(one.viewer.clone())
    }

    /// What somebody may as it is now.
    pub(super) fn is_now(&self, viewer: &Viewer) {
        let mut kept = self.kept();
        if let Some(one) = kept.values_mut().find(|one| one.viewer.session == viewer.session) {
            one.viewer = viewer.clone();
        }
    }

    /// Ends one, which may be one's own. Says whether there was one. A proxy would vouch for them again at once: their name is
    /// remembered for a while.
    pub(super) fn end(&self, session: Uuid, own: bool, now: Instant) -> bool {
        let mut kept = self.kept();
        let found = kept.iter().find(|(_, one)| one.viewer.session == session);
        let Some(key) = found.map(|(key, _)| *key) else {
            return false;
        };
        let Some(gone) = kept.remove(&key) else {
            return false;
        };
        // Both at once: whoever finds no session finds that it was ended.
        if gone.viewer.entrance == WayIn::Proxy {
            let mut ended = self.ended();
            ended.retain(|_, one| one.until > now);
            if ended.len() >= self.most
                && let Some(first) = ended
                    .iter()
                    .min_by_key(|(_, one)| one.until)
                    .map(|(name, _)| name.clone())
            {
                ended.remove(&first);
            }
            let until = now + self.ended_for;
            ended.insert(gone.viewer.name, KeptOut { own, until });
        }
        true
    }

    /// Whether a session is still one.
    pub(super) fn is_there(&self, session: Uuid, now: Instant) -> bool {
        self.kept()
            .values()
            .any(|one| one.viewer.session == session && self.is_alive(one, now))
    }

    /// All of them, the newest first.
    pub(super) fn all(&self, now: Instant) -> Vec<SessionShown> {
        let mut kept = self.kept();
        kept.retain(|_, one| self.is_alive(one, now));
        let mut all: Vec<SessionShown> = kept
            .values()
            .map(|one| SessionShown {
                viewer: one.viewer.clone(),
                began: one.began,
                idle: now.saturating_duration_since(one.used),
            })
            .collect();
        all.sort_by_key(|one| std::cmp::Reverse((one.began, one.viewer.session)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sessions(most: usize) -> Sessions {
        Sessions {
            idle: Duration::from_secs(60),
            lasts: Duration::from_secs(600),
            most,
            rate: 5,
            rates: Rates::default(),
            ended_for: Duration::from_secs(300),
            kept: Mutex::default(),
            ended: Mutex::default(),
        }
    }

    fn ann(entrance: WayIn) -> LetIn {
        LetIn {
            name: "ann".to_owned(),
            role: ConsoleRole::Reader,
            partners: None,
            entrance,
        }
    }

    fn is_viewer(sessions: &Sessions, cookie: &str, now: Instant) -> bool {
        matches!(sessions.find(cookie, true, now), Found::Viewer(_))
    }

    #[test]
    fn a_session_ends_by_itself_or_when_somebody_says_so() {
        let (sessions, start) = (sessions(10), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let begin = || {
            let begun = sessions.begin(ann(WayIn::Link), start);
            begun.expect("chance")
        };
        let (cookie, viewer) = begin();
        assert!(is_viewer(&sessions, &cookie, after(59)));
        assert!(is_viewer(&sessions, &cookie, after(118)), "it was used");
        assert!(!is_viewer(&sessions, &cookie, after(179)), "it was not used");
        let (cookie, second) = begin();
        for used in (0..600).step_by(50) {
            assert!(is_viewer(&sessions, &cookie, after(used)), "{used}");
        }
        assert!(!is_viewer(&sessions, &cookie, after(600)), "however often it is used");
        assert_ne!(
            (viewer.session, &viewer.form_token),
            (second.session, &second.form_token)
        );
        let (cookie, third) = begin();
        assert!(sessions.end(third.session, false, start) && !sessions.end(third.session, false, start));
        assert!(!is_viewer(&sessions, &cookie, start));
        for nobody in ["", "0", &"0".repeat(64), &cookie.to_uppercase()] {
            assert!(!is_viewer(&sessions, nobody, start), "{nobody}");
        }
    }

    #[test]
    fn there_are_only_so_many_and_each_has_its_rate() {
        let (sessions, start) = (sessions(2), Instant::now());
        let begin = |after| {
            let now = start + Duration::from_secs(after);
            let begun = sessions.begin(ann(WayIn::Issuer), now);
            begun.expect("chance").0
        };
        let (first, second, third) = (begin(0), begin(1), begin(2));
        let now = start + Duration::from_secs(3);
        assert!(
            !is_viewer(&sessions, &first, now),
            "the one that was not used for longest went"
        );
        assert_eq!(sessions.all(now).len(), 2);
        let asked = (0..20).filter(|_| is_viewer(&sessions, &second, now)).count();
        assert_eq!(asked, 5);
        assert!(is_viewer(&sessions, &third, now), "each has its own");
        assert!(is_viewer(&sessions, &second, now + Duration::from_millis(250)));
    }

    fn named(sessions: &Sessions, name: &str, now: Instant) -> ByName {
        let let_in = LetIn {
            name: name.to_owned(),
            ..ann(WayIn::Proxy)
        };
        sessions.of_name(let_in, true, now).expect("chance")
    }

    #[test]
    fn a_name_has_one_session_and_one_rate_whatever_it_brings_along() {
        let (sessions, start) = (sessions(2), Instant::now());
        let is_let_in = |name| matches!(named(&sessions, name, start), ByName::Viewer(..));
        assert!(matches!(named(&sessions, "bob", start), ByName::Viewer(_, true)));
        assert_eq!((0..50).filter(|_| is_let_in("ann")).count(), 5);
        assert!(matches!(named(&sessions, "ann", start), ByName::TooOften));
        assert!(is_let_in("bob"), "each name has its own");
        assert_eq!(sessions.all(start).len(), 2, "and nobody's was ended for it");
    }

    #[test]
    fn a_name_that_was_ended_stays_out_for_a_while_and_is_forgotten_then() {
        let (sessions, start) = (sessions(2), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let begin = |name| match named(&sessions, name, start) {
            ByName::Viewer(viewer, _) => viewer.session,
            other => panic!("{other:?}"),
        };
        assert!(sessions.end(begin("ann"), false, start));
        let out = |name, now| matches!(named(&sessions, name, now), ByName::KeptOut(..));
        assert!(out("ann", start) && out("ann", after(299)) && !out("bob", start));
        sessions.welcome("ann");
        assert!(out("ann", start), "somebody else ended it");
        assert!(!out("ann", after(300)));
        // Who signed out may come back.
        assert!(sessions.end(begin("bob"), true, start) && out("bob", start));
        sessions.welcome("bob");
        assert!(!out("bob", start));
        // Only so many are remembered.
        for name in ["carl", "dora", "eve"] {
            assert!(sessions.end(begin(name), false, start));
        }
        assert_eq!(sessions.ended().len(), 2);
        // By the link or the issuer one signs in anew: there is nothing to remember.
        let (_, viewer) = sessions.begin(ann(WayIn::Issuer), after(400)).expect("chance");
        assert!(sessions.end(viewer.session, false, after(400)) && sessions.ended().len() == 2);
    }
}
