//! What becomes of a batch that could not be settled: one pure function for whoever holds it. The worker's driver asks it
//! after every attempt that failed, and does what it says.

use crate::{store::Fate, telemetry::PauseCause};

/// What whoever holds a batch may do with it. All in which they differ when an attempt fails stands here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// It may wait with the batch in hand, and takes no more meanwhile. If not, it lets go: what it holds is claimed from the
    /// database for a time, and comes again by itself.
    pub may_wait: bool,
    /// Somebody else may have judged the same messages meanwhile, since they are claimed for a time only. What came from a
    /// queue is nobody else's before it is acknowledged.
    pub is_shared: bool,
    /// It can go on without messages that need what is locked: they are set apart, and the rest does not wait.
    pub sets_apart: bool,
}

impl Terms {
    /// A lane, with what it took from a queue.
    pub const LANE: Self = Self {
        may_wait: true,
        is_shared: false,
        sets_apart: true,
    };
    /// Parked messages that are due, and dead letters that are replayed.
    pub const DUE: Self = Self {
        may_wait: true,
        is_shared: true,
        sets_apart: true,
    };
    /// Packs of the side room.
    pub const HELD: Self = Self {
        may_wait: false,
        is_shared: true,
        sets_apart: true,
    };
    /// The collector, with dead letters that it took from their queue. All of them are stored: none needs what is locked
    /// more than another.
    pub const COLLECTOR: Self = Self {
        may_wait: true,
        is_shared: false,
        sets_apart: false,
    };
}

/// An attempt that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    pub fate: Fate,
    /// A lock was waited for in vain.
    pub is_lock_wait: bool,
    /// Attempts before this one that failed for what passes by itself.
    pub attempts: u32,
    /// Of them there are so many at most (`retry.transient_attempts`).
    pub attempts_max: u32,
    /// There is more than one message in it.
    pub can_halve: bool,
    /// What failed was to reject a message that the database had refused before.
    pub was_rejecting: bool,
    /// The program stops.
    pub is_stopping: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The same once more, after a moment.
    Again,
    /// The same at once, without what turns out to be locked; where nothing does, after a moment.
    FindLocks,
    /// Each half by itself: one message may be what the database refuses.
    Halve,
    /// It stands alone and is what the database refuses: that one message is rejected.
    Reject,
    /// The same after a pause, as long as patience lasts. Then it is handed back.
    Wait(PauseCause),
    /// Nothing more: it comes again by itself.
    LetGo(PauseCause),
    /// The same when there is room for it.
    WaitForRoom,
    /// Nothing more: somebody else has judged it.
    Overtaken,
}

impl Step {
    /// Whether a message is blamed, or would be if there were not too many already. Both count: a pause for them ends only
    /// after a while in which none came.
    pub fn accuses(self) -> bool {
        match self {
            Self::Reject | Self::Wait(PauseCause::Culprits) | Self::LetGo(PauseCause::Culprits) => true,
            Self::Again
            | Self::FindLocks
            | Self::Halve
            | Self::Wait(_)
            | Self::LetGo(_)
            | Self::WaitForRoom
            | Self::Overtaken => false,
        }
    }
}

/// What comes after an attempt that failed. `may_blame`: a message that the database refuses alone may still be its own fault;
/// where there were too many lately, the fault is ours.
pub fn next_step(terms: Terms, failed: Failed, may_blame: bool) -> Step {
    let later = |cause| {
        if terms.may_wait {
            Step::Wait(cause)
        } else {
            Step::LetGo(cause)
        }
    };
    match failed.fate {
        Fate::Retry => {
            if failed.attempts >= failed.attempts_max || (failed.is_stopping && !terms.may_wait) {
                later(PauseCause::Database)
            } else if failed.is_lock_wait && terms.sets_apart && !failed.was_rejecting {
                Step::FindLocks
            } else {
                Step::Again
            }
        }
        Fate::Away => later(PauseCause::Database),
        Fate::Bisect => {
            if failed.was_rejecting {
                later(PauseCause::Schema)
            } else if failed.can_halve {
                Step::Halve
            } else if may_blame {
                Step::Reject
            } else {
                later(PauseCause::Culprits)
            }
        }
        Fate::Full => Step::WaitForRoom,
        Fate::Overtaken => {
            if terms.is_shared {
                Step::Overtaken
            } else {
                later(PauseCause::Schema)
            }
        }
        Fate::Ours | Fate::CommittedBefore => later(PauseCause::Schema),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LANE: Terms = Terms::LANE;
    const DUE: Terms = Terms::DUE;
    const HELD: Terms = Terms::HELD;
    const COLLECTOR: Terms = Terms::COLLECTOR;
    const ALL: [Terms; 4] = [LANE, DUE, HELD, COLLECTOR];
    const WAIT: [Terms; 3] = [LANE, DUE, COLLECTOR];

    /// The first attempt, of several messages.
    fn failed(fate: Fate) -> Failed {
        Failed {
            fate,
            is_lock_wait: false,
            attempts: 0,
            attempts_max: 8,
            can_halve: true,
            was_rejecting: false,
            is_stopping: false,
        }
    }

    fn alone(fate: Fate) -> Failed {
        Failed {
            can_halve: false,
            ..failed(fate)
        }
    }

    fn rejecting(fate: Fate) -> Failed {
        Failed {
            was_rejecting: true,
            ..alone(fate)
        }
    }

    fn last(failed: Failed) -> Failed {
        Failed { attempts: 8, ..failed }
    }

    fn locked() -> Failed {
        Failed {
            is_lock_wait: true,
            ..failed(Fate::Retry)
        }
    }

    fn stopping(failed: Failed) -> Failed {
        Failed {
            is_stopping: true,
            ..failed
        }
    }

    #[test]
    fn what_comes_after_every_failure() {
        use Fate::{Away, Bisect, CommittedBefore, Full, Ours, Overtaken, Retry};
        use PauseCause::{Culprits, Database, Schema};
        use Step::{Again, FindLocks, Halve, LetGo, Reject, Wait, WaitForRoom};

        let rows: &[(&str, &[Terms], Failed, Step)] = &[
            // It passes by itself: a bounded number of times, then like a database that is away.
            ("a deadlock", &ALL, failed(Retry), Again),
            ("of one message", &ALL, alone(Retry), Again),
            (
                "the last but one",
                &ALL,
                Failed {
                    attempts: 7,
                    ..failed(Retry)
                },
                Again,
            ),
            ("too often", &WAIT, last(failed(Retry)), Wait(Database)),
            ("too often", &[HELD], last(failed(Retry)), LetGo(Database)),
            // A stop does not make anyone drop what can only be handed back; what comes again by itself is let go.
            ("while it stops", &WAIT, stopping(failed(Retry)), Again),
            ("while it stops", &[HELD], stopping(failed(Retry)), LetGo(Database)),
            // Who needs what is locked is found out, and waits without us; dead letters are stored all or none.
            ("a lock", &[LANE, DUE, HELD], locked(), FindLocks),
            ("a lock", &[COLLECTOR], locked(), Again),
            ("a lock, too often", &WAIT, last(locked()), Wait(Database)),
            ("a lock, too often", &[HELD], last(locked()), LetGo(Database)),
            // A rejection writes the batch's own row only: nothing of it can be set apart.
            (
                "a lock in rejecting",
                &ALL,
                Failed {
                    was_rejecting: true,
                    can_halve: false,
                    ..locked()
                },
                Again,
            ),
            ("a deadlock in rejecting", &ALL, rejecting(Retry), Again),
            // One message may be what the database refuses: down to it, and then it alone.
            ("refused", &ALL, failed(Bisect), Halve),
            ("refused after retries", &ALL, last(failed(Bisect)), Halve),
            ("refused alone", &ALL, alone(Bisect), Reject),
            // A rejection that is refused is not the message's fault, and is not blamed on it again.
            ("refused in rejecting", &WAIT, rejecting(Bisect), Wait(Schema)),
            ("refused in rejecting", &[HELD], rejecting(Bisect), LetGo(Schema)),
            ("away", &WAIT, failed(Away), Wait(Database)),
            ("away", &[HELD], failed(Away), LetGo(Database)),
            ("away in rejecting", &WAIT, rejecting(Away), Wait(Database)),
            ("ours", &WAIT, failed(Ours), Wait(Schema)),
            ("ours", &[HELD], failed(Ours), LetGo(Schema)),
            ("ours, alone", &WAIT, alone(Ours), Wait(Schema)),
            // Whoever knows what the earlier attempt came to is not told so: this one does not.
            (
                "committed, it is not known what",
                &WAIT,
                failed(CommittedBefore),
                Wait(Schema),
            ),
            (
                "committed, it is not known what",
                &[HELD],
                failed(CommittedBefore),
                LetGo(Schema),
            ),
            // What came from a queue is nobody else's: to take it for done would acknowledge what was never settled.
            ("overtaken", &[DUE, HELD], failed(Overtaken), Step::Overtaken),
            ("overtaken", &[LANE, COLLECTOR], failed(Overtaken), Wait(Schema)),
            ("no room", &ALL, failed(Full), WaitForRoom),
        ];
        for (what, holders, failed, step) in rows {
            for terms in *holders {
                assert_eq!(next_step(*terms, *failed, true), *step, "{what}: {terms:?}, {failed:?}");
            }
        }
        // Too many lately: nobody is blamed any more. Nothing else changes.
        for terms in WAIT {
            assert_eq!(next_step(terms, alone(Bisect), false), Wait(Culprits), "{terms:?}");
        }
        assert_eq!(next_step(HELD, alone(Bisect), false), LetGo(Culprits));
        for (what, holders, failed, step) in rows.iter().filter(|(.., step)| *step != Reject) {
            for terms in *holders {
                assert_eq!(
                    next_step(*terms, *failed, false),
                    *step,
                    "{what}: {terms:?}, {failed:?}"
                );
            }
        }
    }

    /// Whatever fails and whoever holds it: no step goes on for ever without a wait, and nothing from a queue is dropped.
    #[test]
    fn every_failure_ends_or_waits() {
        let fates = [
            Fate::Retry,
            Fate::Bisect,
            Fate::Away,
            Fate::Ours,
            Fate::CommittedBefore,
            Fate::Overtaken,
            Fate::Full,
        ];
        for bits in 0..64_u32 {
            let bit = |place: u32| bits >> place & 1 == 1;
            for (fate, terms) in fates.iter().flat_map(|fate| ALL.map(|terms| (*fate, terms))) {
                let failed = Failed {
                    fate,
                    is_lock_wait: bit(0),
                    attempts: if bit(1) { 8 } else { 0 },
                    attempts_max: 8,
                    can_halve: bit(2) && !bit(3),
                    was_rejecting: bit(3),
                    is_stopping: bit(4),
                };
                let step = next_step(terms, failed, bit(5));
                let what = format!("{terms:?}, {failed:?}: {step:?}");
                match step {
                    Step::Again | Step::FindLocks => assert!(fate == Fate::Retry && failed.attempts < 8, "{what}"),
                    Step::Halve => assert!(failed.can_halve && fate == Fate::Bisect, "{what}"),
                    Step::Reject => assert!(bit(5) && !failed.was_rejecting && fate == Fate::Bisect, "{what}"),
                    Step::Wait(_) => assert!(terms.may_wait, "{what}"),
                    Step::LetGo(_) => assert!(!terms.may_wait, "{what}"),
                    Step::WaitForRoom => assert_eq!(fate, Fate::Full, "{what}"),
                    Step::Overtaken => assert!(terms.is_shared && fate == Fate::Overtaken, "{what}"),
                }
            }
        }
    }
}
