//! A program of `settled` that answers over HTTP, beside the worker: how it is started and ended, and one request to it.

use std::{
    path::PathBuf,
    process::ExitStatus,
    sync::{Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
};

use crate::kit::{
    secrets,
    support::{PATIENCE, until},
};

/// A running program.
pub(crate) struct Program {
    /// As it is called when it is spoken of.
    name: &'static str,
    child: Mutex<Child>,
    /// What it says on stderr.
    log: PathBuf,
}

impl Program {
    pub(crate) fn start(name: &'static str, command: &mut Command, log: PathBuf) -> Self {
        command.stderr(std::fs::File::create(&log).expect("a log"));
        Self {
            name,
            child: Mutex::new(command.spawn().expect("settled starts")),
            log,
        }
    }

    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).expect("its log")).into_owned()
    }

    fn ended(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().expect("a child")
    }

    /// It must not have ended by itself.
    pub(crate) fn still_runs(&self) {
        if let Some(status) = self.ended() {
            panic!("{} ended with {status}: {}", self.name, self.said());
        }
    }

    /// Its process, while it lives.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).id()
    }

    pub(crate) fn terminate(&self) {
        let id = self.child.lock().unwrap_or_else(PoisonError::into_inner).id();
        let kill = format!("kill -TERM {}", id.expect("it runs"));
        let status = std::process::Command::new("sh").args(["-c", &kill]).status();
        assert!(status.expect("a shell").success());
    }

    pub(crate) async fn end(&self) -> ExitStatus {
        until(&format!("{} ends", self.name), PATIENCE, async || self.ended()).await
    }

    /// SIGTERM, and an orderly end.
    pub(crate) async fn stop(&self) {
        self.terminate();
        let status = self.end().await;
        assert_eq!(status.code(), Some(0), "SIGTERM ends {} in order", self.name);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{} said:\n{}", self.name, self.said());
        }
        drop(self.child.lock().unwrap_or_else(PoisonError::into_inner).start_kill());
        // Of a place that is gone already there is nothing left to read.
        if let Ok(said) = std::fs::read(&self.log) {
            let said = String::from_utf8_lossy(&said);
            secrets::check(&format!("the log of {}", self.name), &said);
        }
    }
}

/// An answer: status, headers with their names in small letters, body.
pub(crate) type HttpAnswer = (u16, Vec<(String, String)>, String);

/// Sends bytes as they are, and reads the answer to its end.
pub(crate) async fn exchange(address: &str, bytes: &[u8]) -> HttpAnswer {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let (mut read, mut write) = stream.split();
    let mut answer = Vec::new();
    let both = async {
        // One that answers before it has read all closes, and the rest can not be sent.
        let sent = async { drop(write.write_all(bytes).await) };
        let got = async { drop(read.read_to_end(&mut answer).await) };
        tokio::join!(sent, got);
    };
    let ended = tokio::time::timeout(PATIENCE, both).await;
    assert!(
        ended.is_ok(),
        "no end of the answer: {}",
        String::from_utf8_lossy(&answer)
    );
    read_answer(&answer)
}

pub(crate) fn read_answer(bytes: &[u8]) -> HttpAnswer {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default().split(' ').nth(1);
    (
        status.and_then(|status| status.parse().ok()).unwrap_or_default(),
        lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect(),
        body.to_owned(),
    )
}

/// The first header of this name, in small letters.
pub(crate) fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(other, _)| other == name);
    found.map(|(_, value)| value.as_str())
}
