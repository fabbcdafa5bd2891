//! Who is let into the console: by an issuer of OpenID Connect, by a proxy that shows its certificate; limited to some partners; and
//! beside a worker.

use std::{net::TcpListener, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use serde_json::json;
use settled::console::{Needs, table};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::console_browser::web_tools;
use crate::kit::{
    certificates::certify,
    command::Answer,
    console::{Console, PageSeen, Visitor},
    issuer::{CLIENT, Issuer},
    partner::Partner,
    program::{HttpAnswer, read_answer},
    support::{COLLECTS, PATIENCE, Place, skip, until},
};

/// An address of this machine where nobody listens yet.
fn free() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").to_string()
}

fn text_of(file: &std::path::Path) -> String {
    file.display().to_string()
}

/// With what a browser was told to keep.
fn kept(page: &PageSeen, visitor: &Visitor) -> Visitor {
    let mut cookies: Vec<String> = visitor
        .cookie
        .iter()
        .flat_map(|all| all.split("; "))
        .map(str::to_owned)
        .collect();
    for (_, set) in page.headers.iter().filter(|(name, _)| name == "set-cookie") {
        let pair = set.split(';').next().expect("a cookie");
        let name = pair.split('=').next().expect("a name");
        cookies.retain(|cookie| cookie.split('=').next() != Some(name));
        if !set.contains("Max-Age=0") {
            cookies.push(pair.to_owned());
        }
    }
    Visitor {
        cookie: (!cookies.is_empty()).then(|| cookies.join("; ")),
        ..visitor.clone()
    }
}

/// Says on the page that asks that one wants to be signed in.
async fn signs_in(console: &Console, visitor: &Visitor) -> (Visitor, PageSeen) {
    let asked = console.get(visitor, "/sign-in").await;
    assert_eq!(asked.status, 200, "{asked:?}");
    let browser = kept(&asked, visitor);
    let (_, rest) = asked.text.split_once("href=\"/sign-in?").expect("a link");
    let path = format!("/sign-in?{}", rest.split('"').next().expect("its end"));
    let left = console.get(&browser, &path).await;
    (kept(&left, &browser), left)
}

/// The whole way to the issuer and back: the browser, and what it is shown in the end.
async fn by_issuer(console: &Console, issuer: &Issuer, who: &str) -> (Visitor, PageSeen) {
    let stranger = Visitor::default();
    let (browser, left) = signs_in(console, &stranger).await;
    assert_eq!(left.status, 303, "{left:?}");
    let back = issuer.sign_in(left.header("location").expect("where to"), who).await;
    let path = back
        .strip_prefix(&format!("http://{}", console.address()))
        .expect("back to the console");
    let arrived = console.get(&browser, path).await;
    (kept(&arrived, &browser), arrived)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_are_signed_in_by_an_issuer() {
    const TEST: &str = "console_access::people_are_signed_in_by_an_issuer";
    let tools = match web_tools().await {
        Ok(tools) => tools,
        Err(why) => return skip(TEST, &why),
    };
    let place = Place::new("console_issuer").await;
    let address = free();
    let public = format!("http://{address}");
    let person = |name: &str, groups: &[&str]| json!({"email": format!("{name}@sso.example"), "email_verified": true, "groups": groups});
    let people = json!({
        "ann": person("ann", &["desk"]),
        "bob": person("bob", &["leads", "desk"]),
        "eve": person("eve", &["sales"]),
        // Says that it is bob's, and nobody has proved it.
        "mal": {"email": "bob@sso.example", "email_verified": false, "groups": ["leads"]},
    });
    for alg in ["RS256", "ES256"] {
        let issuer = Issuer::start(&place, &tools, &public, alg, people.clone()).await;
        let secret = place.file("issuer-secret");
        std::fs::write(&secret, format!("{}\n", CLIENT.1)).expect("a secret");
        let secret = text_of(&secret);
        let signing_in = [
            ("SETTLED_CONSOLE__LISTEN", address.as_str()),
            ("SETTLED_CONSOLE__PUBLIC_URL", public.as_str()),
            ("SETTLED_CONSOLE__OIDC_ISSUER", issuer.url.as_str()),
            ("SETTLED_CONSOLE__OIDC_CLIENT_ID", CLIENT.0),
            ("SETTLED_CONSOLE__OIDC_CLIENT_SECRET_FILE", secret.as_str()),
        ];
        let people_of = [
            ("SETTLED_CONSOLE__OIDC_SCOPES", "email,groups"),
            ("SETTLED_CONSOLE__READERS", "rita@sso.example"),
            ("SETTLED_CONSOLE__OPERATORS", "@desk"),
            ("SETTLED_CONSOLE__APPROVERS", "@leads"),
        ];
        let console = Console::start(&place, &[&signing_in[..], &people_of].concat()).await;
        let stranger = Visitor::default();
        let page = console.get(&stranger, "/plans").await;
        assert_eq!(page.status, 401);
        assert!(page.text.contains("href=\"/sign-in\""), "{page:?}");

        let (ann, arrived) = by_issuer(&console, &issuer, "ann").await;
        assert_eq!(
            (arrived.status, arrived.header("location")),
            (303, Some("/")),
            "{arrived:?}"
        );
        let page = console.get(&ann, "/sessions").await;
        assert!(
            page.text
                .contains("You are ann@sso.example, operator, by single sign-on"),
            "{page:?}"
        );
        let (bob, _) = by_issuer(&console, &issuer, "bob").await;
        let page = console.get(&bob, "/sessions").await;
        assert!(page.text.contains("You are bob@sso.example, approver"), "{page:?}");
        let (eve, page) = by_issuer(&console, &issuer, "eve").await;
        assert!(page.status == 403 && page.text.contains("is on no list"), "{page:?}");
        assert_eq!(console.get(&eve, "/plans").await.status, 401);
        let (mal, page) = by_issuer(&console, &issuer, "mal").await;
        assert!(
            page.status == 403 && page.text.contains("console.oidc_user_claim"),
            "{page:?}"
        );
        assert_eq!(console.get(&mal, "/plans").await.status, 401);

        // The way back is for the browser that went, once, and for what the issuer said.
        let (browser, left) = signs_in(&console, &stranger).await;
        let cookie = left.header("set-cookie").expect("a cookie");
        assert!(
            cookie.contains("HttpOnly") && cookie.contains("SameSite=Lax"),
            "{cookie}"
        );
        let back = issuer.sign_in(left.header("location").expect("where to"), "bob").await;
        let path = back
            .strip_prefix(public.as_str())
            .expect("back to the console")
            .to_owned();
        let other = console.get(&Visitor::default(), &path).await;
        assert!(
            other.status == 401 && other.text.contains("was not begun in this browser"),
            "{other:?}"
        );
        assert!(
            !other.headers.iter().any(|(_, set)| set.starts_with("settled_console=")),
            "{other:?}"
        );
        // Whoever tried it in another one has used it up.
        let late = console.get(&browser, &path).await;
        assert_eq!(late.status, 401, "{late:?}");
        for path in [
            "/signed-in",
            "/signed-in?state=x&code=y",
            "/signed-in?error=access_denied",
        ] {
            assert_eq!(console.get(&browser, path).await.status, 401, "{path}");
        }
        let (browser, left) = signs_in(&console, &stranger).await;
        let place_to = left.header("location").expect("where to");
        let state = place_to.split("state=").nth(1).and_then(|rest| rest.split('&').next());
        let path = format!("/signed-in?code=made-up&state={}", state.expect("a state"));
        let forged = console.get(&browser, &path).await;
        assert_eq!(forged.status, 503, "{forged:?}");
        assert!(
            forged.text.contains("invalid_grant") || forged.text.contains("grant"),
            "{forged:?}"
        );

        // An issuer that is away signs nobody in, and ends no session.
        issuer.end();
        until("the issuer is gone", PATIENCE, async || {
            tokio::net::TcpStream::connect(issuer.url.trim_start_matches("http://"))
                .await
                .err()
        })
        .await;
        assert_eq!(console.get(&ann, "/plans").await.status, 200);
        console.stop().await;
        let again = Console::start(&place, &signing_in).await;
        let (_, page) = signs_in(&again, &stranger).await;
        assert!(
            page.status == 503 && page.text.contains("console.oidc_issuer"),
            "{page:?}"
        );
        again.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_that_let_anybody_in_or_nobody_are_refused() {
    let place = Place::new("console_settings").await;
    let secret = place.file("a-secret");
    std::fs::write(&secret, "long enough to be a secret").expect("a file");
    let secret = text_of(&secret);
    let file = secret.as_str();
    let issuer = ("SETTLED_CONSOLE__OIDC_ISSUER", "https://sso.example");
    let client = ("SETTLED_CONSOLE__OIDC_CLIENT_ID", "console");
    let client_secret = ("SETTLED_CONSOLE__OIDC_CLIENT_SECRET_FILE", file);
    let public = ("SETTLED_CONSOLE__PUBLIC_URL", "https://console.example");
    let outside = ("SETTLED_CONSOLE__LISTEN", "0.0.0.0:0");
    for (settings, says) in [
        (&[outside][..], "nobody says who they are"),
        (&[outside, issuer, client, client_secret, public], "there is no TLS"),
        (&[issuer], "console.oidc_client_id"),
        (&[issuer, client], "console.public_url"),
        (&[issuer, client, public], "console.oidc_client_secret_file"),
        (
            &[
                ("SETTLED_CONSOLE__OIDC_ISSUER", "http://sso.example"),
                client,
                client_secret,
                public,
            ],
            "must begin with https://",
        ),
        (
            &[
                issuer,
                client,
                client_secret,
                ("SETTLED_CONSOLE__PUBLIC_URL", "https://console.example/x"),
            ],
            "no path",
        ),
        (
            &[
                issuer,
                client,
                client_secret,
                public,
                ("SETTLED_CONSOLE__PROXY_SECRET_FILE", file),
            ],
            "either an issuer signs people in, or a proxy does",
        ),
        (
            &[("SETTLED_CONSOLE__PROXY_CA_FILE", file)],
            "there is no TLS in which a proxy could show",
        ),
        (
            &[
                ("SETTLED_CONSOLE__PROXY_SECRET_FILE", file),
                ("SETTLED_CONSOLE__OPERATORS", "ann for a.b"),
            ],
            "console.operators",
        ),
        (
            &[("SETTLED_CONSOLE__DATABASE_URL_FILE", "/nowhere/at/all")],
            "console.database_url_file",
        ),
    ] {
        let mut command = place.command(&["console", "--json"]);
        command.envs(settings.iter().copied());
        let (message, _) = Answer::of(&command.output().await.expect("settled runs")).refusal(2);
        assert!(message.contains(says), "{settings:?}: {message}");
    }
    // A worker with such a console beside it does not start either.
    let mut command = place.command(&["worker", "--json"]);
    command.env("SETTLED_CONSOLE__IN_WORKER", "true").envs([outside]);
    let (message, _) = Answer::of(&command.output().await.expect("settled runs")).refusal(2);
    assert!(message.contains("nobody says who they are"), "{message}");
}

/// Somebody's connection to a console with TLS, with this certificate.
async fn over_tls(
    console: &str,
    authority: &std::path::Path,
    own: Option<&str>,
    request: &str,
) -> Result<HttpAnswer, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority).expect("an authority") {
        roots.add(certificate.expect("a certificate")).expect("an authority");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(name) => {
            let chain = CertificateDer::pem_file_iter(format!("{name}.pem")).expect("a certificate");
            let chain = chain.collect::<Result<Vec<_>, _>>().expect("a certificate");
            let key = PrivateKeyDer::from_pem_file(format!("{name}.key")).expect("a key");
            builder
                .with_client_auth_cert(chain, key)
                .expect("a certificate and its key")
        }
    };
    let stream = tokio::net::TcpStream::connect(console).await.expect("it listens");
    let name = ServerName::try_from("localhost").expect("a name");
    let connected = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await;
    let mut stream = connected.map_err(|error| error.to_string())?;
    let mut answer = Vec::new();
    let exchanged = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_to_end(&mut answer).await
    };
    let done = tokio::time::timeout(PATIENCE, exchanged).await.expect("an end");
    // Who closes without a word has said enough, if there is an answer.
    match done {
        Err(error) if answer.is_empty() => Err(error.to_string()),
        _ => Ok(read_answer(&answer)),
    }
}

/// The proxy's own certificate stands for its secret: nobody without one is spoken with, and no other of the same authority counts
/// where a name is wanted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_shows_its_certificate() {
    const TEST: &str = "console_access::a_proxy_shows_its_certificate";
    let place = Place::new("console_mtls").await;
    let directory = place.file("tls");
    std::fs::create_dir_all(&directory).expect("a directory");
    for name in ["front", "proxies", "others"] {
        if let Err(why) = certify(&directory, name) {
            return skip(TEST, &why);
        }
    }
    let path = |name: &str| text_of(&directory.join(name));
    let (certificate, key, authority) = (path("front-server.pem"), path("front-server.key"), path("proxies.pem"));
    let settings = [
        ("SETTLED_CONSOLE__CERTIFICATE_FILE", certificate.as_str()),
        ("SETTLED_CONSOLE__KEY_FILE", key.as_str()),
        ("SETTLED_CONSOLE__PROXY_CA_FILE", authority.as_str()),
        ("SETTLED_CONSOLE__OPERATORS", "ann"),
    ];
    let console = Console::start(&place, &settings).await;
    let ask = |address: String, own: Option<&'static str>, headers: &'static str| {
        let (directory, own) = (directory.clone(), own.map(path));
        async move {
            let request = format!("GET /sessions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}\r\n");
            over_tls(&address, &directory.join("front.pem"), own.as_deref(), &request).await
        }
    };
    let at = || console.address().to_owned();
    let (status, _, page) = ask(at(), Some("proxies-server"), "x-forwarded-user: ann\r\n")
        .await
        .expect("it answers");
    assert_eq!(status, 200, "{page}");
    assert!(page.contains("You are ann, operator, by proxy"), "{page}");
    let (status, ..) = ask(at(), Some("proxies-server"), "").await.expect("it answers");
    assert_eq!(status, 401, "a proxy that says no name");
    for stranger in [None, Some("others-server")] {
        let refused = ask(at(), stranger, "x-forwarded-user: ann\r\n").await;
        assert!(refused.is_err(), "{stranger:?}: {refused:?}");
    }
    console.stop().await;
    // What a browser keeps goes over TLS alone.
    let console = Console::start(&place, &settings[..2]).await;
    let form = format!("link={}", console.link());
    let request = format!(
        "POST /enter HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\ncontent-type: \
         application/x-www-form-urlencoded\r\n\r\n{form}",
        form.len()
    );
    let answer = over_tls(console.address(), &directory.join("front.pem"), None, &request).await;
    let (status, headers, page) = answer.expect("it answers");
    assert_eq!(status, 303, "{page}");
    let cookie = headers.iter().find(|(name, _)| name == "set-cookie");
    assert!(
        cookie.is_some_and(|(_, cookie)| cookie.contains("Secure")),
        "{cookie:?}"
    );
    console.stop().await;
    for (names, is_let_in) in [
        ("localhost", true),
        ("proxy.internal,localhost", true),
        ("proxy.internal", false),
    ] {
        let named = [&settings[..], &[("SETTLED_CONSOLE__PROXY_NAMES", names)]].concat();
        let console = Console::start(&place, &named).await;
        let answer = ask(
            console.address().to_owned(),
            Some("proxies-server"),
            "x-forwarded-user: ann\r\n",
        )
        .await;
        assert_eq!(answer.is_ok(), is_let_in, "{names}: {answer:?}");
        console.stop().await;
    }
}

/// Whoever is limited to a partner is answered of that one alone, whatever they ask for; what is about everybody is not for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_limited_to_a_partner_sees_and_touches_what_is_theirs() {
    let place = Place::new("console_limits").await;
    let partners = [Partner::new("acme"), Partner::new("globex")];
    let worker = place.ready_worker(&COLLECTS).await;
    for partner in &partners {
        place.strand(partner, &partner.enterprise, "1000000", (3, "7")).await;
    }
    place.collected(6).await;
    let db = place.db().await;
    for partner in &partners {
        place.add_key(partner).await;
    }
    let settings = [
        ("SETTLED_CONSOLE__OPERATORS", "ann"),
        ("SETTLED_CONSOLE__APPROVERS", "ada for acme,gil for globex"),
    ];
    let console = Console::behind_proxy(&place, &settings).await;
    let (ann, ada, gil) = (
        console.visitor("ann").await,
        console.visitor("ada").await,
        console.visitor("gil").await,
    );
    let plan = async |visitor: &Visitor, partner: &str| {
        let fields = [("partner", partner), ("seen", "3")];
        let made = console.act(visitor, "/plans", &fields).await;
        assert_eq!(made.status, 303, "{made:?}");
    };
    // 1: globex's, by ann. 2: everybody's, by ann. 3: acme's, by ada, who said nothing of acme.
    plan(&ann, "globex").await;
    let all = console.act(&ann, "/plans", &[("state", "open"), ("seen", "6")]).await;
    assert_eq!(all.header("location"), Some("/plans/2"), "{all:?}");
    let own = console.act(&ada, "/plans", &[("state", "open"), ("seen", "3")]).await;
    assert_eq!(own.header("location"), Some("/plans/3"), "{own:?}");
    let replay = [("why", "their key is there"), ("seen", "3"), ("rate", "0.01")];
    let begun = console.act(&ann, "/plans/1/replay", &replay).await;
    assert_eq!(begun.header("location"), Some("/runs/1"), "{begun:?}");

    let page = console.get(&ada, "/letters?state=all").await;
    assert!(page.text.contains("acme") && !page.text.contains("globex"), "{page:?}");
    assert!(page.text.contains("Plan 3 messages"), "{page:?}");
    let page = console.get(&ada, "/letters?partner=globex").await;
    assert!(page.text.contains("No such letter."), "{page:?}");
    for path in ["/groups", "/plans", "/runs", "/partners"] {
        let page = console.get(&ada, path).await;
        assert_eq!(page.status, 200, "{path}: {page:?}");
        assert!(!page.text.contains("globex"), "{path}: {page:?}");
    }
    let plans = console.get(&ada, "/plans").await;
    assert!(
        plans.text.contains("/plans/3\"") && !plans.text.contains("/plans/1\"") && !plans.text.contains("/plans/2\""),
        "{plans:?}"
    );
    assert_eq!(console.get(&ada, "/plans/3").await.status, 200);
    // What is somebody else's is not there for them, by whatever they ask.
    let rows = db
        .query("SELECT id, enterprise_id FROM settled.dead_letters ORDER BY seq", &[])
        .await
        .expect("letters");
    let letter_of = |partner: &str| {
        let row = rows
            .iter()
            .find(|row| row.get::<_, &str>(1) == partner)
            .expect("a letter");
        row.get::<_, uuid::Uuid>(0)
    };
    let theirs = console.get(&ada, &format!("/letters/{}", letter_of("acme"))).await;
    assert_eq!(theirs.status, 200, "{theirs:?}");
    let before: i64 = db
        .query_one("SELECT count(*) FROM settled.audit", &[])
        .await
        .expect("acts")
        .get(0);
    let why = ("why", "none of mine");
    let letter = format!("/letters/{}", letter_of("globex"));
    for (path, fields) in [
        (letter.as_str(), &[][..]),
        ("/plans/1/replay", &[why, ("seen", "3")]),
        ("/plans/2/replay", &[why, ("seen", "6")]),
        ("/plans/1/approve", &[why, ("for", "replay")]),
        ("/plans/1/discard", &[why, ("seen", "3")]),
        ("/plans/2/restore", &[why, ("seen", "6")]),
        ("/runs/1/cancel", &[why]),
        ("/runs/1/resume", &[why, ("seen", "3")]),
        ("/partners/globex/suspend", &[why]),
        ("/partners/globex/quarantine", &[why]),
        ("/partners/globex/resume", &[why]),
        ("/discard", &[why, ("partner", "globex"), ("seen", "3")]),
        ("/restore", &[why, ("partner", "globex"), ("seen", "3")]),
    ] {
        let page = console.act(&ada, path, fields).await;
        assert!((400..500).contains(&page.status), "{path}: {page:?}");
        assert!(!page.text.contains("6 messages"), "{path}: {page:?}");
    }
    for path in [letter.as_str(), "/plans/1", "/plans/2", "/runs/1", "/partners/globex"] {
        let page = console.get(&ada, path).await;
        assert!((400..500).contains(&page.status), "{path}: {page:?}");
    }
    let after: i64 = db
        .query_one("SELECT count(*) FROM settled.audit", &[])
        .await
        .expect("acts")
        .get(0);
    assert_eq!(after, before, "nothing was done, and nothing of it was seen");
    let export = console.act(&ada, "/export", &[("state", "all")]).await;
    assert!(
        export.text.contains("\"acme\"") && !export.text.contains("globex"),
        "{export:?}"
    );
    // What is about everybody is refused by its line of the table; each other line minds the limit, which is tried above.
    let mut refused = 0;
    for route in table().filter(|route| !matches!(route.needs, Needs::Nobody) && !route.limits) {
        let path = route.path.replace("{id}", "1");
        let page = match route.method {
            "GET" => console.get(&ada, &path).await,
            _ => console.act(&ada, &path, &[]).await,
        };
        assert_eq!(page.status, 403, "{route:?}: {page:?}");
        assert!(page.text.contains("limited to acme"), "{route:?}: {page:?}");
        refused += 1;
    }
    assert!(refused >= 10, "{refused}");
    // And what leads there is shown, disabled, with the reason.
    let page = console.get(&ada, "/letters").await.text;
    assert!(
        page.contains("this is about every partner; you are limited to acme"),
        "{page}"
    );
    for (name, path) in [
        ("Timeline", "/timeline"),
        ("Audit", "/audit"),
        ("Doctor", "/doctor"),
        ("Purge …", "/purge"),
    ] {
        let link = format!(
            "aria-disabled=\"true\" aria-describedby=\"{}-why\">{name}</a>",
            match path {
                "/purge" => "purge",
                _ => "places",
            }
        );
        assert!(
            page.contains(&link) && !page.contains(&format!("href=\"{path}\"")),
            "{name}: {page}"
        );
    }
    assert!(page.contains("disabled aria-describedby=\"places-why\">Find"), "{page}");
    let page = console.get(&ann, "/letters").await.text;
    assert!(
        page.contains("href=\"/purge\"") && !page.contains("places-why"),
        "{page}"
    );
    assert_eq!(console.get(&ada, "/").await.header("location"), Some("/groups"));
    // The other one's are the other one's; and discarding takes what is theirs of a filter that says nothing of partners.
    assert_eq!(console.get(&gil, "/plans/1").await.status, 200);
    assert_eq!(console.get(&gil, "/plans/3").await.status, 404);
    let cancelled = console.act(&gil, "/runs/1/cancel", &[("why", "it is ours")]).await;
    assert_eq!(cancelled.status, 303, "{cancelled:?}");
    let done = console
        .act(&ada, "/discard", &[("why", "ours"), ("since", "24h"), ("seen", "3")])
        .await;
    assert!(done.text.contains("discarded 3 messages"), "{done:?}");
    let left: i64 = db
        .query_one(
            "SELECT count(*) FROM settled.dead_letters WHERE enterprise_id = 'globex' AND state = 'discarded'",
            &[],
        )
        .await
        .expect("a count")
        .get(0);
    assert_eq!(left, 0);
    console.stop().await;
    drop(worker);
}

/// A console in the worker's program: it shows the worker, and the worker ends in order with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_has_a_console_beside_it() {
    let place = Place::new("console_beside").await;
    let address = free();
    let (url, secret) = (place.file("console-url"), place.file("console-secret"));
    std::fs::write(&url, &place.database_url).expect("a file");
    std::fs::write(&secret, crate::kit::console::PROXY_SECRET).expect("a file");
    let (url, secret) = (text_of(&url), text_of(&secret));
    let http = free();
    let worker = place
        .ready_worker(&[
            ("SETTLED_HTTP__LISTEN", http.as_str()),
            ("SETTLED_CONSOLE__IN_WORKER", "true"),
            ("SETTLED_CONSOLE__LISTEN", address.as_str()),
            ("SETTLED_CONSOLE__DATABASE_URL_FILE", url.as_str()),
            ("SETTLED_CONSOLE__PROXY_SECRET_FILE", secret.as_str()),
        ])
        .await;
    let console = Console::at(&address);
    let ann = console.visitor("ann").await;
    until("the worker is shown as ready", PATIENCE, async || {
        let page = console.get(&ann, "/").await;
        (page.text.contains(&http) && page.text.contains("</b>ready</span>")).then_some(())
    })
    .await;
    let ended = worker.terminate().await;
    assert!(ended.success(), "{}", worker.said());
    assert!(
        tokio::net::TcpStream::connect(&address).await.is_err(),
        "it ended with the worker"
    );
}

/// A worker's output goes into a log, where no secret may stand: its console wants a file for the link, or somebody who signs people in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_link_stands_in_a_worker_s_output() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new("console_link_file").await;
    let address = free();
    let beside = [
        ("SETTLED_CONSOLE__IN_WORKER", "true"),
        ("SETTLED_CONSOLE__LISTEN", address.as_str()),
    ];
    let mut command = place.command(&["worker", "--json"]);
    command.envs(beside);
    let (message, _) = Answer::of(&command.output().await.expect("settled runs")).refusal(2);
    assert!(message.contains("console.link_file"), "{message}");
    let file = place.file("the-link");
    std::fs::write(&file, "another's").expect("a file");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("everybody's");
    let told = text_of(&file);
    let worker = place
        .ready_worker(&[&beside[..], &[("SETTLED_CONSOLE__LINK_FILE", told.as_str())]].concat())
        .await;
    let link = std::fs::read_to_string(&file).expect("the link");
    let mode = std::fs::metadata(&file).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "its owner alone reads it");
    let (_, secret) = link.trim().rsplit_once("link=").expect("a link");
    assert_eq!(secret.len(), 64);
    let console = Console::at(&address);
    let entered = console
        .post(&Visitor::default(), "/enter", &format!("link={secret}"))
        .await;
    assert_eq!(entered.status, 303, "{entered:?}");
    let next = std::fs::read_to_string(&file).expect("the next link");
    assert!(next != link && next.contains("/enter?link="), "{next}");
    worker.terminate().await;
    assert!(
        !worker.said().contains(secret) && !worker.said().contains("link="),
        "{}",
        worker.said()
    );
    // Who says where the console is, and not that there is one, is told.
    let worker = place
        .ready_worker(&[("SETTLED_CONSOLE__LISTEN", "127.0.0.1:9470")])
        .await;
    assert!(
        worker.said().contains("console.in_worker = true opens one"),
        "{}",
        worker.said()
    );
    worker.terminate().await;
    let worker = place.ready_worker(&[]).await;
    assert!(!worker.said().contains("console.in_worker"), "{}", worker.said());
    worker.terminate().await;
}

/// Behind a proxy a session and a rate are a name's, whatever its browsers keep; and who is signed out, or was ended, is out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_behind_a_proxy_has_one_session_that_can_be_ended() {
    let place = Place::new("console_names").await;
    let few = [
        ("SETTLED_CONSOLE__RATE_PER_SESSION", "8"),
        ("SETTLED_CONSOLE__SESSIONS_MAX", "3"),
        ("SETTLED_CONSOLE__RATE_OF_STRANGERS", "2"),
    ];
    let console = Console::behind_proxy(&place, &few).await;
    let eve = console.visitor("eve").await;
    let bob = console.visitor("bob").await;
    // Whoever asks quickly is told so, and nobody else feels it.
    let mut asked = tokio::task::JoinSet::new();
    let console = Arc::new(console);
    for _ in 0..40 {
        let (console, eve) = (Arc::clone(&console), eve.clone());
        asked.spawn(async move { console.get(&eve, "/sign-in").await });
    }
    let answers = asked.join_all().await;
    let (few, often) = answers.iter().partition::<Vec<_>, _>(|page| page.status == 303);
    assert!(often.len() >= 10 && few.len() >= 2, "{} {}", few.len(), often.len());
    for page in &often {
        assert_eq!((page.status, page.header("retry-after")), (429, Some("1")), "{page:?}");
    }
    // Strangers have a rate of their own, behind the proxy too.
    let stranger = Visitor::default();
    let mut statuses = Vec::new();
    for _ in 0..10 {
        statuses.push(console.get(&stranger, "/plans").await.status);
    }
    assert!(statuses.contains(&401) && statuses.contains(&429), "{statuses:?}");
    let page = console.get(&bob, "/sessions").await;
    assert_eq!(page.status, 200, "{page:?}");
    assert_eq!(page.text.matches("End the session of eve").count(), 1, "{page:?}");
    assert!(
        page.text.contains("End the session of bob"),
        "nobody was put out: {page:?}"
    );

    // Bob ends it: she is out, though the proxy vouches for her, and with whatever she sends.
    let patiently = async |visitor: &Visitor, path: &str| {
        until("the rate is there again", PATIENCE, async || {
            let page = console.get(visitor, path).await;
            (page.status != 429).then_some(page)
        })
        .await
    };
    let (_, rest) = page.text.split_once("action=\"/sessions/").expect("a form");
    let all: Vec<&str> = page
        .text
        .match_indices("action=\"/sessions/")
        .map(|(at, _)| &page.text[at + 8..])
        .collect();
    assert!(!rest.is_empty());
    let of_eve = all.iter().find(|form| {
        let (form, _) = form.split_once("</form>").expect("its end");
        form.contains("End the session of eve")
    });
    let path = of_eve.and_then(|form| form.split('"').next()).expect("her form");
    let ended = console.act(&bob, path, &[]).await;
    assert_eq!(ended.status, 303, "{ended:?}");
    for path in ["/plans", "/sign-in", "/plans"] {
        let page = console.get(&eve, path).await;
        assert!(
            page.status == 403 || (path == "/sign-in" && page.status == 200),
            "{path}: {page:?}"
        );
    }
    let page = console.get(&eve, "/plans").await;
    assert!(
        page.text.contains("your session was ended by somebody else"),
        "{page:?}"
    );
    // Nor does she see what another may see.
    let page = console.get(&eve, "/sessions").await;
    assert!(page.status == 403 && !page.text.contains("bob"), "{page:?}");

    // Who signs out is out until they say otherwise.
    let out = console.act(&bob, "/sign-out", &[]).await;
    assert!(out.status == 200 && out.text.contains("href=\"/sign-in\""), "{out:?}");
    let page = patiently(&bob, "/plans").await;
    assert!(
        page.status == 401 && page.text.contains("href=\"/sign-in\""),
        "{page:?}"
    );
    // A page of somebody else's that leads there, or a redirect, undoes nothing; nor does a token that is another browser's.
    let from = |site: &str, cookie: Option<&str>| {
        let mut visitor = bob.clone();
        visitor.headers.push(("sec-fetch-site".to_owned(), site.to_owned()));
        visitor.cookie = cookie.map(str::to_owned);
        visitor
    };
    let asked = patiently(&bob, "/sign-in").await;
    let browser = kept(&asked, &bob);
    let (_, rest) = asked.text.split_once("href=\"/sign-in?token=").expect("a link");
    let token = rest.split('"').next().expect("its end");
    let path = format!("/sign-in?token={token}");
    for (visitor, path) in [
        (bob.clone(), "/sign-in"),
        (bob.clone(), path.as_str()),
        (browser.clone(), "/sign-in?token="),
        (browser.clone(), "/sign-in?token=0"),
        (from("cross-site", browser.cookie.as_deref()), path.as_str()),
        (from("same-site", None), "/sign-in"),
        (from("none", None), "/sign-in"),
        (from("cross-site", None), "/"),
    ] {
        let page = patiently(&visitor, path).await;
        assert!(matches!(page.status, 200 | 401), "{visitor:?} {path}: {page:?}");
        assert_eq!(patiently(&bob, "/plans").await.status, 401, "{visitor:?} {path}");
    }
    // The link on the page that asks does, and so does one on any page of ours where the browser says that it is ours.
    assert_eq!(patiently(&browser, &path).await.status, 303);
    let page = patiently(&bob, "/sessions").await;
    assert!(page.text.contains("You are bob"), "{page:?}");
    let bob = Visitor {
        token: page.hidden("form_token").expect("a form"),
        ..bob.clone()
    };
    assert_eq!(console.act(&bob, "/sign-out", &[]).await.status, 200);
    assert_eq!(patiently(&from("same-origin", None), "/sign-in").await.status, 303);
    assert_eq!(patiently(&bob, "/sessions").await.status, 200);
}

/// One address does not keep another from signing in; all together have a bound.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_stranger_locks_nobody_out() {
    let place = Place::new("console_strangers").await;
    let rates = [
        ("SETTLED_CONSOLE__RATE_OF_STRANGERS", "3"),
        ("SETTLED_CONSOLE__RATE_OF_ALL_STRANGERS", "20"),
    ];
    let console = Console::start(&place, &rates).await;
    let from = async |last: u8| {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket
            .bind(std::net::SocketAddr::from(([127, 0, 0, last], 0)))
            .expect("an address");
        let mut stream = socket
            .connect(console.address().parse().expect("an address"))
            .await
            .expect("it listens");
        let head = format!(
            "GET /plans HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
            console.address()
        );
        stream.write_all(head.as_bytes()).await.expect("it reads");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        read_answer(&answer).0
    };
    let mut statuses = Vec::new();
    for _ in 0..12 {
        statuses.push(from(2).await);
    }
    assert!(statuses.contains(&429) && statuses[..3] == [401; 3], "{statuses:?}");
    assert_eq!(from(3).await, 401);
    let ann = console.sign_in_without_pages().await;
    assert_eq!(console.get(&ann, "/sessions").await.status, 200);
    let mut statuses = Vec::new();
    for last in 4..100 {
        statuses.push(from(last).await);
    }
    assert!(statuses.contains(&429), "{statuses:?}");
    assert_eq!(
        console.get(&ann, "/sessions").await.status,
        200,
        "who is signed in is none of them"
    );
    console.stop().await;
}

/// An issuer that takes connections and never answers, and strangers who never send what they begin, keep nobody else waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_answers_or_never_sends_takes_no_thread_of_those_who_ask() {
    let place = Place::new("console_slow").await;
    let soon = async |what: &str, asked: std::pin::Pin<Box<dyn Future<Output = PageSeen> + Send + '_>>| {
        let asked = tokio::time::timeout(std::time::Duration::from_secs(5), asked).await;
        asked.unwrap_or_else(|_| panic!("{what} had to wait"))
    };
    // Whoever is signed in asks while many others send half a form.
    let console = Console::start(&place, &[("SETTLED_CONSOLE__STRANGERS_MAX", "40")]).await;
    let ann = console.sign_in().await;
    let mut half = Vec::new();
    for _ in 0..60 {
        let mut stream = tokio::net::TcpStream::connect(console.address())
            .await
            .expect("it listens");
        let head = format!(
            "POST /enter HTTP/1.1\r\nhost: {}\r\ncontent-length: 70\r\ncontent-type: \
             application/x-www-form-urlencoded\r\n\r\nlink=",
            console.address()
        );
        stream.write_all(head.as_bytes()).await.expect("it reads");
        half.push(stream);
    }
    let stranger = Visitor::default();
    let page = until("there is no place for more", PATIENCE, async || {
        let page = console.get(&stranger, "/enter").await;
        (page.status == 429).then_some(page)
    })
    .await;
    assert!(page.text.contains("on their way in"), "{page:?}");
    for _ in 0..3 {
        let page = soon("a page", Box::pin(console.get(&ann, "/plans"))).await;
        assert_eq!(page.status, 200, "{page:?}");
    }
    drop(half);
    until("they are gone", PATIENCE, async || {
        let page = console.get(&stranger, "/enter").await;
        (page.status == 401).then_some(())
    })
    .await;
    console.stop().await;

    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let issuer = format!("http://{}", silent.local_addr().expect("an address"));
    let secret = place.file("issuer-secret");
    std::fs::write(&secret, "a secret").expect("a file");
    let (address, secret) = (free(), text_of(&secret));
    let public = format!("http://{address}");
    let settings = [
        ("SETTLED_CONSOLE__LISTEN", address.as_str()),
        ("SETTLED_CONSOLE__PUBLIC_URL", public.as_str()),
        ("SETTLED_CONSOLE__OIDC_ISSUER", issuer.as_str()),
        ("SETTLED_CONSOLE__OIDC_CLIENT_ID", CLIENT.0),
        ("SETTLED_CONSOLE__OIDC_CLIENT_SECRET_FILE", secret.as_str()),
    ];
    let console = Arc::new(Console::start(&place, &settings).await);
    // By a link on a page of the console's own.
    let ours = Visitor {
        headers: vec![("sec-fetch-site".to_owned(), "same-origin".to_owned())],
        ..Visitor::default()
    };
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let console = Arc::clone(&console);
        let visitor = ours.clone();
        waiting.spawn(async move { console.get(&visitor, "/sign-in").await });
    }
    let (asked, _) = silent.accept().await.expect("it is asked");
    let page = soon(
        "a page for a stranger",
        Box::pin(console.get(&Visitor::default(), "/plans")),
    )
    .await;
    assert_eq!(page.status, 401, "{page:?}");
    // Nobody is asked again for those who waited, nor for who comes right after.
    for page in waiting.join_all().await {
        assert!(
            page.status == 503 && page.text.contains("console.oidc_issuer"),
            "{page:?}"
        );
    }
    let page = soon("who comes right after", Box::pin(console.get(&ours, "/sign-in"))).await;
    assert_eq!(page.status, 503, "{page:?}");
    let again = tokio::time::timeout(std::time::Duration::from_millis(100), silent.accept()).await;
    assert!(again.is_err(), "it was asked once");
    drop(asked);
    console.stop().await;
}
