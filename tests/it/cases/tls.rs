//! TLS on both sides: a PostgreSQL of one's own with a certificate, and a TLS front before the broker. And what is refused
//! without it.

use std::sync::Arc;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use crate::kit::{
    amqp::{Line, Tap},
    api::Api,
    auditor::event_id,
    certificates::Certificates,
    command::{Answer, ask, ask_in},
    front::Front,
    partner::Partner,
    postgres::Server,
    support::{Ground, Services, address, connect, said, skip, userinfo},
};

/// Where nobody is, on another machine (RFC 5737).
const ELSEWHERE: &str = "192.0.2.1";

// The tests ----------------------------------------------------------------------------------------------------------

/// A server that takes nothing but TLS.
async fn postgres(certificates: &Certificates) -> Result<Server, String> {
    let settings = "ssl = on\nssl_cert_file = 'good-server.pem'\nssl_key_file = 'good-server.key'";
    let files = ["good-server.pem", "good-server.key"].map(|name| certificates.file(name));
    let access = "hostssl all all 127.0.0.1/32 trust\n";
    Server::start(settings, access, &files.each_ref().map(|file| file.as_path())).await
}

async fn broker(certificates: &Certificates) -> Front {
    let upstream = address(&Services::of_environment().broker);
    let [certificate, key] = ["good-server.pem", "good-server.key"].map(|name| certificates.file(name));
    Front::open(upstream, &certificate, &key).await
}

/// The management API behind TLS is asked only if it proves who it is.
#[tokio::test]
async fn management_is_reached_by_tls_and_only_if_it_proves_who_it_is() {
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => {
            return skip(
                "tls::management_is_reached_by_tls_and_only_if_it_proves_who_it_is",
                &why,
            );
        }
    };
    let ground = Ground::new("managed_tls").await;
    ground.copy_template().await;
    assert!(ground.run(&["topology"]).await.status.success());
    let management = ground.services.management.clone();
    let (certificate, key) = (
        certificates.file("good-server.pem"),
        certificates.file("good-server.key"),
    );
    let front = Front::open(address(&management), &certificate, &key).await;
    let (user, password) = userinfo(&management);
    for (host, authority, problem) in [
        ("localhost", "good.pem", ""),
        ("localhost", "other.pem", "UnknownIssuer"),
        ("127.0.0.1", "good.pem", "not valid for name"),
    ] {
        let url = format!("https://{user}:{password}@{host}:{}", front.address.port());
        let authority = certificates.name(authority);
        let variables = [
            ("SETTLED_DATABASE_URL", ground.database_url.as_str()),
            ("SETTLED_BROKER_URL", &ground.broker_url),
            ("SETTLED_BROKER_MANAGEMENT_URL", &url),
            ("SETTLED_BROKER__CA_FILE", &authority),
        ];
        let answer = ask_in(&variables, &["doctor"]).await;
        let document = answer.document(i32::from(!problem.is_empty()));
        let mut lines = document["checks"].as_array().expect("lines").iter();
        let line = lines.find(|line| line["name"] == "management").expect("a line");
        assert_eq!(line["ok"], problem.is_empty(), "{line}");
        let detail = line["detail"].as_str().expect("a sentence");
        assert!(detail.contains(problem), "{problem:?}: {line}");
    }
}

/// What is refused because nobody vouches for the other side: said so, as away.
fn assert_untrusted(answer: &Answer, piece: &str) {
    let (message, hint) = answer.refusal(69);
    assert!(
        message.contains("certificate") && message.contains(piece),
        "{piece:?}: {message}"
    );
    assert!(!hint.is_empty(), "{message}");
}

#[tokio::test]
async fn postgres_is_reached_by_tls_and_only_if_it_proves_who_it_is() {
    let prepared = async {
        let certificates = Certificates::new()?;
        let server = postgres(&certificates).await?;
        Ok::<_, String>((certificates, server))
    };
    let (certificates, server) = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip("tls::postgres_is_reached_by_tls_and_only_if_it_proves_who_it_is", &why),
    };
    let run = async |host: &str, mode: &str, authority: &str, arguments: &[&str]| {
        let url = server.url(host, &format!("postgres{mode}"));
        let authority = match authority {
            "" => String::new(),
            name => certificates.name(name),
        };
        let variables = [
            ("SETTLED_DATABASE_URL", url.as_str()),
            ("SETTLED_DATABASE__CA_FILE", &authority),
        ];
        ask_in(&variables, arguments).await
    };
    let (full, balances) = ("?sslmode=verify-full", ["ledger", "balances"]);
    run("localhost", full, "good.pem", &["migrate"]).await.document(0);
    let client = Uuid::new_v4().to_string();
    let deposit = [
        "deposit",
        "--client-id",
        &client,
        "--currency",
        "BTC",
        "--quantity",
        "5",
        "--reference",
        "r",
    ];
    run("localhost", full, "good.pem", &deposit).await.document(0);
    for mode in [full, "?sslmode=require", "?application_name=x&sslmode=verify-full"] {
        let told = run("localhost", mode, "good.pem", &balances).await.document(0);
        assert_eq!(
            told[1],
            json!({"account": "available", "owner": client, "currency": "BTC", "balance": "5"})
        );
    }
    // Nobody vouches for it, or for this name of it; not even where `require` is all that was asked.
    for mode in [full, "?sslmode=require"] {
        assert_untrusted(&run("localhost", mode, "other.pem", &balances).await, "UnknownIssuer");
        assert_untrusted(&run("localhost", mode, "", &balances).await, "UnknownIssuer");
        assert_untrusted(
            &run("127.0.0.1", mode, "good.pem", &balances).await,
            "not valid for name",
        );
    }
    // It takes nothing else, so what was answered above was encrypted.
    run("localhost", "", "good.pem", &balances)
        .await
        .refused(69, "no encryption");
    run("localhost", "?sslmode=disable", "good.pem", &balances)
        .await
        .refused(69, "no encryption");
    run("localhost", "?sslmode=prefer", "good.pem", &balances)
        .await
        .refused(2, "sslmode=prefer");
    run("localhost", full, "none.pem", &balances)
        .await
        .refused(2, "none.pem");
    run("localhost", full, "openssl.cnf", &balances)
        .await
        .refused(2, "holds no certificate");
    // And a server without TLS is not spoken to without it.
    let url = format!("{}?sslmode=verify-full", Services::of_environment().database);
    let answer = ask_in(&[("SETTLED_DATABASE_URL", &url)], &balances).await;
    answer.refused(69, "TLS");
}

#[tokio::test]
async fn the_broker_is_reached_by_tls_and_only_if_it_proves_who_it_is() {
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => {
            return skip(
                "tls::the_broker_is_reached_by_tls_and_only_if_it_proves_who_it_is",
                &why,
            );
        }
    };
    let front = broker(&certificates).await;
    let ground = Ground::new("amqps").await;
    let (user, password) = userinfo(&ground.broker_url);
    let run = async |host: &str, authority: &str| {
        let url = format!(
            "amqps://{user}:{password}@{host}:{}/{}",
            front.address.port(),
            ground.name
        );
        let authority = match authority {
            "" => String::new(),
            name => certificates.name(name),
        };
        let variables = [
            ("SETTLED_BROKER_URL", url.as_str()),
            ("SETTLED_BROKER__CA_FILE", &authority),
        ];
        ask_in(&variables, &["topology"]).await
    };
    run("localhost", "good.pem").await.document(0);
    assert_untrusted(&run("localhost", "other.pem").await, "UnknownIssuer");
    assert_untrusted(&run("localhost", "").await, "UnknownIssuer");
    assert_untrusted(&run("127.0.0.1", "good.pem").await, "not valid for name");
    run("localhost", "none.pem").await.refused(2, "none.pem");
    run("localhost", "openssl.cnf").await.refused(2, "holds no certificate");
    // A broker without TLS is not spoken to without it.
    let url = ground.broker_url.replace("amqp://", "amqps://");
    ask_in(&[("SETTLED_BROKER_URL", &url)], &["topology"]).await.refusal(69);
}

#[tokio::test]
async fn a_message_settles_over_tls_on_both_sides() {
    let prepared = async {
        let certificates = Certificates::new()?;
        let server = postgres(&certificates).await?;
        Ok::<_, String>((certificates, server))
    };
    let (certificates, server) = match prepared.await {
        Ok(prepared) => prepared,
        Err(why) => return skip("tls::a_message_settles_over_tls_on_both_sides", &why),
    };
    let front = broker(&certificates).await;
    let mut ground = Ground::new("tls").await;
    let plain = ground.broker_url.clone();
    let (user, password) = userinfo(&plain);
    let port = front.address.port();
    ground.broker_url = format!("amqps://{user}:{password}@localhost:{port}/{}", ground.name);
    ground.database_url = server.url("localhost", "postgres?sslmode=verify-full");
    let authority = certificates.name("good.pem");
    let flags = [
        format!("database.ca_file={authority}"),
        format!("broker.ca_file={authority}"),
    ];
    let flags = flags.each_ref().map(|flag| ["--set", flag.as_str()]).concat();
    let done = async |arguments: &[&str]| ask(&ground, &[arguments, &flags].concat()).await.document(0);

    done(&["migrate"]).await;
    done(&["topology"]).await;
    let partner = Partner::new("acme");
    let (client, connection) = (partner.client.to_string(), partner.connection.to_string());
    done(&["partner", "add", "--enterprise-id", "acme", "--name", "A partner"]).await;
    done(&[
        "key",
        "add",
        "--enterprise-id",
        "acme",
        "--public-key",
        &partner.public_key(),
    ])
    .await;
    let ours = [
        "connection",
        "add",
        "--enterprise-id",
        "acme",
        "--connection-id",
        &connection,
        "--client-id",
        &client,
    ];
    let theirs = [
        "--partners-client-id",
        &partner.partners_client,
        "--partners-connection-id",
        &partner.partners_connection,
    ];
    done(&[&ours[..], &theirs].concat()).await;
    done(&[
        "deposit",
        "--client-id",
        &client,
        "--currency",
        "BTC",
        "--quantity",
        "5",
        "--reference",
        "r",
    ])
    .await;
    let reservation = partner.allocation("BTC", "5");
    let arguments = [&["allocation", "reserve"], &flags[..]].concat();
    let output = ground.run_with(&arguments, &reservation.line()).await;
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(done(&["doctor"]).await["ok"], true);

    let events = Tap::open(&plain, "settlement.events", "test.events").await;
    let variables = [
        ("SETTLED_DATABASE__CA_FILE", authority.as_str()),
        ("SETTLED_BROKER__CA_FILE", &authority),
    ];
    let worker = ground.ready_worker(&variables).await;
    let line = Line::open(&plain).await;
    line.publish(&[partner.cleared(&reservation)]).await;
    let id = event_id(&format!("allocation.cleared|{}", reservation.id));
    events.wait("its event", |seen| seen.message_id() == Some(&id)).await;
    let shown = done(&["allocation", "show", &reservation.id.to_string()]).await;
    assert_eq!(shown["allocation"]["status"], "cleared");
    assert_eq!(worker.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn plaintext_stays_on_this_machine_unless_it_is_allowed() {
    let list = ["partner", "list"];
    for host in [ELSEWHERE, "db.example", "localhost,db.example", "[2001:db8::1]"] {
        for mode in ["", "?sslmode=disable"] {
            let url = format!("postgres://u:p4ss@{host}/x{mode}");
            let (message, _) = ask_in(&[("SETTLED_DATABASE_URL", &url)], &list).await.refusal(2);
            assert!(
                message.contains("allow_plaintext") && !message.contains("p4ss"),
                "{url}: {message}"
            );
        }
    }
    for host in [ELSEWHERE, "mq.example", "[2001:db8::1]"] {
        let url = format!("amqp://u:p4ss@{host}/x");
        let (message, _) = ask_in(&[("SETTLED_BROKER_URL", &url)], &["topology"]).await.refusal(2);
        assert!(
            message.contains("allow_plaintext") && !message.contains("p4ss"),
            "{url}: {message}"
        );
    }
    // The worker does not even start.
    let (database, broker) = (
        format!("postgres://u:p4ss@{ELSEWHERE}/x"),
        format!("amqp://u:p4ss@{ELSEWHERE}/x"),
    );
    let ours = Services::of_environment();
    for (database, broker) in [(&database, &ours.broker), (&ours.database, &broker)] {
        let variables = [
            ("SETTLED_DATABASE_URL", database.as_str()),
            ("SETTLED_BROKER_URL", broker),
            ("SETTLED_HTTP__LISTEN", "127.0.0.1:0"),
        ];
        ask_in(&variables, &["worker"]).await.refused(2, "allow_plaintext");
    }
    // Allowed, it is only far away.
    let allowed = ("SETTLED_ALLOW_PLAINTEXT", "true");
    let soon = [
        ("SETTLED_DATABASE__CONNECT_TIMEOUT", "300ms"),
        ("SETTLED_BROKER__CONNECT_TIMEOUT", "300ms"),
    ];
    ask_in(&[("SETTLED_DATABASE_URL", &database), allowed, soon[0]], &list)
        .await
        .refusal(69);
    ask_in(&[("SETTLED_BROKER_URL", &broker), allowed, soon[1]], &["topology"])
        .await
        .refusal(69);
    // Encrypted, it may be anywhere.
    let database = format!("{database}?sslmode=verify-full");
    let broker = broker.replace("amqp://", "amqps://");
    ask_in(&[("SETTLED_DATABASE_URL", &database), soon[0]], &list)
        .await
        .refusal(69);
    ask_in(&[("SETTLED_BROKER_URL", &broker), soon[1]], &["topology"])
        .await
        .refusal(69);
}

#[tokio::test]
async fn the_private_server_leaves_nothing_behind() {
    let server = match Server::start("fsync = off", "host all all 127.0.0.1/32 trust\n", &[]).await {
        Ok(server) => server,
        Err(why) => return skip("tls::the_private_server_leaves_nothing_behind", &why),
    };
    let db = connect(&server.url("127.0.0.1", "postgres")).await;
    db.batch_execute("SELECT 1").await.expect("it answers");
    let directory = server.directory.clone();
    assert!(directory.exists());
    drop(server);
    assert!(!directory.exists());
    assert!(db.batch_execute("SELECT 1").await.is_err());
}

/// The API speaks TLS where it has a certificate, to whoever trusts it, and nothing in the clear then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_api_speaks_tls() {
    let certificates = match Certificates::new() {
        Ok(certificates) => certificates,
        Err(why) => return skip("tls::the_api_speaks_tls", &why),
    };
    let ground = Ground::new("api_tls").await;
    ground.copy_template().await;
    assert!(ground.run(&["topology"]).await.status.success());
    let (certificate, key) = (
        certificates.name("good-server.pem"),
        certificates.name("good-server.key"),
    );
    let settings = [
        // Reached from elsewhere, and so only with the two.
        ("SETTLED_API__LISTEN", "0.0.0.0:0"),
        ("SETTLED_API__CERTIFICATE_FILE", certificate.as_str()),
        ("SETTLED_API__KEY_FILE", key.as_str()),
        ("SETTLED_API__HEAD_TIMEOUT", "500ms"),
    ];
    let api = Api::start(&ground, &settings).await;
    let port = api.address().rsplit(':').next().expect("a port").to_owned();
    let ask = async |authority: &str, host: &'static str| -> std::io::Result<String> {
        let files = settled::tls::ClientFiles {
            ca_file: Some(certificates.file(authority)),
            ..settled::tls::ClientFiles::default()
        };
        let trust = files.config().expect("an authority");
        let stream = TcpStream::connect(format!("127.0.0.1:{port}")).await?;
        let name = rustls::pki_types::ServerName::try_from(host).expect("a name");
        let connector = tokio_rustls::TlsConnector::from(Arc::new(trust));
        let mut stream = connector.connect(name, stream).await?;
        let request = "GET /openapi.json HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    let answer = ask("good.pem", "localhost").await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"openapi\": \"3.1.0\""));
    for (authority, host) in [("other.pem", "localhost"), ("good.pem", "127.0.0.1")] {
        assert!(ask(authority, host).await.is_err(), "{authority} {host}");
    }
    // In the clear there is nothing; and who says nothing is not kept.
    for words in ["GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n", ""] {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}"))
            .await
            .expect("it listens");
        stream.write_all(words.as_bytes()).await.expect("it reads");
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(std::time::Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
        drop(ended.expect("it closes"));
        assert!(!answer.starts_with(b"HTTP"), "{words}");
    }
    // A key that is another's.
    let other = certificates.name("other-server.key");
    let variables = [
        ("SETTLED_DATABASE_URL", ground.database_url.as_str()),
        ("SETTLED_BROKER_URL", ground.broker_url.as_str()),
        ("SETTLED_API__CERTIFICATE_FILE", certificate.as_str()),
        ("SETTLED_API__KEY_FILE", other.as_str()),
    ];
    ask_in(&variables, &["api"]).await.refused(2, "do not fit");
}
