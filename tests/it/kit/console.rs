//! `settled console` as a browser meets it, without one.

use std::{path::PathBuf, process::Stdio};

use serde_json::Value;

use crate::kit::{
    program::{self, Program, header},
    secrets,
    support::{Ground, PATIENCE, until},
};

/// What the proxy of these tests knows.
pub(crate) const PROXY_SECRET: &str = "what only the proxy knows";

/// A running console.
pub(crate) struct Console {
    /// None: it runs in another's program.
    program: Option<Program>,
    told: PathBuf,
    address: String,
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct PageSeen {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) text: String,
}

impl PageSeen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The cookie that the browser is to keep.
    pub(crate) fn cookie(&self) -> Option<String> {
        let cookie = self.header("set-cookie")?.split(';').next()?;
        Some(cookie.to_owned())
    }

    /// What a hidden field of the page holds.
    pub(crate) fn hidden(&self, name: &str) -> Option<String> {
        let field = format!("type=\"hidden\" name=\"{name}\" value=\"");
        let (_, rest) = self.text.split_once(&field)?;
        Some(rest.split_once('"')?.0.to_owned())
    }
}

/// Somebody with a browser.
#[derive(Clone, Debug, Default)]
pub(crate) struct Visitor {
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) cookie: Option<String>,
    pub(crate) token: String,
}

impl Console {
    /// Starts one and waits until it says where it is.
    pub(crate) async fn start(ground: &Ground, settings: &[(&str, &str)]) -> Self {
        let name = uuid::Uuid::new_v4().simple().to_string();
        let (log, told) = (
            ground.file(&format!("console-{name}.log")),
            ground.file(&format!("console-{name}.out")),
        );
        let mut command = ground.command(&["console", "--json", "--operator", "ann"]);
        command
            .env("SETTLED_CONSOLE__LISTEN", "127.0.0.1:0")
            // A test asks faster than a person.
            .env("SETTLED_CONSOLE__RATE_OF_STRANGERS", "10000")
            .env("SETTLED_CONSOLE__RATE_OF_ALL_STRANGERS", "100000")
            .env("SETTLED_CONSOLE__RATE_PER_SESSION", "10000")
            .env("SETTLED_LOG__LEVEL", "debug")
            .env("SETTLED_LOG__FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&told).expect("a file"));
        for (name, value) in settings {
            command.env(name, value);
        }
        let mut console = Self {
            program: Some(Program::start("the console", &mut command, log)),
            told,
            address: String::new(),
        };
        let url = until("the console says where it is", PATIENCE, async || {
            if let Some(program) = &console.program {
                program.still_runs();
            }
            console.lines().last().cloned()
        })
        .await;
        let url = url["link"]
            .as_str()
            .or(url["listens"].as_str())
            .map(str::to_owned)
            .or_else(|| std::fs::read_to_string(url["linkFile"].as_str()?).ok())
            .expect("where");
        let (_, rest) = url.split_once("://").expect("a URL");
        console.address = rest.split('/').next().expect("an address").to_owned();
        console
    }

    /// The same behind a proxy: ann may act, bob approve, and everybody look. Its login may vouch for them, as a superuser that
    /// tests have, or by a grant.
    pub(crate) async fn behind_proxy(ground: &Ground, settings: &[(&str, &str)]) -> Self {
        let role = "DO $$ BEGIN CREATE ROLE settled_console NOLOGIN;
                    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$";
        let db = ground.db().await;
        db.batch_execute(role).await.expect("a role");
        let secret = ground.file("proxy-secret");
        secrets::password(PROXY_SECRET);
        std::fs::write(&secret, PROXY_SECRET).expect("a secret");
        let secret = secret.display().to_string();
        let proxied = [
            ("SETTLED_CONSOLE__PROXY_SECRET_FILE", secret.as_str()),
            ("SETTLED_CONSOLE__OPERATORS", "ann"),
            ("SETTLED_CONSOLE__APPROVERS", "bob"),
        ];
        Self::start(ground, &[&proxied, settings].concat()).await
    }

    /// One that runs in another's program, at an address.
    pub(crate) fn at(address: &str) -> Self {
        Self {
            program: None,
            told: PathBuf::new(),
            address: address.to_owned(),
        }
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.told).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// The newest link's secret.
    pub(crate) fn link(&self) -> String {
        let lines = self.lines();
        let link = lines.last().and_then(|line| line["link"].as_str()).expect("a link");
        let secret = link.rsplit_once('=').expect("a secret").1.to_owned();
        secrets::password(&secret);
        secret
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// SIGTERM, and an orderly end.
    pub(crate) async fn stop(&self) {
        if let Some(program) = &self.program {
            program.stop().await;
        }
    }

    /// What the kernel says of its memory, in kB.
    pub(crate) fn memory_kb(&self, line: &str) -> u64 {
        let id = self.program.as_ref().and_then(Program::id).expect("it runs");
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
        let found = status
            .lines()
            .find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
        let number = found.and_then(|text| text.split_whitespace().next()?.parse().ok());
        number.expect("a number of kB")
    }

    /// Asks for a new proof of the books, and looks until it is over.
    pub(crate) async fn proves_the_books(&self, visitor: &Visitor) {
        let mut path = "/ledger/check".to_owned();
        until("the books are proved", PATIENCE, async || {
            let page = self.get(visitor, &path).await;
            if let Some((_, rest)) = page.text.split_once("href=\"/ledger/check?of=") {
                let number = rest.split('"').next().expect("a number");
                path = format!("/ledger/check?of={number}");
            }
            assert!(!page.text.contains("the books are wrong"), "{page:?}");
            page.text.contains("the books are right").then_some(())
        })
        .await;
    }

    /// Opens the link.
    pub(crate) async fn sign_in(&self) -> Visitor {
        let visitor = self.sign_in_without_pages().await;
        self.known(visitor).await
    }

    /// The same where no page with a form can be had.
    pub(crate) async fn sign_in_without_pages(&self) -> Visitor {
        let stranger = Visitor::default();
        let form = format!("link={}", self.link());
        let page = self.post(&stranger, "/enter", &form).await;
        assert_eq!(page.status, 303, "{page:?}");
        let cookie = page.cookie().expect("a cookie");
        secrets::password(cookie.split_once('=').map_or(cookie.as_str(), |(_, value)| value));
        Visitor {
            cookie: Some(cookie),
            ..stranger
        }
    }

    /// Comes through the proxy.
    pub(crate) async fn visitor(&self, name: &str) -> Visitor {
        let visitor = Visitor {
            headers: vec![
                ("x-settled-proxy-secret".to_owned(), PROXY_SECRET.to_owned()),
                ("x-forwarded-user".to_owned(), name.to_owned()),
            ],
            ..Visitor::default()
        };
        let page = self.get(&visitor, "/plans").await;
        assert_eq!(page.status, 200, "{page:?}");
        assert!(
            page.cookie().is_none(),
            "the proxy says with every request who it is: {page:?}"
        );
        self.known(visitor).await
    }

    /// With what its forms carry.
    async fn known(&self, visitor: Visitor) -> Visitor {
        let page = self.get(&visitor, "/plans").await;
        assert_eq!(page.status, 200, "{page:?}");
        let token = page.hidden("form_token").expect("a form");
        secrets::of_pages(&token);
        Visitor { token, ..visitor }
    }

    pub(crate) async fn get(&self, visitor: &Visitor, path: &str) -> PageSeen {
        self.ask(visitor, "GET", path, &[], "").await
    }

    /// A form, with the token of the visitor's session.
    pub(crate) async fn act(&self, visitor: &Visitor, path: &str, fields: &[(&str, &str)]) -> PageSeen {
        let mut form = format!("form_token={}", visitor.token);
        for (name, value) in fields {
            let value: String = value
                .bytes()
                .map(|byte| match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
                    byte => format!("%{byte:02X}"),
                })
                .collect();
            form.push_str(&format!("&{name}={value}"));
        }
        self.post(visitor, path, &form).await
    }

    pub(crate) async fn post(&self, visitor: &Visitor, path: &str, form: &str) -> PageSeen {
        let kind = [("content-type", "application/x-www-form-urlencoded")];
        self.ask(visitor, "POST", path, &kind, form).await
    }

    pub(crate) async fn ask(
        &self,
        visitor: &Visitor,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> PageSeen {
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "host") {
            head.push_str(&format!("host: {}\r\n", self.address));
        }
        let own = visitor
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in headers.iter().copied().chain(own) {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(cookie) = &visitor.cookie {
            head.push_str(&format!("cookie: {cookie}\r\n"));
        }
        if method == "POST" {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let bytes = [head.as_bytes(), body.as_bytes()].concat();
        let (status, headers, text) = program::exchange(&self.address, &bytes).await;
        secrets::check_page(path, &text);
        PageSeen { status, headers, text }
    }
}
