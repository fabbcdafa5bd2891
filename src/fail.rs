//! Fail points: where a test may kill the process. Compiled to nothing without the feature `faults`.

/// The named places of the walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    AfterReceive,
    AfterFacts,
    AfterLoad,
    BeforeCommit,
    AfterCommit,
    AfterAck,
    BeforePublish,
    HalfPublished,
    AfterConfirm,
    BeforeOutboxDelete,
    AfterOutboxDelete,
    DueClaimed,
    RelayTaken,
    RelayPublished,
}

impl Point {
    /// Every point, in the order of the walk.
    pub const ALL: [Point; 14] = [
        Point::AfterReceive,
        Point::AfterFacts,
        Point::AfterLoad,
        Point::BeforeCommit,
        Point::AfterCommit,
        Point::AfterAck,
        Point::BeforePublish,
        Point::HalfPublished,
        Point::AfterConfirm,
        Point::BeforeOutboxDelete,
        Point::AfterOutboxDelete,
        Point::DueClaimed,
        Point::RelayTaken,
        Point::RelayPublished,
    ];

    /// Its name in `SETTLED_FAULT`.
    pub fn name(self) -> &'static str {
        match self {
            Point::AfterReceive => "after_receive",
            Point::AfterFacts => "after_facts",
            Point::AfterLoad => "after_load",
            Point::BeforeCommit => "before_commit",
            Point::AfterCommit => "after_commit",
            Point::AfterAck => "after_ack",
            Point::BeforePublish => "before_publish",
            Point::HalfPublished => "half_published",
            Point::AfterConfirm => "after_confirm",
            Point::BeforeOutboxDelete => "before_outbox_delete",
            Point::AfterOutboxDelete => "after_outbox_delete",
            Point::DueClaimed => "due_claimed",
            Point::RelayTaken => "relay_taken",
            Point::RelayPublished => "relay_published",
        }
    }
}

#[cfg(feature = "faults")]
mod armed {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    };

    /// `SETTLED_FAULT=NAME:N`: kill at the Nth passing of NAME.
    static FAULT: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let fault = std::env::var("SETTLED_FAULT").ok()?;
        let (name, passing) = fault.split_once(':')?;
        Some((name.to_owned(), AtomicU64::new(passing.parse().ok()?)))
    });

    pub(super) fn is(name: &str) -> bool {
        FAULT.as_ref().is_some_and(|(armed, _)| armed == name)
    }

    pub(super) fn pass(name: &str) {
        let last = FAULT
            .as_ref()
            .filter(|(armed, _)| armed == name)
            .map(|(_, left)| left.fetch_sub(1, Ordering::SeqCst));
        if last == Some(1) {
            // Nothing is flushed, closed or said: that is what SIGKILL means.
            let killed = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            assert!(killed.is_ok(), "a process may always kill itself");
        }
    }
}

/// Passes a point. With the feature `faults`, `SETTLED_FAULT=NAME:N` kills the process (SIGKILL) at the Nth passing.
#[inline]
pub fn point(point: Point) {
    #[cfg(feature = "faults")]
    armed::pass(point.name());
    #[cfg(not(feature = "faults"))]
    let _: Point = point;
}

/// Whether this point is the one that kills.
#[inline]
pub fn is_armed(point: Point) -> bool {
    #[cfg(feature = "faults")]
    return armed::is(point.name());
    #[cfg(not(feature = "faults"))]
    {
        let _: Point = point;
        false
    }
}
