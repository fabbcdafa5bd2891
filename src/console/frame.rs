//! What stands around every page, and who may go where.

use jiff::Timestamp;

use super::{
    answer::Notice,
    assets,
    routes::Screen,
    sessions::Viewer,
    shown,
    who::{ConsoleRole, Needs},
};

/// What stands around every page.
pub(super) struct Frame {
    pub(super) title: String,
    /// Which of the places to go one is at.
    pub(super) here: &'static str,
    pub(super) who: Option<Viewer>,
    pub(super) read_only: bool,
    pub(super) notice: Option<Notice>,
}

/// A place to go; with why not for whom it is none.
pub(super) struct Place {
    pub(super) barred: bool,
    pub(super) key: &'static str,
    pub(super) path: &'static str,
    pub(super) name: &'static str,
}

impl Frame {
    pub(super) fn with(mut self, notice: Option<Notice>) -> Self {
        self.notice = notice;
        self
    }

    /// Why this one may not go to some places; none: they may go to all.
    pub(super) fn barred(&self) -> Option<String> {
        self.why_not(Screen::Timeline)
    }

    fn why_not(&self, screen: Screen) -> Option<String> {
        barred(screen.wants(), self.who.as_ref(), self.read_only)
    }

    /// All the places.
    pub(super) fn places(&self) -> [Place; 11] {
        let place = |screen, key, path, name| Place {
            barred: self.why_not(screen).is_some(),
            key,
            path,
            name,
        };
        [
            place(Screen::Overview, "overview", "/", "Overview"),
            place(Screen::Groups, "groups", "/groups", "Groups"),
            place(Screen::Letters, "letters", "/letters", "Letters"),
            place(Screen::Plans, "plans", "/plans", "Plans"),
            place(Screen::Runs, "runs", "/runs", "Runs"),
            place(Screen::Timeline, "timeline", "/timeline", "Timeline"),
            place(Screen::Partners, "partners", "/partners", "Partners"),
            place(Screen::Ledger, "ledger", "/ledger", "Ledger"),
            place(Screen::Outbox, "outbox", "/outbox", "Outbox"),
            place(Screen::Audit, "audit", "/audit", "Audit"),
            place(Screen::Doctor, "doctor", "/doctor", "Doctor"),
        ]
    }

    /// Whether this one sees everything.
    pub(super) fn sees_all(&self) -> bool {
        self.who.as_ref().is_some_and(|who| who.partners.is_none())
    }

    pub(super) fn style(&self) -> &'static str {
        assets::STYLE.path
    }

    pub(super) fn scripts(&self) -> [&'static str; 2] {
        [assets::HTMX.path, assets::SCRIPT.path]
    }

    pub(super) fn icon(&self) -> &'static str {
        assets::ICON.path
    }

    pub(super) fn form_token(&self) -> &str {
        self.who.as_ref().map_or("", |who| who.form_token.as_str())
    }

    pub(super) fn now(&self) -> shown::At {
        shown::At(Timestamp::now())
    }
}

/// Why somebody may not; none: they may.
pub(super) fn barred((needs, limits): (Needs, bool), viewer: Option<&Viewer>, read_only: bool) -> Option<String> {
    let at_least = |least: ConsoleRole| match viewer {
        None => Some("sign in first".to_owned()),
        Some(viewer) if viewer.role < least => Some(format!(
            "this needs the role {}; yours is {}",
            least.as_str(),
            viewer.role.as_str()
        )),
        Some(Viewer {
            partners: Some(partners),
            ..
        }) if !limits => Some(format!(
            "this is about every partner; you are limited to {}",
            partners.join(", ")
        )),
        Some(_) => None,
    };
    match needs {
        Needs::Nobody => None,
        Needs::Look(least) => at_least(least),
        Needs::Change(_) if read_only && viewer.is_some() => {
            Some("this console is for looking only (console.read_only)".to_owned())
        }
        Needs::Change(least) => at_least(least),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::console::who::WayIn;

    #[test]
    fn a_role_may_what_it_may() {
        use ConsoleRole::{Approver, Operator, Reader};
        let who = |role, partners: Option<&str>| Viewer {
            session: uuid::Uuid::nil(),
            name: "ann".to_owned(),
            role,
            partners: partners.map(|one| Arc::from([one.to_owned()])),
            entrance: WayIn::Proxy,
            form_token: String::new(),
        };
        let may = |needs, role: Option<ConsoleRole>, read_only| {
            barred((needs, false), role.map(|role| who(role, None)).as_ref(), read_only).is_none()
        };
        for read_only in [false, true] {
            assert!(may(Needs::Nobody, None, read_only) && !may(Needs::Look(Reader), None, read_only));
            assert!(may(Needs::Look(Reader), Some(Reader), read_only));
            assert!(!may(Needs::Look(Operator), Some(Reader), read_only));
            assert_eq!(may(Needs::Change(Operator), Some(Approver), read_only), !read_only);
            assert!(!may(Needs::Change(Approver), Some(Operator), read_only));
            assert!(!may(Needs::Change(Reader), None, read_only));
        }
        let limited = who(Operator, Some("acme"));
        let why = |limits| barred((Needs::Change(Operator), limits), Some(&limited), false);
        assert_eq!(why(true), None);
        assert!(why(false).is_some_and(|why| why.contains("limited to acme")));
    }
}
