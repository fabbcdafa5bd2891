use std::io::Read;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::broker::publisher::Publisher;
use crate::broker::server_version;
use crate::broker::testing::{AUTHORITY, Vhost, event, eventually, queue, settings_of, soon, tls_front, trusting};
use crate::config::Secret;

#[tokio::test]
async fn wrong_password_and_wrong_vhost_are_refused_and_nobody_home_is_away() {
    let vhost = Vhost::new();
    let right = vhost.settings();
    assert_eq!(soon(probe(&right)).await, Ok(()));
    let password = BrokerSettings {
        url: Secret::new(right.url.expose().replace('@', "x@")),
        ..right.clone()
    };
    let error = soon(probe(&password)).await.expect_err("refused");
    assert_eq!(error.code(), Some(403), "{error}");
    let elsewhere = BrokerSettings {
        url: Secret::new(format!("{}x", right.url.expose())),
        ..right.clone()
    };
    let error = soon(probe(&elsewhere)).await.expect_err("refused");
    assert_eq!(error.code(), Some(530), "{error}");
    // Neither the user nor the virtual host is repeated.
    assert!(!error.to_string().contains(&vhost.name), "{error}");
    assert!(error.trouble().contains("virtual host"), "{error}");
    let error = soon(probe(&settings_of("amqp://localhost:1/")))
        .await
        .expect_err("away");
    assert!(matches!(error, BrokerError::Away(_)), "{error}");
}

#[tokio::test]
async fn a_broker_that_does_not_answer_is_given_up_in_time() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let accepted = std::thread::spawn(move || {
        let (mut stream, _) = silent.accept().expect("a client");
        // Reads to the end, which comes only when the client lets go.
        let mut all = Vec::new();
        stream.read_to_end(&mut all).map(|_| all)
    });
    let began = Instant::now();
    let error = Connection::open(&settings_of(&format!("amqp://localhost:{port}/")), "test")
        .await
        .expect_err("away");
    assert!(matches!(error, BrokerError::Away(_)), "{error}");
    assert!(began.elapsed() < Duration::from_secs(4));
    let heard = accepted
        .join()
        .expect("joined")
        .expect("the socket was closed, not abandoned");
    assert_eq!(heard, b"AMQP\x00\x00\x09\x01");
}

#[tokio::test]
async fn the_broker_says_what_it_is() {
    let version = soon(server_version(&Vhost::new().settings()))
        .await
        .expect("a greeting");
    assert!(version.starts_with("RabbitMQ ") && version.len() > 12, "{version}");
}

#[tokio::test]
async fn a_cut_connection_is_noticed() {
    let vhost = Vhost::new();
    let (proxy, settings) = vhost.proxied();
    let connection = Connection::open(&settings, "test").await.expect("connected");
    assert!(connection.is_connected());
    proxy.cut();
    soon(connection.closed()).await;
}

/// lapin writes nothing to a blocked connection, not even its end, and keeps a thread and its buffers for it.
#[tokio::test]
async fn a_blocked_connection_is_given_up_with_all_it_holds() {
    let vhost = Vhost::new();
    let (proxy, mut settings) = vhost.proxied();
    settings.publish_deadline = Duration::from_millis(300);
    let connection = Connection::open(&settings, "test").await.expect("connected");
    queue(&connection, "q", &[]).await;
    let mut publisher = Publisher::open(&connection).await.expect("a publisher");
    proxy.block();
    eventually("blocked", async || connection.is_blocked().then_some(())).await;
    assert!(!publisher.reply(&event("", "q", "reply")).await);
    let began = Instant::now();
    let error = publisher.publish(&[event("", "q", "one")]).await.expect_err("away");
    assert!(
        matches!(error, BrokerError::Away(_)) && began.elapsed() < Duration::from_secs(2),
        "{error}"
    );
    assert!(matches!(soon(connection.close()).await, Err(BrokerError::Away(_))));
    eventually("given up", async || {
        (proxy.ended.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn tls_with_an_authority_of_our_own() {
    let vhost = Vhost::new();
    let port = tls_front(&vhost);
    let authority = std::env::temp_dir().join(format!("{}.pem", vhost.name));
    std::fs::write(&authority, AUTHORITY).expect("written");
    for host in ["localhost", "127.0.0.1"] {
        let url = vhost.settings().url.expose().replacen("amqp://", "amqps://", 1);
        let (before, _) = url.rsplit_once('@').expect("a user");
        let url = format!("{before}@{host}:{port}/{}", vhost.name);
        let trusting = BrokerSettings {
            files: trusting(&authority),
            ..settings_of(&url)
        };
        assert_eq!(soon(probe(&trusting)).await, Ok(()));
        let version = soon(server_version(&trusting)).await.expect("a greeting");
        assert!(version.starts_with("RabbitMQ "), "{version}");
        let error = soon(probe(&settings_of(&url))).await.expect_err("not trusted");
        assert!(matches!(error, BrokerError::Away(_)), "{error}");
        assert!(
            error.trouble().starts_with("TLS") && error.to_string().starts_with("TLS"),
            "{error}"
        );
    }
    std::fs::remove_file(&authority).expect("removed");
}

/// One that takes connections and never says a word, as a frozen node does.
fn silent() -> (std::net::TcpListener, u16) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}

#[tokio::test]
async fn a_silent_or_dead_host_is_not_waited_for() {
    let vhost = Vhost::new();
    let (silent, port) = silent();
    silent.set_nonblocking(true).expect("its clients can be counted");
    let url = vhost.settings().url.expose().to_owned();
    for others in [
        format!("127.0.0.1:{port},127.0.0.1:1"),
        format!("localhost:{port},127.0.0.1:1"),
    ] {
        for _ in 0..4 {
            // Nothing is known yet.
            let several = BrokerSettings {
                allow_plaintext: true,
                connect_timeout: Duration::from_secs(20),
                ..settings_of(&url.replacen('@', &format!("@{others},"), 1))
            };
            let began = Instant::now();
            assert_eq!(soon(super::super::probe(&several)).await, Ok(()));
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            // Once it was silent the others come first.
            let began = Instant::now();
            for _ in 0..8 {
                assert_eq!(soon(super::super::probe(&several)).await, Ok(()));
            }
            assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
            let mut tried = 0;
            while silent.accept().is_ok() {
                tried += 1;
            }
            assert!(tried <= 1, "{others}: tried {tried} times");
        }
    }
    // What a broker says counts more than the silence of the others, and nobody hears the password.
    let wrong = BrokerSettings {
        connect_timeout: Duration::from_secs(2),
        ..settings_of(&format!(
            "amqp://nobody:hun%74er2@127.0.0.1:{port},127.0.0.1:1,{}",
            url.rsplit_once('@').expect("a user").1
        ))
    };
    let error = soon(super::super::probe(&wrong)).await.expect_err("refused");
    assert_eq!(error.code(), Some(403), "{error}");
    assert!(!error.to_string().contains("unter2"), "{error}");
}

/// Every byte that the broker sends counts, and a connection that hears none is given up.
#[tokio::test]
async fn a_frozen_broker_is_given_up_after_a_heartbeat_and_a_half() {
    let vhost = Vhost::new();
    let (proxy, mut settings) = vhost.proxied();
    settings.heartbeat = Duration::from_secs(1);
    let connection = Connection::open(&settings, "test").await.expect("connected");
    // Idle, and kept alive by heartbeats alone.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(connection.is_connected());
    proxy.freeze();
    let began = Instant::now();
    soon(connection.closed()).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}
