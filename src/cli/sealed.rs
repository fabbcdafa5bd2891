//! What leaves encrypted, for those who have the other half of a key: <https://age-encryption.org>.

use std::io::{IsTerminal, Write};

use age::{stream::StreamWriter, x25519::Recipient};

use super::{Failure, output::Output};

/// Lines on their way to stdout, encrypted. What is not finished can not be read.
pub(super) struct Sealed<'a> {
    recipients: Vec<Recipient>,
    out: &'a Output,
    stream: Option<StreamWriter<Stdout<'a>>>,
}

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

/// Public keys as they were typed. The value of one that is none is not repeated: it may be the private half.
fn recipients(typed: &[String]) -> Result<Vec<Recipient>, Failure> {
    let read = |text: &String| {
        text.trim().parse::<Recipient>().map_err(|_| {
            let is_private = text.trim().to_ascii_uppercase().starts_with("AGE-SECRET-KEY-");
            let sentence = if is_private {
                "a --recipient is a private key: it was not used, and whoever reads this machine's list of processes saw it"
            } else {
                "a --recipient is no public key of age"
            };
            Failure::usage(sentence).hint("a public key begins with age1: `age-keygen -y FILE` prints that of a private one")
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
        Ok(Self {
            recipients,
            out,
            stream: None,
        })
    }

    pub(super) fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.stream()?.write_all(text.as_bytes()).map_err(unwritten)
    }

    /// The end, without which it can not be decrypted as a whole. Of nothing it is a file of its own, too.
    pub(super) fn finish(mut self) -> Result<(), Failure> {
        self.stream()?;
        match self.stream {
            Some(stream) => stream.finish().map(drop).map_err(unwritten),
            None => Ok(()),
        }
    }

    /// Begun with the first line: what fails before leaves nothing.
    fn stream(&mut self) -> Result<&mut StreamWriter<Stdout<'a>>, Failure> {
        let stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let each = self.recipients.iter().map(|one| -> &dyn age::Recipient { one });
                age::Encryptor::with_recipients(each)
                    .map_err(|error| Failure::ours(format!("nothing could be encrypted: {error}")))?
                    .wrap_output(Stdout(self.out))
                    .map_err(unwritten)?
            }
        };
        Ok(self.stream.insert(stream))
    }
}

fn unwritten(error: std::io::Error) -> Failure {
    Failure::ours(format!("the answer could not be written to stdout: {error}"))
}
