//! The overview, live: one look serves everybody who watches, and nobody looks while nobody does.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    response::Response,
};
use hyper::{StatusCode, body::Frame as BodyFrame};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::{
    Site,
    answer::{NotDone, with_headers},
    ask::Ask,
    looks::Looks,
    overview,
};
use crate::{
    config::ConsoleSettings,
    desk::Desk,
    retry::{Waited, sleep},
};

/// What everybody sees.
pub(super) struct Live {
    pub(super) looks: Looks,
    seen: watch::Sender<Bytes>,
    places: Arc<Semaphore>,
}

impl Live {
    pub(super) fn new(desk: &Desk, settings: &ConsoleSettings) -> Self {
        Self {
            looks: Looks::new(desk, settings),
            seen: watch::Sender::new(Bytes::new()),
            places: Arc::new(Semaphore::new(settings.viewers_max)),
        }
    }
}

/// Looks again and again while anybody watches, and counts on for a while after.
pub(super) async fn poll(site: Arc<Site>, mut stop: watch::Receiver<bool>) {
    let every = site.settings.live_interval;
    loop {
        if site.live.seen.receiver_count() > 0 {
            let html = overview::fragment(&site.live.looks).await;
            site.live.seen.send_replace(event(&html));
        } else {
            site.live.looks.count_on().await;
        }
        if sleep(every, &mut stop).await == Waited::Stopping {
            return;
        }
    }
}

/// As a server-sent event.
fn event(html: &str) -> Bytes {
    let mut text = String::with_capacity(html.len() + 64);
    for line in html.lines() {
        text.push_str("data: ");
        text.push_str(line);
        text.push('\n');
    }
    text.push('\n');
    text.into()
}

/// Whoever watches: what is seen now, and then whenever it is seen anew, while the session is one.
pub(super) fn watch(site: &Arc<Site>, ask: &Ask) -> Result<Response, NotDone> {
    let Ok(place) = Arc::clone(&site.live.places).try_acquire_owned() else {
        return Err(NotDone::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too many watch already (console.viewers_max): the page is as it was when it was opened",
        ));
    };
    // One piece under way at most: who reads slowly skips what others saw.
    let (pieces, receiver) = mpsc::channel::<Bytes>(1);
    let mut seen = site.live.seen.subscribe();
    let (session, site) = (ask.viewer.session, Arc::clone(site));
    let mut stop = site.drivers.stop.clone();
    tokio::spawn(async move {
        let retry = Bytes::from_static(b"retry: 3000\n\n");
        if pieces.send(retry).await.is_err() {
            return;
        }
        loop {
            let bytes = seen.borrow_and_update().clone();
            if !bytes.is_empty() && pieces.send(bytes).await.is_err() {
                return;
            }
            tokio::select! {
                changed = seen.changed() => if changed.is_err() { return },
                () = pieces.closed() => return,
                () = crate::retry::stopped(&mut stop) => return,
            }
            if !site.sessions.is_there(session, Instant::now()) {
                return;
            }
        }
    });
    let body = Pieces {
        receiver,
        _place: place,
    };
    Ok(with_headers(
        StatusCode::OK,
        "text/event-stream; charset=utf-8",
        Body::new(body),
    ))
}

/// A stream of pieces, with its place among those who watch.
struct Pieces {
    receiver: mpsc::Receiver<Bytes>,
    _place: OwnedSemaphorePermit,
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Infallible>>> {
        self.receiver
            .poll_recv(context)
            .map(|piece| piece.map(|bytes| Ok(BodyFrame::data(bytes))))
    }
}
