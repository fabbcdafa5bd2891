//! Why a message is a dead letter, and who says so.

use jiff::Timestamp;

use crate::domain::reason::Reason;

/// Who made a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MadeBy {
    /// The worker, with a verdict.
    Settled,
    /// The broker by itself.
    Broker,
    /// Nobody known: whoever put it there is not trusted, or it does not say what a dead letter of ours says.
    Unknown,
}

impl MadeBy {
    pub const ALL: [MadeBy; 3] = [MadeBy::Settled, MadeBy::Broker, MadeBy::Unknown];

    pub fn as_str(self) -> &'static str {
        match self {
            MadeBy::Settled => "settled",
            MadeBy::Broker => "broker",
            MadeBy::Unknown => "unknown",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|made_by| made_by.as_str() == text)
    }
}

/// Why a message is a dead letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub made_by: MadeBy,
    pub reason: Reason,
    pub detail: String,
    /// When it failed, where that is known.
    pub failed_at: Option<Timestamp>,
}

impl Cause {
    /// Whether nobody judged the message: what the broker gave up has no event yet, and is in no batch.
    pub fn is_untold(&self) -> bool {
        self.made_by == MadeBy::Broker && matches!(self.reason, Reason::DeliveryLimit | Reason::Expired)
    }
}
