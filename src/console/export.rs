//! An export: messages with their bodies on their way to whoever asked, as they are or encrypted. One that breaks off is seen to.

use std::{
    io::{self, Write},
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError},
};

use age::x25519::Recipient;
use axum::{
    body::{Body, Bytes},
    response::Response,
};
use futures_util::stream;
use hyper::{
    StatusCode,
    header::{CONTENT_DISPOSITION, HeaderValue},
};
use tokio::sync::mpsc;

use super::{
    answer::{NotDone, with_headers},
    aside,
    ask::Ask,
};
use crate::{
    desk::{Export, ExportedLine, Refusal, Which},
    sealed::{self, NO_RECIPIENT_HINT, NoRecipient, Sealed},
};

pub(super) fn exported(ask: &Ask, which: Which) -> Export {
    Export {
        which,
        recipients: public_keys(ask).map(str::to_owned).collect(),
        operator: ask.viewer.name.clone(),
    }
}

/// For whom an export is to be encrypted, as it was typed; for nobody: it is plain.
fn typed_recipients(ask: &Ask) -> impl Iterator<Item = &str> {
    let typed = ask.fields.get("recipient").unwrap_or_default();
    typed.split([' ', ',', '\t', '\r', '\n']).filter(|one| !one.is_empty())
}

/// Those that are public keys: anything else may be a private one, and is not said again.
pub(super) fn public_keys(ask: &Ask) -> impl Iterator<Item = &str> {
    typed_recipients(ask).filter(|one| sealed::recipient(one).is_ok())
}

fn recipients(ask: &Ask) -> Result<Vec<Recipient>, NotDone> {
    let read = |one: &str| {
        sealed::recipient(one).map_err(|why| {
            NotDone::wrong(match why {
                NoRecipient::Private => {
                    "encrypt for: that is a private key; it was not used, and this console does not keep it. Nothing was exported"
                }
                NoRecipient::NoKey => "encrypt for: that is no public key of age; nothing was exported",
            })
            .hint(NO_RECIPIENT_HINT)
        })
    };
    typed_recipients(ask).map(read).collect()
}

/// A part of an export on its way.
enum Piece {
    Some(Bytes),
    /// That was all.
    End,
    Broken(String),
}

/// What is exported on its way to whoever takes it: as it is, or encrypted.
enum Lines {
    Plain(Vec<u8>),
    Sealed(Box<Sealed<Shared>>, Shared),
}

/// Where what is encrypted is picked up.
#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn of(recipients: Vec<Recipient>) -> Self {
        if recipients.is_empty() {
            return Self::Plain(Vec::new());
        }
        let out = Shared::default();
        Self::Sealed(Box::new(Sealed::to(recipients, out.clone())), out)
    }

    /// Answers how long it is.
    fn add(&mut self, line: &ExportedLine) -> Result<usize, Refusal> {
        let ours = |error: &dyn std::fmt::Display| Refusal::ours(error.to_string());
        let mut text = serde_json::to_string(line).map_err(|error| ours(&error))?;
        text.push('\n');
        match self {
            Self::Plain(pending) => pending.extend_from_slice(text.as_bytes()),
            Self::Sealed(sealed, _) => sealed.write(&text).map_err(|error| ours(&error))?,
        }
        Ok(text.len())
    }

    /// What can leave.
    fn take(&mut self) -> Vec<u8> {
        match self {
            Self::Plain(pending) => std::mem::take(pending),
            Self::Sealed(_, out) => out.take(),
        }
    }

    /// The rest.
    fn end(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain(pending) => Ok(pending),
            Self::Sealed(sealed, _) => sealed.finish().map(|out| out.take()),
        }
    }
}

pub(super) async fn begin(ask: &Ask) -> Result<Response, NotDone> {
    /// Pieces under way, and bytes of one from which on it leaves.
    const AHEAD: usize = 4;
    const PIECE: usize = 64 * 1024;
    let wish = exported(ask, ask.fields.which()?);
    // Before anything is asked: what is no key must not leave a row in the audit.
    let recipients = recipients(ask)?;
    let is_sealed = !recipients.is_empty();
    let (pieces, mut receiver) = mpsc::channel::<Piece>(AHEAD);
    let desk = ask.desk.clone();
    let (begun, beginning) = tokio::sync::oneshot::channel::<Result<(), Refusal>>();
    let _exported = aside::lasting(move || async move {
        let mut begun = Some(begun);
        let mut lines = Lines::of(recipients);
        let mut length = 0;
        // The callback can not wait: what leaves is handed over while this thread stands still.
        let exported = desk
            .export(&wish, |line, _| {
                if let Some(begun) = begun.take() {
                    drop(begun.send(Ok(())));
                }
                length += lines.add(line)?;
                if length < PIECE {
                    return Ok(ControlFlow::Continue(()));
                }
                length = 0;
                let piece = Piece::Some(lines.take().into());
                let sent = tokio::task::block_in_place(|| pieces.blocking_send(piece));
                Ok::<_, Refusal>(match sent {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(_) => ControlFlow::Break(()),
                })
            })
            .await;
        let rest = match exported {
            Ok(_) => lines.end().map_err(|error| Refusal::ours(error.to_string())),
            Err(refusal) => Err(refusal),
        };
        if let Some(begun) = begun.take() {
            drop(begun.send(rest.as_ref().map(drop).map_err(Refusal::clone)));
        }
        let last = match rest {
            Ok(rest) => vec![Piece::Some(rest.into()), Piece::End],
            Err(refusal) => vec![Piece::Broken(refusal.message)],
        };
        for piece in last {
            if pieces.send(piece).await.is_err() {
                return;
            }
        }
    });
    beginning
        .await
        .unwrap_or_else(|_| Err(Refusal::ours("the export ended before it began")))?;
    // What ends otherwise than by its end is broken: whoever takes it sees a transfer that broke off, and not a whole file.
    let pieces = stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|piece| match piece {
            Some(Piece::Some(bytes)) => Some(Ok(bytes)),
            Some(Piece::End) => None,
            Some(Piece::Broken(why)) => Some(Err(io::Error::other(why))),
            None => Some(Err(io::Error::other("the export ended before its end"))),
        })
    });
    let (kind, name) = if is_sealed {
        (
            "application/octet-stream",
            "attachment; filename=\"dead-letters.ndjson.age\"",
        )
    } else {
        ("application/x-ndjson", "attachment; filename=\"dead-letters.ndjson\"")
    };
    let mut response = with_headers(StatusCode::OK, kind, Body::from_stream(pieces));
    response
        .headers_mut()
        .insert(CONTENT_DISPOSITION, HeaderValue::from_static(name));
    Ok(response)
}
