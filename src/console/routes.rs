//! Everything that can be asked for: one table, each with the role that it needs. What stands in no line of it can not be
//! asked for, and a line without its role is no line.

use percent_encoding::percent_decode_str;

use super::who::{
    ConsoleRole::{Approver, Operator, Reader},
    Needs::{self, Change, Look, Nobody},
};

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Screen {
    Overview,
    Live,
    Groups,
    Letters,
    Letter,
    LetterBody,
    Export,
    AskDiscard,
    Discard,
    AskRestore,
    Restore,
    AskPurge,
    Purge,
    Plans,
    MakePlan,
    Plan,
    Approve,
    Replay,
    DiscardPlan,
    RestorePlan,
    Runs,
    Run,
    Cancel,
    Resume,
    Timeline,
    Partners,
    Partner,
    Suspend,
    Quarantine,
    ResumePartner,
    Ledger,
    Check,
    Outbox,
    Retry,
    Audit,
    Doctor,
    Sessions,
    EndSession,
    SignOut,
    Enter,
    SignIn,
    Leave,
    ComeBack,
    Asset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Post,
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct RouteLine {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) needs: Needs,
    /// Whether it shows and touches the partners alone that somebody is limited to. Where it can not, who is limited may not ask.
    pub(super) limits: bool,
    pub(super) screen: Screen,
}

const fn get(path: &'static str, needs: Needs, screen: Screen) -> RouteLine {
    RouteLine {
        method: Method::Get,
        path,
        needs,
        limits: false,
        screen,
    }
}

const fn post(path: &'static str, needs: Needs, screen: Screen) -> RouteLine {
    RouteLine {
        method: Method::Post,
        path,
        needs,
        limits: false,
        screen,
    }
}

/// It minds the partners that somebody is limited to.
const fn limits(line: RouteLine) -> RouteLine {
    RouteLine { limits: true, ..line }
}

pub(super) const TABLE: [RouteLine; 44] = [
    limits(get("/", Look(Reader), Screen::Overview)),
    get("/live", Look(Reader), Screen::Live),
    limits(get("/groups", Look(Reader), Screen::Groups)),
    limits(get("/letters", Look(Reader), Screen::Letters)),
    limits(get("/letters/{id}", Look(Reader), Screen::Letter)),
    // It changes nothing but the audit, where it stands who has seen what.
    limits(post("/letters/{id}", Look(Reader), Screen::LetterBody)),
    limits(post("/export", Look(Operator), Screen::Export)),
    limits(get("/discard", Look(Reader), Screen::AskDiscard)),
    limits(post("/discard", Change(Operator), Screen::Discard)),
    limits(get("/restore", Look(Reader), Screen::AskRestore)),
    limits(post("/restore", Change(Operator), Screen::Restore)),
    get("/purge", Look(Reader), Screen::AskPurge),
    post("/purge", Change(Operator), Screen::Purge),
    limits(get("/plans", Look(Reader), Screen::Plans)),
    limits(post("/plans", Change(Operator), Screen::MakePlan)),
    limits(get("/plans/{id}", Look(Reader), Screen::Plan)),
    limits(post("/plans/{id}/approve", Change(Approver), Screen::Approve)),
    limits(post("/plans/{id}/replay", Change(Operator), Screen::Replay)),
    limits(post("/plans/{id}/discard", Change(Operator), Screen::DiscardPlan)),
    limits(post("/plans/{id}/restore", Change(Operator), Screen::RestorePlan)),
    limits(get("/runs", Look(Reader), Screen::Runs)),
    limits(get("/runs/{id}", Look(Reader), Screen::Run)),
    limits(post("/runs/{id}/cancel", Change(Operator), Screen::Cancel)),
    limits(post("/runs/{id}/resume", Change(Operator), Screen::Resume)),
    get("/timeline", Look(Reader), Screen::Timeline),
    limits(get("/partners", Look(Reader), Screen::Partners)),
    limits(get("/partners/{id}", Look(Reader), Screen::Partner)),
    limits(post("/partners/{id}/suspend", Change(Operator), Screen::Suspend)),
    limits(post("/partners/{id}/quarantine", Change(Operator), Screen::Quarantine)),
    limits(post("/partners/{id}/resume", Change(Operator), Screen::ResumePartner)),
    get("/ledger", Look(Reader), Screen::Ledger),
    get("/ledger/check", Look(Reader), Screen::Check),
    get("/outbox", Look(Reader), Screen::Outbox),
    post("/outbox/retry", Change(Operator), Screen::Retry),
    get("/audit", Look(Reader), Screen::Audit),
    get("/doctor", Look(Reader), Screen::Doctor),
    get("/sessions", Look(Reader), Screen::Sessions),
    post("/sessions/{id}/end", Look(Approver), Screen::EndSession),
    limits(post("/sign-out", Look(Reader), Screen::SignOut)),
    limits(get("/enter", Nobody, Screen::Enter)),
    limits(post("/enter", Nobody, Screen::SignIn)),
    limits(get("/sign-in", Nobody, Screen::Leave)),
    limits(get("/signed-in", Nobody, Screen::ComeBack)),
    limits(get("/assets/{id}", Nobody, Screen::Asset)),
];

/// A line of the table, for who walks it.
#[derive(Clone, Copy, Debug)]
pub struct ConsoleRoute {
    pub method: &'static str,
    /// `{id}` stands for one of many.
    pub path: &'static str,
    pub needs: Needs,
    /// Whether who is limited to some partners may ask for it, and is answered of these alone.
    pub limits: bool,
}

/// Everything that can be asked for, with what it needs.
pub fn table() -> impl Iterator<Item = ConsoleRoute> {
    TABLE.into_iter().map(|line| ConsoleRoute {
        method: match line.method {
            Method::Get => "GET",
            Method::Post => "POST",
        },
        path: line.path,
        needs: line.needs,
        limits: line.limits,
    })
}

impl Screen {
    /// What it needs of whoever asks, and whether it minds their limits.
    pub(super) fn wants(self) -> (Needs, bool) {
        TABLE
            .iter()
            .find(|line| line.screen == self)
            .map_or((Change(Approver), false), |line| (line.needs, line.limits))
    }
}

impl RouteLine {
    /// What stands in a path where this line has `{id}`.
    pub(super) fn part_of(&self, path: &str) -> Option<String> {
        let (before, after) = self.path.split_once("{id}")?;
        let part = path.strip_prefix(before)?.strip_suffix(after)?;
        percent_decode_str(part)
            .decode_utf8()
            .ok()
            .map(std::borrow::Cow::into_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_screen_stands_in_the_table_once() {
        for (at, line) in TABLE.iter().enumerate() {
            let same = |other: &&RouteLine| {
                other.screen == line.screen || (other.method, other.path) == (line.method, line.path)
            };
            assert_eq!(TABLE.iter().filter(same).count(), 1, "{line:?}");
            // What changes something is never a link.
            assert!(line.method == Method::Post || !matches!(line.needs, Change(_)), "{at}");
        }
        let open: Vec<&str> = TABLE
            .iter()
            .filter(|line| line.needs == Nobody)
            .map(|line| line.path)
            .collect();
        assert_eq!(open, ["/enter", "/enter", "/sign-in", "/signed-in", "/assets/{id}"]);
    }

    #[test]
    fn a_part_of_a_path_is_read() {
        let line = |screen| *TABLE.iter().find(|line| line.screen == screen).expect("a line");
        assert_eq!(line(Screen::Approve).part_of("/plans/7/approve").as_deref(), Some("7"));
        assert_eq!(line(Screen::Partner).part_of("/partners/a%20b").as_deref(), Some("a b"));
        assert_eq!(line(Screen::Partner).part_of("/partners/%ff"), None);
        assert_eq!(line(Screen::Overview).part_of("/"), None);
    }
}
