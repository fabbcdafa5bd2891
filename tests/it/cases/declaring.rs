//! A broker that answers and then breaks a declaration off, as RabbitMQ does with INTERNAL_ERROR where the replicas of a
//! quorum queue are not ready in time.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crate::kit::{
    proxy::Proxy,
    support::{Ground, address, run, said, with_address},
};

/// `queue.declare`.
fn declares_a_queue(frame: &[u8]) -> bool {
    frame.first() == Some(&1) && frame.get(7..11) == Some(&[0, 50, 0, 10])
}

/// What `settled topology` says where the connection ends at the first so many declarations of a queue.
async fn broken_off(test: &str, times: usize) -> (std::process::Output, usize) {
    let ground = Ground::new(test).await;
    let proxy = Proxy::to(&address(&ground.broker_url)).await;
    let broken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&broken);
    proxy.strike(Some(Arc::new(move |frame: &[u8]| {
        declares_a_queue(frame)
            && count
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |seen| {
                    (seen < times).then_some(seen + 1)
                })
                .is_ok()
    })));
    let url = with_address(&ground.broker_url, proxy.address);
    let output = run("", &url, &["topology"], "").await;
    (output, broken.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_declaration_that_is_broken_off_is_made_again() {
    let (output, broken) = broken_off("declaring_again", 3).await;
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(broken, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_always_broken_off_ends_with_the_code_of_a_broker_that_is_away() {
    let (output, broken) = broken_off("declaring_never", usize::MAX).await;
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    // `retry.transient_attempts` more than the first.
    assert_eq!(broken, 9);
}
