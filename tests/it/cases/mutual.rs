//! Who shows a certificate to whom: clients to a PostgreSQL and a RabbitMQ that ask for one, servers to us; good ones, and ones
//! that are wrong in one way each. And certificates that are renewed while programs run.

use std::{path::Path, sync::Arc};

use tokio::net::TcpStream;

use crate::kit::{
    amqp::{Line, Message, Tap},
    api::Api,
    auditor::{Expect, event_id},
    certificates::{CLIENT, Certificates, SERVER, Term, Wanted, swap},
    command::{Answer, ask, ask_in},
    front::Front,
    partner::Partner,
    postgres::Server,
    rabbitmq::Node,
    support::{Ground, PATIENCE, Services, address, said, skip, until, userinfo},
};

/// Clients' certificates that are wrong before anybody sees them, and what is said of each.
const UNUSABLE: [(&str, Wanted<'static>, &str); 3] = [
    (
        "ended",
        Wanted {
            term: Term::Ended,
            ..CLIENT
        },
        "ended at 2020-01-02T00:00:00Z: renew it",
    ),
    (
        "not-yet",
        Wanted {
            term: Term::NotYet,
            ..CLIENT
        },
        "counts from 2098-01-01T00:00:00Z only",
    ),
    (
        "of-a-server",
        Wanted {
            extensions: SERVER.extensions,
            ..CLIENT
        },
        "is not for clients",
    ),
];

/// Servers' certificates that are wrong in one way each, and what is said of each.
const UNTRUSTED: [(&str, &str, Wanted<'static>, &str); 4] = [
    (
        "good",
        "ended",
        Wanted {
            term: Term::Ended,
            ..SERVER
        },
        "certificate expired",
    ),
    (
        "good",
        "elsewhere",
        Wanted {
            extensions: "subjectAltName = DNS:elsewhere.example\n",
            ..SERVER
        },
        "not valid for name",
    ),
    (
        "good",
        "of-a-client",
        Wanted {
            extensions: "subjectAltName = DNS:localhost\nextendedKeyUsage = clientAuth\n",
            ..SERVER
        },
        "certificate",
    ),
    ("other", "of-another", SERVER, "UnknownIssuer"),
];

/// Variables that say who we are to one side.
fn shown(certificates: &Certificates, section: &str, certificate: &str, key: &str) -> Vec<(String, String)> {
    let path = |name: &str| match name {
        "" => String::new(),
        name => certificates.name(name),
    };
    [
        ("CA_FILE", path("good.pem")),
        ("CLIENT_CERTIFICATE_FILE", path(certificate)),
        ("CLIENT_KEY_FILE", path(key)),
    ]
    .map(|(name, value)| (format!("SETTLED_{section}__{name}"), value))
    .into()
}

async fn asked(variables: &[(String, String)], more: &[(&str, &str)], arguments: &[&str]) -> Answer {
    let variables = variables.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let all: Vec<(&str, &str)> = variables.chain(more.iter().copied()).collect();
    ask_in(&all, arguments).await
}

/// What is tried of clients on either side: what they show, the exit code, and what is said. Nothing is said where it works.
async fn clients(section: &str, certificates: &Certificates, ask: impl AsyncFn(&[(String, String)]) -> Answer) {
    for (name, wanted, sentence) in UNUSABLE {
        certificates.issue("good", name, wanted).expect("openssl was there");
        let shown = shown(certificates, section, &format!("{name}.pem"), &format!("{name}.key"));
        ask(&shown).await.refused(2, sentence);
    }
    for (certificate, key, sentence) in [
        ("client.pem", "other-server.key", "do not fit"),
        ("client.pem", "", "client_key_file is not: set both, or none"),
        ("", "client.key", "client_certificate_file is not: set both, or none"),
        ("none.pem", "client.key", "none.pem"),
        ("client.pem", "none.key", "none.key"),
        ("openssl.cnf", "client.key", "holds no certificate"),
        ("client.pem", "openssl.cnf", "private key"),
    ] {
        let shown = shown(certificates, section, certificate, key);
        let (message, hint) = ask(&shown).await.refusal(2);
        assert!(
            message.contains(sentence) && hint.contains("client_certificate_file"),
            "{certificate} {key}: {message} ({hint})"
        );
    }
    let shown = shown(certificates, section, "client.pem", "client.key");
    ask(&shown).await.document(0);
}

/// A PostgreSQL that lets in whom a certificate names, and nobody else.
async fn postgres(certificates: &Certificates) -> Result<Server, String> {
    let settings = "ssl = on\nssl_cert_file = 'good-server.pem'\nssl_key_file = 'good-server.key'\n\
                    ssl_ca_file = 'good.pem'";
    let files = ["good-server.pem", "good-server.key", "good.pem"].map(|name| certificates.file(name));
    let access = "hostssl all all 127.0.0.1/32 cert\n";
    Server::start(settings, access, &files.each_ref().map(|file| file.as_path())).await
}

#[tokio::test]
async fn postgres_asks_who_we_are() {
    const NAME: &str = "mutual::postgres_asks_who_we_are";
    let prepared = async {
        let certificates = Certificates::new()?;
        certificates.issue("good", "client", CLIENT)?;
        let server = postgres(&certificates).await?;
        Ok::<_, String>((certificates, server))
    };
    let (certificates, server) = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip(NAME, &why),
    };
    let url = server.url("localhost", "postgres?sslmode=verify-full");
    let run = async |shown: &[(String, String)], arguments: &[&str]| {
        asked(shown, &[("SETTLED_DATABASE_URL", &url)], arguments).await
    };
    let good = shown(&certificates, "DATABASE", "client.pem", "client.key");
    run(&good, &["migrate"]).await.document(0);
    clients("DATABASE", &certificates, async |shown: &[(String, String)]| {
        run(shown, &["ledger", "check"]).await
    })
    .await;
    // What only the server can refuse.
    let somebody = Wanted {
        subject: "somebody",
        ..CLIENT
    };
    certificates.issue("good", "somebody", somebody).expect("openssl");
    certificates.issue("other", "stranger", CLIENT).expect("openssl");
    for (name, sentence) in [
        ("", "requires a valid client certificate"),
        ("somebody", "certificate authentication failed"),
        // It ends the connection with an alert, which its last word may be lost to.
        ("stranger", ""),
    ] {
        let [certificate, key] = ["pem", "key"].map(|end| match name {
            "" => String::new(),
            name => format!("{name}.{end}"),
        });
        let shown = shown(&certificates, "DATABASE", &certificate, &key);
        let (message, hint) = run(&shown, &["ledger", "check"]).await.refusal(69);
        assert!(
            message.contains(sentence) && !hint.is_empty(),
            "{name:?}: {message} ({hint})"
        );
        assert!(!message.contains("somebody"), "{message}");
    }
    // And whom it shows us: it reads its files anew when it is told to.
    for (authority, name, wanted, sentence) in UNTRUSTED {
        certificates.issue(authority, name, wanted).expect("openssl");
        for end in ["pem", "key"] {
            server.renew(
                &format!("good-server.{end}"),
                &certificates.file(&format!("{name}.{end}")),
            );
        }
        let told = until(sentence, PATIENCE, async || {
            let answer = run(&good, &["ledger", "check"]).await;
            // Until it has read them it is as before, or between the two.
            (answer.code == Some(69) && answer.err.contains(sentence)).then_some(answer)
        });
        let (message, hint) = told.await.refusal(69);
        assert!(message.starts_with("TLS with the database"), "{name}: {message}");
        assert!(hint.contains("database.ca_file"), "{name}: {hint}");
        for end in ["pem", "key"] {
            let file = format!("good-server.{end}");
            server.renew(&file, &certificates.file(&file));
        }
        until("the good one is back", PATIENCE, async || {
            (run(&good, &["ledger", "check"]).await.code == Some(0)).then_some(())
        })
        .await;
    }
    // The doctor says until when it counts.
    let document: serde_json::Value = {
        let answer = run(&good, &["doctor"]).await;
        serde_json::from_str(&answer.out).unwrap_or_else(|error| panic!("{error}: {}", answer.all()))
    };
    let mut lines = document["checks"].as_array().expect("lines").iter();
    let line = lines
        .find(|line| line["name"] == "database_certificate")
        .expect("a line");
    assert_eq!(line["ok"], true, "{line}");
    let detail = line["detail"].as_str().expect("a sentence");
    assert!(detail.contains("until 2099-01-01T00:00:00Z"), "{detail}");
}

#[tokio::test]
async fn a_broker_is_believed_by_its_certificate() {
    const NAME: &str = "mutual::a_broker_is_believed_by_its_certificate";
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => return skip(NAME, &why),
    };
    let ground = Ground::new("believed").await;
    let upstream = address(&ground.services.broker);
    let (user, password) = userinfo(&ground.broker_url);
    let authority = certificates.name("good.pem");
    for (signer, name, wanted, sentence) in UNTRUSTED {
        certificates.issue(signer, name, wanted).expect("openssl was there");
        let [certificate, key] = ["pem", "key"].map(|end| certificates.file(&format!("{name}.{end}")));
        let front = Front::open(upstream.clone(), &certificate, &key).await;
        let url = format!(
            "amqps://{user}:{password}@localhost:{}/{}",
            front.address.port(),
            ground.name
        );
        let variables = [
            ("SETTLED_BROKER_URL", url.as_str()),
            ("SETTLED_BROKER__CA_FILE", authority.as_str()),
        ];
        let (message, hint) = ask_in(&variables, &["topology"]).await.refusal(69);
        assert!(
            message.starts_with("TLS with the broker") && message.contains(sentence) && hint.contains("broker.ca_file"),
            "{name}: {message} ({hint})"
        );
    }
}

/// Registers a partner, whose client has a hundred, and reserves for it.
async fn prepare(
    ground: &Ground,
    flags: &[&str],
    partner: &Partner,
    count: usize,
) -> Vec<crate::kit::auditor::Reservation> {
    let done = async |arguments: &[&str]| ask(ground, &[arguments, flags].concat()).await.document(0);
    let (client, connection) = (partner.client.to_string(), partner.connection.to_string());
    let enterprise = partner.enterprise.as_str();
    done(&["partner", "add", "--enterprise-id", enterprise, "--name", "A partner"]).await;
    let key = partner.public_key();
    done(&["key", "add", "--enterprise-id", enterprise, "--public-key", &key]).await;
    let ours = ["--connection-id", &connection, "--client-id", &client];
    let theirs = [
        "--partners-client-id",
        &partner.partners_client,
        "--partners-connection-id",
        &partner.partners_connection,
    ];
    let add = ["connection", "add", "--enterprise-id", enterprise];
    done(&[&add[..], &ours, &theirs].concat()).await;
    let money = ["--currency", "BTC", "--quantity", "100", "--reference", "r"];
    done(&[&["deposit", "--client-id", &client], &money[..]].concat()).await;
    let reservations: Vec<_> = (0..count).map(|_| partner.allocation("BTC", "1")).collect();
    let lines: String = reservations.iter().map(|one| one.line() + "\n").collect();
    let output = ground
        .run_with(&[&["allocation", "reserve"], flags].concat(), &lines)
        .await;
    assert!(output.status.success(), "{}", said(&output));
    reservations
}

fn cleared(id: uuid::Uuid) -> String {
    event_id(&format!("allocation.cleared|{id}"))
}

/// SASL EXTERNAL: the broker takes the certificate's name for the login, dead letters carry it, and the collector believes them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_the_login_of_the_broker() {
    const NAME: &str = "mutual::a_certificate_is_the_login_of_the_broker";
    let prepared = async {
        let certificates = Certificates::new()?;
        certificates.issue("good", "client", CLIENT)?;
        let [authority, certificate, key] =
            ["good.pem", "good-server.pem", "good-server.key"].map(|name| certificates.file(name));
        let node = Node::start(&authority, &certificate, &key, &["PLAIN", "EXTERNAL"]).await?;
        Ok::<_, String>((certificates, node))
    };
    let (certificates, node) = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip(NAME, &why),
    };
    let mut ground = Ground::new("external").await;
    ground.copy_template().await;
    let url = node.url("settled@");
    let topology =
        async |url: &str, shown: &[(String, String)]| asked(shown, &[("SETTLED_BROKER_URL", url)], &["topology"]).await;
    clients("BROKER", &certificates, async |shown: &[(String, String)]| {
        topology(&url, shown).await
    })
    .await;
    // What only the broker can refuse.
    let nobody = Wanted {
        subject: "nobody-here",
        ..CLIENT
    };
    certificates.issue("good", "nobody", nobody).expect("openssl");
    certificates.issue("other", "stranger", CLIENT).expect("openssl");
    let refused = topology(&url, &shown(&certificates, "BROKER", "nobody.pem", "nobody.key")).await;
    let (message, hint) = refused.refusal(69);
    assert!(
        message.contains("EXTERNAL") && hint.contains("certificate"),
        "{message} ({hint})"
    );
    topology(&url, &shown(&certificates, "BROKER", "stranger.pem", "stranger.key"))
        .await
        .refusal(69);
    let none = shown(&certificates, "BROKER", "", "");
    topology(&url, &none)
        .await
        .refused(2, "names no certificate to log in with");
    // With a password instead it wants to see one all the same.
    let password = url
        .replace("settled@", "settled:unused@")
        .replace("?auth_mechanism=external", "");
    topology(&password, &none).await.refusal(69);
    let good = shown(&certificates, "BROKER", "client.pem", "client.key");
    topology(&password, &good).await.document(0);

    // One queue is named by the books.
    let both = [
        ("SETTLED_BROKER_URL", url.as_str()),
        ("SETTLED_DATABASE_URL", ground.database_url.as_str()),
    ];
    asked(&good, &both, &["topology"]).await.document(0);

    ground.broker_url = url;
    let flags: Vec<String> = good
        .iter()
        .map(|(name, value)| {
            let setting = name.trim_start_matches("SETTLED_BROKER__").to_lowercase();
            format!("broker.{setting}={value}")
        })
        .collect();
    let flags: Vec<&str> = flags.iter().flat_map(|flag| ["--set", flag.as_str()]).collect();
    let partner = Partner::new("acme");
    let reservations = prepare(&ground, &flags, &partner, 1).await;
    let events = Tap::open(&node.plain_url(), "settlement.events", "test.events").await;
    let line = Line::open(&node.plain_url()).await;
    let settings: Vec<(&str, &str)> = good
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let worker = ground.ready_worker(&settings).await;
    let broken = Message::new("acme.allocation.update", "{", Expect::Any);
    line.publish(&[partner.cleared(&reservations[0]), broken]).await;
    let id = cleared(reservations[0].id);
    events.wait("its event", |seen| seen.message_id() == Some(&id)).await;
    let db = ground.db().await;
    let reason = until("its dead letter is stored", PATIENCE, async || {
        let rows = db.query("SELECT reason FROM settled.dead_letters", &[]);
        let rows = rows.await.expect("dead letters");
        rows.first().map(|row| row.get::<_, String>(0))
    });
    assert_eq!(reason.await, "malformed_message", "believed, so it is our own login's");
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// A broker that takes no certificate for a login says so in our words.
#[tokio::test]
async fn a_broker_without_external_says_what_it_lacks() {
    const NAME: &str = "mutual::a_broker_without_external_says_what_it_lacks";
    let prepared = async {
        let certificates = Certificates::new()?;
        certificates.issue("good", "client", CLIENT)?;
        Ok::<_, String>(certificates)
    };
    let certificates = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip(NAME, &why),
    };
    let ground = Ground::new("no_external").await;
    let [certificate, key] = ["good-server.pem", "good-server.key"].map(|name| certificates.file(name));
    let front = Front::open(address(&ground.services.broker), &certificate, &key).await;
    let (user, _) = userinfo(&ground.broker_url);
    let url = format!(
        "amqps://{user}@localhost:{}/{}?auth_mechanism=external",
        front.address.port(),
        ground.name
    );
    let good = shown(&certificates, "BROKER", "client.pem", "client.key");
    let answer = asked(&good, &[("SETTLED_BROKER_URL", &url)], &["topology"]).await;
    let (message, hint) = answer.refusal(69);
    assert!(
        message.contains("EXTERNAL") && hint.contains("rabbitmq_auth_mechanism_ssl"),
        "{message} ({hint})"
    );
}

/// Both sides change whom they trust; the worker's files follow, and it goes on without a new start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_while_a_worker_runs() {
    const NAME: &str = "mutual::certificates_are_renewed_while_a_worker_runs";
    let prepared = async {
        let certificates = Certificates::new()?;
        // What the worker is told of; its content changes.
        certificates.issue("good", "mine", CLIENT)?;
        certificates.issue("other", "next", CLIENT)?;
        swap(&certificates.file("good.pem"), &certificates.file("trusted.pem"));
        let server = postgres(&certificates).await?;
        Ok::<_, String>((certificates, server))
    };
    let (certificates, server) = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip(NAME, &why),
    };
    let file = |name: &str| certificates.file(name);
    let front = Front::asking(
        address(&Services::of_environment().broker),
        &file("good-server.pem"),
        &file("good-server.key"),
        Some(&file("good.pem")),
    )
    .await;
    let mut ground = Ground::new("renewed").await;
    let plain = ground.broker_url.clone();
    let (user, password) = userinfo(&plain);
    ground.broker_url = format!(
        "amqps://{user}:{password}@localhost:{}/{}",
        front.address.port(),
        ground.name
    );
    ground.database_url = server.url("localhost", "postgres?sslmode=verify-full");
    let settings: Vec<(String, String)> = ["DATABASE", "BROKER"]
        .iter()
        .flat_map(|section| {
            [
                ("CA_FILE", "trusted.pem"),
                ("CLIENT_CERTIFICATE_FILE", "mine.pem"),
                ("CLIENT_KEY_FILE", "mine.key"),
            ]
            .map(|(name, of)| (format!("SETTLED_{section}__{name}"), certificates.name(of)))
        })
        .collect();
    let flags: Vec<String> = settings
        .iter()
        .map(|(name, value)| {
            let setting = name.trim_start_matches("SETTLED_").to_lowercase().replace("__", ".");
            format!("{setting}={value}")
        })
        .collect();
    let flags: Vec<&str> = flags.iter().flat_map(|flag| ["--set", flag.as_str()]).collect();
    let done = async |arguments: &[&str]| ask(&ground, &[arguments, &flags].concat()).await.document(0);
    done(&["migrate"]).await;
    done(&["topology"]).await;
    let partner = Partner::new("acme");
    let reservations = prepare(&ground, &flags, &partner, 2).await;
    let events = Tap::open(&plain, "settlement.events", "test.events").await;
    let line = Line::open(&plain).await;
    let settings: Vec<(&str, &str)> = settings
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .chain([("SETTLED_RETRY__MAX", "200ms")])
        .collect();
    let worker = ground.ready_worker(&settings).await;
    line.publish(&[partner.cleared(&reservations[0])]).await;
    let id = cleared(reservations[0].id);
    events
        .wait("the first event", |seen| seen.message_id() == Some(&id))
        .await;

    // Both servers now trust the other authority alone, and are certified by it.
    for (old, new) in [
        ("good.pem", "other.pem"),
        ("good-server.pem", "other-server.pem"),
        ("good-server.key", "other-server.key"),
    ] {
        server.renew(old, &file(new));
    }
    front.show(
        &file("other-server.pem"),
        &file("other-server.key"),
        Some(&file("other.pem")),
    );
    // A connection that is there goes on; one that is made anew meets the new ones.
    end_connections(&server, &certificates).await;
    front.cut();
    line.publish(&[partner.cleared(&reservations[1])]).await;
    until("it does not trust them", PATIENCE, async || {
        worker.said().contains("UnknownIssuer").then_some(())
    })
    .await;
    worker.not_ready().await;
    assert!(worker.ended().is_none(), "{}", worker.said());
    // Ours follow: it goes on by itself.
    swap(&file("other.pem"), &file("trusted.pem"));
    certificates.replace("mine", "next");
    let id = cleared(reservations[1].id);
    events
        .wait("the second event", |seen| seen.message_id() == Some(&id))
        .await;
    worker.ready().await;
    assert_eq!(worker.terminate().await.code(), Some(0));
}

/// Ends every connection to the database, as one who shows the next certificate and trusts whatever the server has.
async fn end_connections(server: &Server, certificates: &Certificates) {
    let files = settled::tls::ClientFiles {
        ca_file: Some(certificates.file("both.pem")),
        certificate_file: Some(certificates.file("next.pem")),
        key_file: Some(certificates.file("next.key")),
        ..settled::tls::ClientFiles::default()
    };
    let both = ["good.pem", "other.pem"].map(|name| std::fs::read_to_string(certificates.file(name)).expect("a file"));
    std::fs::write(certificates.file("both.pem"), both.concat()).expect("a file");
    let url = server.url("localhost", "postgres?sslmode=require");
    let config: tokio_postgres::Config = url.parse().expect("a URL");
    let client = until("the server trusts the other authority", PATIENCE, async || {
        let tls = tokio_postgres_rustls::MakeRustlsConnect::new(files.config().expect("files"));
        let (client, connection) = config.connect(tls).await.ok()?;
        tokio::spawn(async move { drop(connection.await) });
        Some(client)
    })
    .await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'settled'";
    client.query(end, &[]).await.expect("they end");
}

/// Connections to a listener meet the newest certificate that could be used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listeners_certificate_is_renewed_while_it_listens() {
    const NAME: &str = "mutual::a_listeners_certificate_is_renewed_while_it_listens";
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => return skip(NAME, &why),
    };
    certificates.issue("good", "mine", SERVER).expect("openssl was there");
    let ground = Ground::new("listener").await;
    ground.copy_template().await;
    assert!(ground.run(&["topology"]).await.status.success());
    let (certificate, key) = (certificates.name("mine.pem"), certificates.name("mine.key"));
    let settings = [
        ("SETTLED_API__CERTIFICATE_FILE", certificate.as_str()),
        ("SETTLED_API__KEY_FILE", key.as_str()),
    ];
    let api = Api::start(&ground, &settings).await;
    let trusts = async |authority: &str| -> bool {
        let files = settled::tls::ClientFiles {
            ca_file: Some(certificates.file(authority)),
            ..settled::tls::ClientFiles::default()
        };
        let config = files.config().expect("an authority");
        let stream = TcpStream::connect(api.address()).await.expect("it listens");
        let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        connector.connect(name, stream).await.is_ok()
    };
    assert!(trusts("good.pem").await && !trusts("other.pem").await);
    certificates.replace("mine", "other-server");
    assert!(trusts("other.pem").await && !trusts("good.pem").await);
    assert!(api.said().contains("the certificate was renewed"), "{}", api.said());
    // Half of a renewal: the one before counts until the other half is there.
    swap(&certificates.file("good-server.pem"), Path::new(&certificate));
    assert!(trusts("other.pem").await && !trusts("good.pem").await);
    assert!(api.said().contains("do not fit"), "{}", api.said());
    swap(&certificates.file("good-server.key"), Path::new(&key));
    assert!(trusts("good.pem").await && !trusts("other.pem").await);
    api.stop().await;
}
