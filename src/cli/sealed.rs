//! Lines on their way to stdout, encrypted.

use std::io::{IsTerminal, Write};

use age::x25519::Recipient;

use super::{Failure, output::Output};
use crate::sealed::{self, NO_RECIPIENT_HINT, NoRecipient};

/// Lines on their way to stdout, encrypted. What is not finished can not be read.
pub(super) struct Sealed<'a>(sealed::Sealed<Stdout<'a>>);

struct Stdout<'a>(&'a Output);

impl Write for Stdout<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0
            .bytes(bytes)
            .map_err(|failure| std::io::Error::other(failure.message().to_owned()))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Public keys as they were typed.
fn recipients(typed: &[String]) -> Result<Vec<Recipient>, Failure> {
    let read = |text: &String| {
        sealed::recipient(text).map_err(|why| {
            Failure::usage(match why {
                NoRecipient::Private => {
                    "a --recipient is a private key: it was not used, and whoever reads this machine's list of processes saw it"
                }
                NoRecipient::NoKey => "a --recipient is no public key of age",
            })
            .hint(NO_RECIPIENT_HINT)
        })
    };
    typed.iter().map(read).collect()
}

impl<'a> Sealed<'a> {
    /// For these recipients.
    ///
    /// # Errors
    /// One of them is none; or a terminal would get what no person can read.
    pub(super) fn to(typed: &[String], out: &'a Output) -> Result<Self, Failure> {
        let recipients = recipients(typed)?;
        if std::io::stdout().is_terminal() {
            return Err(
                Failure::usage("what is encrypted is no text: it does not go to a terminal")
                    .hint("send it to a file: `> FILE.age`"),
            );
        }
        Ok(Self(sealed::Sealed::to(recipients, Stdout(out))))
    }

    pub(super) fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.0.write(text).map_err(unwritten)
    }

    /// The end, without which it can not be decrypted as a whole. Of nothing it is a file of its own, too.
    pub(super) fn finish(self) -> Result<(), Failure> {
        self.0.finish().map(drop).map_err(unwritten)
    }
}

fn unwritten(error: std::io::Error) -> Failure {
    Failure::ours(format!("the answer could not be written to stdout: {error}"))
}
