//! A TCP proxy between the worker and what it depends on: it refuses, cuts and stalls.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
};

use crate::support::Beside;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    /// Nobody listens, and every connection is gone.
    Refuse,
    /// Connections stay, and not a byte goes through.
    Stall,
}

#[derive(Clone, Copy)]
struct State {
    mode: Mode,
    cuts: u64,
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: watch::Sender<State>,
    _serving: Beside,
}

impl Proxy {
    /// A proxy to a host and port.
    pub(crate) async fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its port");
        let (state, watched) = watch::channel(State {
            mode: Mode::Open,
            cuts: 0,
        });
        let serving = Beside::spawn(serve(listener, address, target.to_owned(), watched));
        Self {
            address,
            state,
            _serving: serving,
        }
    }

    fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.mode = mode);
    }

    pub(crate) fn open(&self) {
        self.set(Mode::Open);
    }

    pub(crate) fn refuse(&self) {
        self.set(Mode::Refuse);
    }

    pub(crate) fn stall(&self) {
        self.set(Mode::Stall);
    }

    /// Ends the connections there are; new ones may come.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }
}

async fn serve(listener: TcpListener, address: SocketAddr, target: String, mut state: watch::Receiver<State>) {
    let mut listener = Some(listener);
    loop {
        if state.wait_for(|state| state.mode != Mode::Refuse).await.is_err() {
            return;
        }
        let open = match listener.take() {
            Some(listener) => listener,
            None => loop {
                if let Ok(listener) = TcpListener::bind(address).await {
                    break listener;
                }
                tokio::task::yield_now().await;
            },
        };
        loop {
            let mut refusing = state.clone();
            tokio::select! {
                _ = refusing.wait_for(|state| state.mode == Mode::Refuse) => break,
                accepted = open.accept() => {
                    if let Ok((stream, _)) = accepted {
                        tokio::spawn(carry(stream, target.clone(), state.clone()));
                    }
                }
            }
        }
    }
}

async fn carry(near: TcpStream, target: String, mut state: watch::Receiver<State>) {
    let cuts = state.borrow().cuts;
    let (there, back) = (state.clone(), state.clone());
    let carrying = async {
        let far = TcpStream::connect(target).await?;
        // Small frames must not wait for others here: they do not on a real way either.
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let (near_read, near_write) = near.into_split();
        let (far_read, far_write) = far.into_split();
        tokio::select! {
            done = pass(near_read, far_write, there) => done,
            done = pass(far_read, near_write, back) => done,
        }
    };
    tokio::select! {
        _ = state.wait_for(|state| state.cuts > cuts || state.mode == Mode::Refuse) => {}
        done = carrying => drop(done),
    }
}

async fn pass(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 65_536];
    loop {
        let count = from.read(&mut buffer).await?;
        if state.wait_for(|state| state.mode != Mode::Stall).await.is_err() || count == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).await?;
    }
}
