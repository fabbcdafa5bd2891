//! Waiting for the broker's answers, never for ever.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::future::{MaybeDone, maybe_done};

use super::BrokerError;

/// How long one question to the broker (declare, bind, consume, acknowledge, close) may take. A healthy broker needs
/// milliseconds; a frozen one is noticed after one heartbeat and a half.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) fn late(what: &str, limit: Duration) -> std::io::Error {
    std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        format!("{what} took longer than {limit:?}"),
    )
}

/// Awaits one answer of the broker, but not for ever.
pub(super) async fn answer<T>(
    what: &str,
    limit: Duration,
    question: impl Future<Output = lapin::Result<T>>,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(limit, question).await {
        Ok(outcome) => outcome.map_err(|error| BrokerError::from_lapin(&error)),
        Err(_) => Err(BrokerError::Away(format!("no answer to {what} within {limit:?}"))),
    }
}

/// Starts every future in order before it awaits the first, then awaits each: lapin queues a frame at the first poll, so
/// the frames leave in this order and together. One wake-up at a time, where `join_all` has one for every future.
pub(super) async fn all_together<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut started: Vec<Pin<Box<MaybeDone<F>>>> = futures
        .map(|future| {
            let mut future = Box::pin(maybe_done(future));
            // It is awaited below, which gives it a waker of its own.
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(()) | Poll::Pending => future,
            }
        })
        .collect();
    let mut outputs = Vec::with_capacity(started.len());
    for future in &mut started {
        poll_fn(|context| future.as_mut().poll(context)).await;
        outputs.extend(future.as_mut().take_output());
    }
    outputs
}
