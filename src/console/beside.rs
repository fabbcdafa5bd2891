//! A console beside something else in one program: on a thread and a runtime of its own, so that who looks takes nothing from who
//! works.

use std::thread::JoinHandle;

use tokio::sync::{oneshot, watch};

use super::{ConsoleFailure, Opened, Starter};
use crate::config::Settings;

/// Threads that answer.
const THREADS: usize = 2;
/// Threads that make pages.
const PAGES: usize = 16;

/// A console that runs beside.
pub struct Beside {
    stopper: watch::Sender<bool>,
    thread: JoinHandle<()>,
}

impl Beside {
    /// Stops it, and waits until it has.
    pub async fn stop(self) {
        self.stopper.send_replace(true);
        // What broke there has said so itself.
        drop(tokio::task::spawn_blocking(move || self.thread.join()).await);
    }
}

/// Opens a console, and has it answer until it is stopped.
///
/// # Errors
/// What waiting can not mend.
pub async fn beside(settings: &Settings, starter: Starter) -> Result<Beside, ConsoleFailure> {
    let ours = |error: std::io::Error| ConsoleFailure::Ours(format!("the console has no thread: {error}"));
    let (stopper, stop) = watch::channel(false);
    let (tell, told) = oneshot::channel();
    let settings = settings.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(THREADS)
        .max_blocking_threads(PAGES)
        .thread_name("console")
        .build()
        .map_err(ours)?;
    let serve = move || {
        runtime.block_on(async {
            match Opened::new(&settings, starter).await {
                Ok(opened) => {
                    drop(tell.send(Ok(())));
                    opened.serve(stop).await;
                }
                Err(failure) => drop(tell.send(Err(failure))),
            }
        });
        runtime.shutdown_background();
    };
    let thread = std::thread::Builder::new()
        .name("console".to_owned())
        .spawn(serve)
        .map_err(ours)?;
    told.await
        .map_err(|_| ConsoleFailure::Ours("the console ended before it began".to_owned()))??;
    Ok(Beside { stopper, thread })
}
