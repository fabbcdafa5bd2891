//! Where traces are exported to while their cost is measured: it reads them, counts, and says that it has them.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::Fallible;

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    bytes: Arc<AtomicUsize>,
    listening: JoinHandle<()>,
}

impl Receiver {
    pub(crate) async fn open() -> Fallible<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let bytes = Arc::<AtomicUsize>::default();
        let address = listener.local_addr()?;
        let counted = Arc::clone(&bytes);
        let listening = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let counted = Arc::clone(&counted);
                let answer = service_fn(move |request| answer(Arc::clone(&counted), request));
                let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                tokio::spawn(async move { drop(serving.await) });
            }
        });
        Ok(Self {
            address,
            bytes,
            listening,
        })
    }

    /// Bytes of exports so far.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

async fn answer(bytes: Arc<AtomicUsize>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    // A body that is cut off counts for nothing.
    if let Ok(body) = request.into_body().collect().await {
        bytes.fetch_add(body.to_bytes().len(), Ordering::Relaxed);
    }
    Ok(Response::default())
}
