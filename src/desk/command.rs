//! The command line that does what was asked elsewhere.

use std::fmt;

/// A command line, word by word. Shown, it is quoted for a POSIX shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command(Vec<String>);

impl Command {
    /// `settled` and these words.
    pub(super) fn new(words: &[&str]) -> Self {
        let program = std::iter::once("settled");
        Self(program.chain(words.iter().copied()).map(str::to_owned).collect())
    }

    /// The words, unquoted.
    pub fn words(&self) -> &[String] {
        &self.0
    }

    pub(super) fn word(&mut self, word: impl ToString) {
        self.0.push(word.to_string());
    }

    /// `--name value`; `--name=value` where the value could be taken for a flag.
    pub(super) fn flag(&mut self, name: &str, value: Option<impl ToString>) {
        let Some(value) = value.map(|value| value.to_string()) else {
            return;
        };
        if value.starts_with('-') {
            self.0.push(format!("{name}={value}"));
        } else {
            self.0.push(name.to_owned());
            self.0.push(value);
        }
    }

    pub(super) fn switch(&mut self, name: &str, on: bool) {
        if on {
            self.0.push(name.to_owned());
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, word) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(" ")?;
            }
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,@%+=".contains(&byte);
            if !word.is_empty() && word.bytes().all(plain) {
                f.write_str(word)?;
            } else {
                write!(f, "'{}'", word.replace('\'', "'\\''"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a shell makes of it.
    #[test]
    fn a_shell_reads_the_same_words() {
        let mut command = Command::new(&["dead-letters", "discard"]);
        command.word(7);
        command.flag("--reason", Some("it's \"done\"; $HOME `x` \\ *\nand more"));
        command.flag("--nonce", Some("-n"));
        command.flag("--operator", Some("größer"));
        command.flag("--group", None::<&str>);
        command.switch("--final", true);
        let script = format!("printf '%s\\0' {command}");
        let output = std::process::Command::new("sh")
            .args(["-c", &script])
            .output()
            .expect("sh");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let words: Vec<&str> = text.split_terminator('\0').collect();
        assert_eq!(words, command.words());
        assert_eq!(
            words.get(4..6),
            Some(["--reason", "it's \"done\"; $HOME `x` \\ *\nand more"].as_slice())
        );
        assert!(words.contains(&"--nonce=-n"));
    }
}
