//! Threads beside the program's own, for what asks the desk: each page on one of the runtime's blocking threads, so that there are
//! no more of them at once than those; and what lasts on a thread of its own. Who is not signed in has none of them, nor who has
//! not sent all of a form yet.

use tokio::{runtime::Handle, sync::oneshot};

/// Runs a piece of work to its end, and answers what came of it; none where the program is stopping.
pub(super) async fn soon<T, W, F>(work: W) -> Option<T>
where
    T: Send + 'static,
    W: FnOnce() -> F + Send + 'static,
    F: Future<Output = T>,
{
    let here = Handle::current();
    tokio::task::spawn_blocking(move || here.block_on(work())).await.ok()
}

/// Runs a piece of work on a thread of its own, and answers what came of it; none where there is no thread, or it broke. Whoever
/// calls this bounds how many there are.
pub(super) async fn apart<T, W, F>(work: W) -> Option<T>
where
    T: Send + 'static,
    W: FnOnce() -> F + Send + 'static,
    F: Future<Output = T>,
{
    let (tell, told) = oneshot::channel();
    // Whoever is gone meanwhile needs no answer.
    lasting(move || async move { drop(tell.send(work().await)) });
    told.await.ok()
}

/// Runs what lasts. Says whether there was a thread for it.
pub(super) fn lasting<W, F>(work: W) -> bool
where
    W: FnOnce() -> F + Send + 'static,
    F: Future<Output = ()>,
{
    let here = Handle::current();
    std::thread::Builder::new()
        .name("console".to_owned())
        .spawn(move || here.block_on(work()))
        .is_ok()
}
