//! What leaves encrypted, for those who have the other half of a key: <https://age-encryption.org>.

use std::io::{self, Write};

use age::{stream::StreamWriter, x25519::Recipient};

/// Why a text is no key to encrypt for. It is not repeated: it may be the private half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRecipient {
    Private,
    NoKey,
}

/// What to do instead.
pub(crate) const NO_RECIPIENT_HINT: &str =
    "a public key begins with age1: `age-keygen -y FILE` prints that of a private one";

/// A public key as it was typed.
pub(crate) fn recipient(typed: &str) -> Result<Recipient, NoRecipient> {
    let typed = typed.trim();
    typed.parse().map_err(|_| {
        if typed.to_ascii_uppercase().starts_with("AGE-SECRET-KEY-") {
            NoRecipient::Private
        } else {
            NoRecipient::NoKey
        }
    })
}

/// Text on its way out, encrypted. What is not finished can not be read.
pub(crate) struct Sealed<W: Write> {
    recipients: Vec<Recipient>,
    /// None: the stream has it.
    out: Option<W>,
    stream: Option<StreamWriter<W>>,
}

impl<W: Write> Sealed<W> {
    pub(crate) fn to(recipients: Vec<Recipient>, out: W) -> Self {
        Self {
            recipients,
            out: Some(out),
            stream: None,
        }
    }

    /// # Errors
    /// It can not be written, or not be encrypted.
    pub(crate) fn write(&mut self, text: &str) -> io::Result<()> {
        self.begun()?.write_all(text.as_bytes())
    }

    /// The end, without which it can not be decrypted as a whole. Of nothing it is a file of its own, too.
    ///
    /// # Errors
    /// As [`Sealed::write`].
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.begun()?;
        match self.stream {
            Some(stream) => stream.finish(),
            None => Err(io::Error::other("nothing was begun")),
        }
    }

    /// Begun with the first line: what fails before leaves nothing.
    fn begun(&mut self) -> io::Result<&mut StreamWriter<W>> {
        let stream = match (self.stream.take(), self.out.take()) {
            (Some(stream), _) => stream,
            (None, Some(out)) => {
                let each = self.recipients.iter().map(|one| -> &dyn age::Recipient { one });
                age::Encryptor::with_recipients(each)
                    .map_err(|error| io::Error::other(format!("nothing could be encrypted: {error}")))?
                    .wrap_output(out)?
            }
            (None, None) => return Err(io::Error::other("an earlier part could not be encrypted")),
        };
        Ok(self.stream.insert(stream))
    }
}
