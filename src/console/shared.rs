//! A question that is asked once for everybody who wants its answer at about the same time; nobody waits long for it, and what
//! was answered last stays, with its age.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;

use crate::desk::Refusal;

/// How long somebody who wants a page waits for an answer. Who answers later is seen on the next page.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// What is known of the answer.
struct Known<T> {
    answer: Option<(Instant, Arc<T>)>,
    /// Why there was none, the last time that it was asked.
    failed: Option<(Instant, Refusal)>,
}

/// What somebody is told.
pub(super) struct Told<T> {
    pub(super) answer: Option<Arc<T>>,
    /// Since the answer's question was asked.
    pub(super) age: Duration,
    /// Why it is not of now.
    pub(super) why_not: Option<Refusal>,
}

/// One question.
pub(super) struct Shared<T> {
    known: watch::Sender<Known<T>>,
    under_way: AtomicBool,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            known: watch::Sender::new(Known {
                answer: None,
                failed: None,
            }),
            under_way: AtomicBool::new(false),
        }
    }
}

/// Whose question is under way, until it is over, however it ends.
struct UnderWay<T> {
    shared: Arc<Shared<T>>,
    began: Instant,
    came: Option<Result<T, Refusal>>,
}

impl<T> UnderWay<T> {
    fn over(mut self, came: Result<T, Refusal>) {
        self.came = Some(came);
    }
}

impl<T> Drop for UnderWay<T> {
    fn drop(&mut self) {
        let came = self.came.take();
        let broke = || {
            Err(Refusal::ours(
                "the question broke before it was answered; the log may say why",
            ))
        };
        let began = self.began;
        self.shared.known.send_modify(|known| match came.unwrap_or_else(broke) {
            Ok(answer) => known.answer = Some((began, Arc::new(answer))),
            Err(refusal) => known.failed = Some((began, refusal)),
        });
        // Only then: who came meanwhile has the answer, and need not ask.
        self.shared.under_way.store(false, Ordering::Release);
    }
}

impl<T: Send + Sync + 'static> Shared<T> {
    /// What was answered within `fresh`, or what is answered now. One question is under way at a time; it goes on where nobody
    /// waits for it any more.
    pub(super) async fn ask<F>(self: &Arc<Self>, fresh: Duration, question: F) -> Told<T>
    where
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        self.ask_within(fresh, PATIENCE, question).await
    }

    /// The same, waited for as long as that.
    pub(super) async fn ask_within<F>(self: &Arc<Self>, fresh: Duration, patience: Duration, question: F) -> Told<T>
    where
        F: Future<Output = Result<T, Refusal>> + Send + 'static,
    {
        let mut known = self.known.subscribe();
        if known.borrow_and_update().is_of(fresh) {
            return self.told(fresh);
        }
        if !self.under_way.swap(true, Ordering::AcqRel) {
            let under_way = UnderWay {
                shared: Arc::clone(self),
                began: Instant::now(),
                came: None,
            };
            tokio::spawn(async move {
                under_way.over(question.await);
            });
        }
        if tokio::time::timeout(patience, known.changed()).await.is_err() {
            let late = Refusal::away(format!("there was no answer within {patience:?}"));
            return Told {
                why_not: Some(late.hint("it is waited for; load the page again")),
                ..self.told(fresh)
            };
        }
        self.told(fresh)
    }

    /// The newest of what is known.
    fn told(&self, fresh: Duration) -> Told<T> {
        let known = self.known.borrow();
        let failed = known.failed.as_ref();
        let newer = failed.filter(|(at, _)| known.answer.as_ref().is_none_or(|(answered, _)| answered < at));
        Told {
            answer: known.answer.as_ref().map(|(_, answer)| Arc::clone(answer)),
            age: known.answer.as_ref().map_or(fresh, |(at, _)| at.elapsed()),
            why_not: newer.map(|(_, refusal)| refusal.clone()),
        }
    }
}

impl<T> Known<T> {
    /// Whether it was asked so lately that it need not be asked again.
    fn is_of(&self, fresh: Duration) -> bool {
        let answered = self.answer.as_ref().map(|(at, _)| *at);
        let failed = self.failed.as_ref().map(|(at, _)| *at);
        answered.max(failed).is_some_and(|at| at.elapsed() < fresh)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    const LONG: Duration = Duration::from_secs(3_600);

    #[tokio::test]
    async fn many_are_told_what_was_asked_once() {
        let shared = Arc::new(Shared::<usize>::default());
        let asked = Arc::new(AtomicUsize::new(0));
        let ask = || {
            let asked = Arc::clone(&asked);
            shared.ask(LONG, async move {
                tokio::task::yield_now().await;
                Ok(asked.fetch_add(1, Ordering::Relaxed))
            })
        };
        let all = futures_util::future::join_all((0..20).map(|_| ask())).await;
        assert!(all.iter().all(|told| told.answer.as_deref() == Some(&0)));
        assert!(all.iter().all(|told| told.why_not.is_none()));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // What is not fresh any more is asked again.
        let asked = Arc::clone(&asked);
        let told = shared
            .ask(Duration::ZERO, async move { Ok(asked.fetch_add(1, Ordering::Relaxed)) })
            .await;
        assert_eq!(told.answer.as_deref(), Some(&1));
    }

    #[tokio::test]
    async fn what_is_not_answered_leaves_what_was() {
        let shared = Arc::new(Shared::<u8>::default());
        let now = Duration::ZERO;
        assert_eq!(shared.ask(now, async { Ok(7) }).await.answer.as_deref(), Some(&7));
        let told = shared.ask(now, async { Err(Refusal::away("away")) }).await;
        assert_eq!(told.answer.as_deref(), Some(&7));
        assert_eq!(told.why_not.map(|refusal| refusal.message).as_deref(), Some("away"));
        // Who never answers is waited for as long as a page waits, and not asked twice.
        for _ in 0..2 {
            let told = shared.ask(now, std::future::pending()).await;
            assert_eq!(told.answer.as_deref(), Some(&7));
            assert!(told.age >= PATIENCE);
            assert!(
                told.why_not
                    .is_some_and(|refusal| refusal.message.contains("no answer"))
            );
        }
    }

    #[tokio::test]
    async fn a_question_that_breaks_is_asked_again() {
        let shared = Arc::new(Shared::<u8>::default());
        let told = shared.ask(Duration::ZERO, async { panic!("it broke") }).await;
        assert!(told.answer.is_none());
        assert!(told.why_not.is_some_and(|refusal| refusal.message.contains("broke")));
        let told = shared.ask(Duration::ZERO, async { Ok(7) }).await;
        assert_eq!(told.answer.as_deref(), Some(&7));
    }
}
