//! Which dead letters.

use uuid::Uuid;

use super::{Command, Desk, Moment, Refusal};
use crate::{
    domain::{
        dead_letter::{MadeBy, State},
        reason::Reason,
    },
    store::letters::Filter,
};

/// Which dead letters; whatever is left out does not select.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Which {
    /// None named: those that the question is usually about.
    pub states: Vec<State>,
    pub reasons: Vec<Reason>,
    /// Those that can never settle as they are; or those that may.
    pub is_final: Option<bool>,
    pub partner: Option<String>,
    pub allocation: Option<Uuid>,
    pub nonce: Option<String>,
    pub group: Option<String>,
    pub made_by: Option<MadeBy>,
    /// Failed last at this time or later ...
    pub since: Option<Moment>,
    /// ... and before this one.
    pub until: Option<Moment>,
}

impl Which {
    /// Whether anything is said at all.
    pub fn is_given(&self) -> bool {
        *self != Self::default()
    }

    /// As flags. Of an act the reason's code has a name of its own: `--reason` is the operator's.
    pub(super) fn add_to(&self, command: &mut Command, reason: &str) {
        command.flag("--partner", self.partner.as_ref());
        command.flag("--allocation", self.allocation);
        command.flag("--nonce", self.nonce.as_ref());
        command.flag("--since", self.since.map(said));
        command.flag("--until", self.until.map(said));
        for state in &self.states {
            command.flag("--state", Some(state.as_str()));
        }
        command.switch("--final", self.is_final == Some(true));
        command.switch("--not-final", self.is_final == Some(false));
        command.flag("--made-by", self.made_by.map(MadeBy::as_str));
        command.flag("--group", self.group.as_ref());
        for code in &self.reasons {
            command.flag(reason, Some(code));
        }
    }
}

/// A moment as it is typed.
pub(super) fn said(moment: Moment) -> String {
    match moment {
        Moment::At(time) => time.to_string(),
        // To the millisecond, which is what a stored time has.
        Moment::Ago(ago) => format!("{}ms", ago.as_millis()),
    }
}

impl Desk {
    /// The filter, with these states where none was named.
    pub(super) async fn filter(&self, which: &Which, states: &[State]) -> Result<Filter, Refusal> {
        let named: Vec<State> = State::ALL
            .into_iter()
            .filter(|state| which.states.contains(state))
            .collect();
        let (since, until) = self.window(which.since, which.until).await?;
        Ok(Filter {
            states: if named.is_empty() { states.to_vec() } else { named },
            reasons: which.reasons.clone(),
            is_final: which.is_final,
            partner: which.partner.clone(),
            partners: self.limits().map(<[String]>::to_vec),
            allocation: which.allocation,
            nonce: which.nonce.clone(),
            group: which.group.clone(),
            made_by: which.made_by,
            is_known: false,
            since,
            until,
        })
    }
}
