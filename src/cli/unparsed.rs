//! A command line that is not one: what is said of it, and what of it is not repeated.

use std::{ffi::OsString, process::ExitCode};

use super::{
    Failure,
    output::{self, Output},
};
use crate::{config::repeated, domain::public_key::may_be_private, plain::plain_lines};

/// A command line that is not carried out: help was asked for, or it is wrong.
#[derive(Debug)]
pub struct Unparsed {
    pub(super) error: clap::Error,
    pub(super) arguments: Vec<OsString>,
}

impl Unparsed {
    pub(super) fn new(error: clap::Error, arguments: Vec<OsString>) -> Self {
        Self { error, arguments }
    }

    /// Prints help to stdout, a usage error to stderr.
    pub fn tell(&self) -> ExitCode {
        let code = u8::try_from(self.error.exit_code()).unwrap_or(2);
        let text = self.scrubbed();
        if code == 0 {
            // A reader that is gone does not miss the help.
            return Output::new(false)
                .write(&text)
                .map_or_else(|failure| failure.tell(false), |()| ExitCode::SUCCESS);
        }
        if self.arguments.iter().any(|argument| argument == "--json") {
            let (message, hint) = in_two(&text);
            return Failure::usage(message).hint(hint).tell(true);
        }
        output::complain(&plain_lines(text.trim_end()));
        ExitCode::from(code)
    }

    /// clap repeats what was typed. What looks like a private key or a connection string goes unrepeated.
    pub(super) fn scrubbed(&self) -> String {
        let mut text = self.error.to_string();
        for argument in self.arguments.iter().skip(1) {
            let argument = argument.to_string_lossy();
            // --flag=value, or a word of its own: `host=h password=p` is one.
            let value = match argument.split_once('=') {
                Some((flag, value)) if flag.starts_with('-') => value,
                _ => &*argument,
            };
            if may_be_private(value) || repeated(value) != value {
                text = text.replace(value, "***");
            }
        }
        text
    }
}

/// clap's text as a sentence and a hint.
pub(super) fn in_two(text: &str) -> (String, String) {
    let mut paragraphs = text.split("\n\n").map(|paragraph| {
        let lines: Vec<&str> = paragraph.lines().map(str::trim).collect();
        lines.join(" ")
    });
    let message = paragraphs.next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(&message).to_owned();
    let rest: Vec<String> = paragraphs.filter(|paragraph| !paragraph.is_empty()).collect();
    (message, rest.join("; "))
}
