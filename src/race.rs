//! Several ways to the same thing, one of which may be silent.

use std::{future::Future, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use uuid::Uuid;

/// The first success of several tries. One that takes longer than `patience` is not waited for alone: the next begins beside it.
/// If all fail it is the error that tells most; None where there was nothing to try.
pub(crate) async fn first<T, E, F>(
    tries: impl IntoIterator<Item = F>,
    patience: Duration,
    tells_more: impl Fn(&E, &E) -> bool,
) -> Option<Result<T, E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = tries.into_iter().peekable();
    let mut running = FuturesUnordered::new();
    let mut told: Option<E> = None;
    let mut next = waiting.next();
    loop {
        running.extend(next.take());
        if running.is_empty() {
            return told.map(Err);
        }
        tokio::select! {
            biased;
            Some(outcome) = running.next() => match outcome {
                Ok(value) => return Some(Ok(value)),
                Err(error) => {
                    if told.as_ref().is_none_or(|before| tells_more(&error, before)) {
                        told = Some(error);
                    }
                    next = waiting.next();
                }
            },
            () = tokio::time::sleep(patience), if waiting.peek().is_some() => next = waiting.next(),
        }
    }
}

/// A random order, in which those that `comes_last` names stand behind the others.
pub(crate) fn order<T>(ways: impl IntoIterator<Item = T>, comes_last: impl Fn(&T) -> bool) -> Vec<T> {
    let mut ways: Vec<T> = ways.into_iter().collect();
    ways.sort_by_cached_key(|way| (comes_last(way), Uuid::new_v4()));
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn after(wait: u64, outcome: Result<u64, u64>) -> Result<u64, u64> {
        tokio::time::sleep(Duration::from_millis(wait)).await;
        outcome
    }

    const FOR_EVER: u64 = 3_600_000;

    #[tokio::test]
    async fn the_first_to_answer_is_taken() {
        let patience = Duration::from_millis(50);
        for (tries, expected, at_least) in [
            (vec![after(1, Ok(1)), after(0, Ok(2))], Some(Ok(1)), 0),
            (vec![after(FOR_EVER, Ok(1)), after(10, Ok(2))], Some(Ok(2)), 60),
            (
                vec![after(FOR_EVER, Ok(1)), after(FOR_EVER, Ok(2)), after(0, Ok(3))],
                Some(Ok(3)),
                100,
            ),
            // What is slow is taken all the same, if nobody is quicker.
            (vec![after(80, Ok(1)), after(FOR_EVER, Ok(2))], Some(Ok(1)), 80),
            // A refusal costs no patience, and the one that tells most is told.
            (
                vec![after(0, Err(1)), after(0, Err(7)), after(0, Err(3))],
                Some(Err(7)),
                0,
            ),
            (vec![after(0, Err(1)), after(5, Ok(2))], Some(Ok(2)), 5),
            (vec![], None, 0),
        ] {
            let began = std::time::Instant::now();
            let outcome = first(tries, patience, |error, before| error > before).await;
            assert_eq!(outcome, expected);
            assert!(began.elapsed() >= Duration::from_millis(at_least), "{expected:?}");
        }
    }
}
