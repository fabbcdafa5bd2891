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
use crate::{config::ConsoleSettings, domain::digest::sha256};

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

struct Kept {
    viewer: Viewer,
    began: Timestamp,
    begun: Instant,
    used: Instant,
    /// Requests that are left of its rate.
    left: f64,
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

/// The sessions that there are.
pub(super) struct Sessions {
    idle: Duration,
    lasts: Duration,
    most: usize,
    rate: u32,
    kept: Mutex<HashMap<[u8; 32], Kept>>,
}

impl Sessions {
    pub(super) fn new(settings: &ConsoleSettings) -> Self {
        Self {
            idle: settings.session_idle,
            lasts: settings.session_lasts,
            most: settings.sessions_max,
            rate: settings.rate_per_session,
            kept: Mutex::default(),
        }
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
        if kept.len() >= self.most
            && let Some(oldest) = kept.iter().min_by_key(|(_, one)| one.used).map(|(key, _)| *key)
        {
            kept.remove(&oldest);
        }
        kept.insert(
            sha256(cookie.as_bytes()),
            Kept {
                viewer: viewer.clone(),
                began: Timestamp::now(),
                begun: now,
                used: now,
                left: f64::from(self.rate),
            },
        );
        Ok((cookie, viewer))
    }

    fn is_alive(&self, one: &Kept, now: Instant) -> bool {
        now.saturating_duration_since(one.used) < self.idle && now.saturating_duration_since(one.begun) < self.lasts
    }

    /// Whose cookie it is. Being asked is being used; where it does not count, it only looks.
    pub(super) fn find(&self, cookie: &str, counts: bool, now: Instant) -> Found {
        let mut kept = self.kept();
        let key = sha256(cookie.as_bytes());
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
        let rate = f64::from(self.rate);
        let passed = now.saturating_duration_since(one.used).as_secs_f64();
        one.left = (one.left + passed * rate).min(rate);
        one.used = now;
        if one.left < 1.0 {
            return Found::TooOften;
        }
        one.left -= 1.0;
        Found::Viewer(one.viewer.clone())
    }

    /// What somebody may as it is now.
    pub(super) fn is_now(&self, viewer: &Viewer) {
        let mut kept = self.kept();
        if let Some(one) = kept.values_mut().find(|one| one.viewer.session == viewer.session) {
            one.viewer = viewer.clone();
        }
    }

    /// Ends one. Says whether there was one.
    pub(super) fn end(&self, session: Uuid) -> bool {
        let mut kept = self.kept();
        let before = kept.len();
        kept.retain(|_, one| one.viewer.session != session);
        kept.len() < before
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
            kept: Mutex::default(),
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
        assert!(sessions.end(third.session) && !sessions.end(third.session));
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
            let begun = sessions.begin(ann(WayIn::Proxy), now);
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
}
