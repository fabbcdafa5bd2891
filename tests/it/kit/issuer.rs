//! An issuer of OpenID Connect (tests/it/tools/issuer.js), and somebody who signs in there with a browser.

use std::{collections::BTreeMap, path::Path, process::Stdio};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::kit::{
    program::{self, Program},
    support::{Ground, PATIENCE, until},
};

/// As whom the console is registered there.
pub(crate) const CLIENT: (&str, &str) = ("console", "a secret of the console & its issuer");

/// A running issuer.
pub(crate) struct Issuer {
    program: Program,
    pub(crate) url: String,
}

impl Issuer {
    /// Starts one for a console at this address; `people` have claims.
    pub(crate) async fn start(ground: &Ground, tools: &Path, console: &str, alg: &str, people: Value) -> Self {
        let name = uuid::Uuid::new_v4().simple().to_string();
        let (log, told, wish) = (
            ground.file(&format!("issuer-{name}.log")),
            ground.file(&format!("issuer-{name}.out")),
            ground.file(&format!("issuer-{name}.json")),
        );
        let asked = json!({
            "client": CLIENT.0,
            "secret": CLIENT.1,
            "redirects": [format!("{console}/signed-in")],
            "alg": alg,
            "people": people,
        });
        let mut file = tokio::fs::File::create(&wish).await.expect("a file");
        file.write_all(asked.to_string().as_bytes())
            .await
            .expect("it is written");
        file.flush().await.expect("it is written");
        let mut command = tokio::process::Command::new("node");
        command
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/tools/issuer.js"))
            .arg(tools)
            .stdin(std::fs::File::open(&wish).expect("a file"))
            .stdout(Stdio::from(std::fs::File::create(&told).expect("a file")))
            .kill_on_drop(true);
        let program = Program::start("the issuer", &mut command, log);
        let url = until("the issuer says where it is", PATIENCE, async || {
            program.still_runs();
            let said = std::fs::read_to_string(&told).unwrap_or_default();
            let line: Value = serde_json::from_str(said.lines().next()?).ok()?;
            line["issuer"].as_str().map(str::to_owned)
        })
        .await;
        Self { program, url }
    }

    /// Where it listens.
    fn address(&self) -> &str {
        self.url.trim_start_matches("http://")
    }

    /// It is gone.
    pub(crate) fn end(&self) {
        self.program.terminate();
    }

    /// Somebody goes where the console sends them, signs in on the issuer's own pages and says yes: where the issuer sends them
    /// then.
    pub(crate) async fn sign_in(&self, place: &str, who: &str) -> String {
        let mut cookies = BTreeMap::<String, String>::new();
        let (mut path, mut form) = (self.path_of(place), None::<String>);
        for _ in 0..12 {
            let (status, headers, page) = self.ask(&path, form.take(), &mut cookies).await;
            match status {
                302 | 303 => {
                    let location = program::header(&headers, "location").expect("where to");
                    if location.starts_with("http") && !location.starts_with(&self.url) {
                        return location.to_owned();
                    }
                    path = self.path_of(location);
                }
                200 => {
                    let between = |before: &str, after: &str| {
                        let (_, rest) = page.split_once(before)?;
                        Some(rest.split_once(after)?.0.to_owned())
                    };
                    path = self.path_of(&between("action=\"", "\"").expect("a form"));
                    form = Some(match between("name=\"prompt\" value=\"", "\"").as_deref() {
                        Some("login") => format!("prompt=login&login={who}&password=any"),
                        Some("consent") => "prompt=consent".to_owned(),
                        other => panic!("it asks for {other:?}: {page}"),
                    });
                }
                other => panic!("{other}: {page}"),
            }
        }
        panic!("the issuer comes to no end");
    }

    fn path_of(&self, place: &str) -> String {
        place.strip_prefix(&self.url).unwrap_or(place).to_owned()
    }

    async fn ask(
        &self,
        path: &str,
        form: Option<String>,
        cookies: &mut BTreeMap<String, String>,
    ) -> program::HttpAnswer {
        let method = if form.is_some() { "POST" } else { "GET" };
        let body = form.unwrap_or_default();
        let cookie: Vec<String> = cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncookie: {}\r\n\
             content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\n\r\n{body}",
            self.address(),
            cookie.join("; "),
            body.len()
        );
        let answer = program::exchange(self.address(), head.as_bytes()).await;
        for (_, set) in answer.1.iter().filter(|(name, _)| name == "set-cookie") {
            let pair = set.split(';').next().and_then(|pair| pair.split_once('='));
            let (name, value) = pair.expect("a cookie");
            if value.is_empty() {
                cookies.remove(name);
            } else {
                cookies.insert(name.to_owned(), value.to_owned());
            }
        }
        answer
    }
}
