//! Where a stored dead letter stands.

/// Where a stored dead letter stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It waits for an operator.
    Open,
    /// A run asked for its replay.
    Due,
    /// Its replay parked it: the message waits for its allocation.
    Parked,
    /// Its replay settled it, or found it settled.
    Settled,
    /// An operator is done with it.
    Discarded,
}

impl State {
    pub const ALL: [State; 5] = [State::Open, State::Due, State::Parked, State::Settled, State::Discarded];

    pub fn as_str(self) -> &'static str {
        match self {
            State::Open => "open",
            State::Due => "due",
            State::Parked => "parked",
            State::Settled => "settled",
            State::Discarded => "discarded",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == text)
    }
}
