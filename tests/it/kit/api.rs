//! `settled api` as partners and clients meet it.

use std::{
    collections::BTreeMap,
    process::{ExitStatus, Stdio},
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::kit::{
    program::{self, HttpAnswer, Program, header},
    secrets,
    support::{Ground, PATIENCE, get, until},
};

/// A running API.
pub(crate) struct Api {
    program: Program,
    address: String,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The name of what went wrong; it has the public API's shape, and the request's number.
    #[track_caller]
    pub(crate) fn refusal(&self, status: u16) -> &str {
        assert_eq!(self.status, status, "{self:?}");
        let error = self.body["error"].as_str().unwrap_or_default();
        assert!(!error.is_empty(), "{self:?}");
        assert_eq!(self.body["requestId"].as_str(), self.header("x-request-id"), "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/json"));
        assert_eq!(self.header("www-authenticate").is_some(), status == 401, "{self:?}");
        assert_eq!(
            self.header("retry-after").is_some(),
            matches!(status, 429 | 503),
            "{self:?}"
        );
        self.body["name"].as_str().unwrap_or_default()
    }

    #[track_caller]
    pub(crate) fn ok(&self) -> &Value {
        assert_eq!(self.status, 200, "{self:?}");
        &self.body
    }
}

impl Api {
    /// Starts one and waits until it listens and its line to the broker is up, unless that is not to be.
    pub(crate) async fn start(ground: &Ground, settings: &[(&str, &str)]) -> Self {
        let api = Self::start_unready(ground, settings).await;
        until("the API is ready", PATIENCE, async || {
            let watch = api.watch();
            let (status, _) = get(&format!("http://{watch}/readyz")).await?;
            (status == 200).then_some(())
        })
        .await;
        api
    }

    /// Starts one and waits until it listens.
    pub(crate) async fn start_unready(ground: &Ground, settings: &[(&str, &str)]) -> Self {
        let log = ground.file(&format!("api-{}.log", uuid::Uuid::new_v4().simple()));
        let mut command = ground.command(&["api"]);
        command
            .env("SETTLED_API__LISTEN", "127.0.0.1:0")
            .env("SETTLED_API__WATCH_LISTEN", "127.0.0.1:0")
            .env("SETTLED_LOG__LEVEL", "trace")
            .env("SETTLED_LOG__FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        for (name, value) in settings {
            command.env(name, value);
        }
        let mut api = Self {
            program: Program::start("the API", &mut command, log),
            address: String::new(),
        };
        api.address = until("the API listens", PATIENCE, async || {
            api.program.still_runs();
            api.address_of("the API listens")
        })
        .await;
        api
    }

    fn address_of(&self, message: &str) -> Option<String> {
        let lines = self.said();
        let mut lines = lines
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = lines.find(|line| line["message"].as_str().is_some_and(|said| said.starts_with(message)))?;
        line["address"].as_str().map(str::to_owned)
    }

    pub(crate) fn watch(&self) -> String {
        self.address_of("HTTP listens").expect("it says where it is watched")
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) async fn metrics(&self) -> String {
        let url = format!("http://{}/metrics", self.watch());
        get(&url).await.expect("metrics").1
    }

    pub(crate) fn said(&self) -> String {
        self.program.said()
    }

    pub(crate) fn terminate(&self) {
        self.program.terminate();
    }

    /// SIGTERM, and an orderly end.
    pub(crate) async fn stop(&self) {
        self.program.stop().await;
    }

    pub(crate) async fn end(&self) -> ExitStatus {
        self.program.end().await
    }

    /// A request with a token, or none.
    pub(crate) async fn ask(&self, method: &str, path: &str, token: &str, body: &[u8]) -> Answer {
        let bearer = format!("Bearer {token}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let skip = usize::from(token.is_empty());
        self.ask_with(method, path, &headers[skip..], body).await
    }

    pub(crate) async fn get(&self, path: &str, token: &str) -> Answer {
        self.ask("GET", path, token, b"").await
    }

    /// With headers of one's own.
    pub(crate) async fn ask_with(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() || method == "PUT" {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        self.exchange(&[head.as_bytes(), body].concat()).await
    }

    /// Sends bytes as they are, and reads the answer.
    pub(crate) async fn exchange(&self, bytes: &[u8]) -> Answer {
        let (status, headers, text) = program::exchange(&self.address, bytes).await;
        let line = String::from_utf8_lossy(bytes);
        secrets::check_answer(line.lines().next().unwrap_or_default(), &text);
        let answer = (status, headers, text).into();
        as_documented(bytes, &answer);
        answer
    }
}

static DOCUMENT: LazyLock<Value> = LazyLock::new(|| serde_json::from_str(settled::api::OPENAPI).expect("JSON"));

/// Holds an answer to the document: its status is one that the call is said to have, its headers are there, and its body is as
/// the schema says.
#[track_caller]
pub(crate) fn as_documented(request: &[u8], answer: &Answer) {
    let line = String::from_utf8_lossy(request);
    let mut words = line.lines().next().unwrap_or_default().split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let method = method.to_ascii_lowercase();
    // A status without a body of ours: it was no HTTP.
    if answer.status == 0 || answer.header("x-request-id").is_none() {
        return;
    }
    let told = match operation(&method, target) {
        Some(operation) => {
            let told = &operation["responses"][answer.status.to_string()];
            assert!(
                !told.is_null(),
                "{method} {target}: no answer {} is documented",
                answer.status
            );
            resolved(told)
        }
        // What is nowhere, or no method of it, is an error of the same shape.
        None => {
            assert!(
                matches!(answer.status, 400 | 404 | 405),
                "{method} {target}: {answer:?}"
            );
            &DOCUMENT["components"]["responses"]["NotFound"]
        }
    };
    for (name, header) in told["headers"].as_object().into_iter().flatten() {
        let needed = resolved(header)["required"] == true;
        let there = answer.header(&name.to_ascii_lowercase()).is_some();
        assert!(there || !needed, "{method} {target}: {name} is missing: {answer:?}");
    }
    if method == "head" {
        return;
    }
    let schema = &told["content"]["application/json"]["schema"];
    let wrong: Vec<String> = validator(schema)
        .iter_errors(&answer.body)
        .map(|error| format!("{error} at {:?}", error.instance_path().to_string()))
        .collect();
    assert!(
        wrong.is_empty(),
        "{method} {target}: {} {}: {}",
        answer.status,
        answer.body,
        wrong.join("\n")
    );
}

fn operation(method: &str, target: &str) -> Option<&'static Value> {
    let path: Vec<&str> = target.split('?').next().unwrap_or_default().split('/').collect();
    let fits = |template: &str| {
        let template: Vec<&str> = template.split('/').collect();
        let mut parts = template.iter().zip(&path);
        template.len() == path.len() && parts.all(|(say, part)| say.starts_with('{') || say == part)
    };
    let paths = DOCUMENT["paths"].as_object().expect("paths");
    let (_, methods) = paths.iter().find(|(template, _)| fits(template))?;
    let method = if method == "head" { "get" } else { method };
    methods.get(method)
}

fn resolved(value: &'static Value) -> &'static Value {
    match value["$ref"].as_str() {
        Some(target) => DOCUMENT
            .pointer(target.trim_start_matches('#'))
            .expect("what is referred to"),
        None => value,
    }
}

fn validator(schema: &Value) -> Arc<Validator> {
    static KNOWN: LazyLock<Mutex<BTreeMap<String, Arc<Validator>>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let made = known.entry(schema.to_string()).or_insert_with(|| {
        let whole = json!({"allOf": [schema], "components": DOCUMENT["components"]});
        Arc::new(jsonschema::draft202012::new(&whole).expect("a schema"))
    });
    Arc::clone(made)
}

impl From<HttpAnswer> for Answer {
    fn from((status, headers, body): HttpAnswer) -> Self {
        let body = serde_json::from_str(&body).unwrap_or(Value::String(body));
        Self { status, headers, body }
    }
}

pub(crate) fn read_answer(bytes: &[u8]) -> Answer {
    program::read_answer(bytes).into()
}
