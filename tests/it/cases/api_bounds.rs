//! `settled api`: what one asker, however many or slow its requests are, takes from the others; and from us.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use uuid::Uuid;

use super::{
    api::{path_of, place_of, reserved},
    api_reads::{ROOT, token},
};
use crate::kit::{
    amqp::Message,
    api::{Answer, Api, as_documented, read_answer},
    auditor::{Reservation, Sent},
    partner::Partner,
    support::{PATIENCE, Place, until},
};

/// Sends an update; what was taken counts among what was sent.
async fn put(place: &Place, api: &Api, token: &str, message: &Message) -> Answer {
    let answer = api.ask("PUT", &path_of(message), token, &message.body).await;
    if matches!(answer.status, 200 | 202) {
        place.story().sent.push(Sent {
            routing_key: message.routing_key.clone(),
            body: message.body.clone(),
            expect: message.expect,
        });
    }
    answer
}

/// No worker runs, so every update waits. One partner has its share of them, all partners theirs, and who only asks is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_partners_flood_keeps_out_nobody_else() {
    let acme = Partner::new("acme");
    let place = place_of("api_share", &acme).await;
    let [beta, gamma] = ["beta", "gamma"].map(Partner::new);
    for partner in [&beta, &gamma] {
        place.register(partner).await;
        place.deposit(partner, "BTC", "1000").await;
    }
    let settings = [
        ("SETTLED_API__REQUESTS_MAX", "6"),
        ("SETTLED_API__UPDATES_MAX", "4"),
        ("SETTLED_API__SHARE_MAX", "3"),
        ("SETTLED_API__WAIT", "1m"),
    ];
    let api = Api::start(&place, &settings).await;
    let mut tokens = Vec::new();
    for name in ["acme", "beta", "gamma"] {
        tokens.push(token(&place, name, "partner", &["--rate", "1000"]).await);
    }
    let flood: Vec<Message> = reserved(&place, &acme, 12)
        .await
        .iter()
        .map(|one| acme.cleared(one))
        .collect();
    let of_beta = beta.cleared(&reserved(&place, &beta, 1).await[0]);
    let of_gamma = gamma.cleared(&reserved(&place, &gamma, 1).await[0]);
    let depth = async |messages: u32| {
        until("the queue has them", PATIENCE, async || {
            (place.line().depth("settlement.updates").await == messages).then_some(())
        })
        .await;
    };
    let (share, beyond) = flood.split_at(3);
    let flooding = join_all(share.iter().map(|message| put(&place, &api, &tokens[0], message)));
    let others = async {
        depth(3).await;
        for message in beyond {
            let answer = put(&place, &api, &tokens[0], message).await;
            assert_eq!(answer.refusal(429), "too_many_requests");
        }
        let list = format!("{ROOT}/acme/partners/allocations");
        assert_eq!(
            api.get(&list, &tokens[0]).await.status,
            200,
            "its own questions are answered"
        );
        let waits = put(&place, &api, &tokens[1], &of_beta);
        let rest = async {
            depth(4).await;
            // All places of updates are taken now, and those who only ask have the others.
            let answer = put(&place, &api, &tokens[2], &of_gamma).await;
            assert_eq!(answer.refusal(503), "unavailable");
            for (name, token) in ["acme", "beta", "gamma"].iter().zip(&tokens) {
                let answer = api.get(&format!("{ROOT}/{name}/partners/balances"), token).await;
                assert_eq!(answer.status, 200, "{name}: {answer:?}");
            }
            place.ready_worker(&[]).await
        };
        tokio::join!(waits, rest)
    };
    let (flooded, (waited, worker)) = tokio::join!(flooding, others);
    assert_eq!(waited.ok()["allocation"]["status"], "cleared");
    for answer in &flooded {
        assert_eq!(answer.ok()["allocation"]["status"], "cleared");
    }
    // The places are free again.
    let last = put(&place, &api, &tokens[2], &of_gamma).await;
    assert_eq!(last.ok()["allocation"]["status"], "cleared");
    let last = put(&place, &api, &tokens[0], &beyond[0]).await;
    assert_eq!(last.ok()["allocation"]["status"], "cleared");
    api.stop().await;
    place.settle_up(worker).await;
}

/// Tokens that somebody makes up cost so many questions to the database, and nobody else's answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_turned_away_and_who_is_known_is_not() {
    let partner = Partner::new("acme");
    let place = place_of("api_strangers", &partner).await;
    let api = Api::start(&place, &[("SETTLED_API__RATE_OF_STRANGERS", "2")]).await;
    let list = format!("{ROOT}/acme/partners/allocations");
    let (known, new) = (
        token(&place, "acme", "partner", &["--rate", "1000"]).await,
        token(&place, "acme", "partner", &[]).await,
    );
    assert_eq!(api.get(&list, &known).await.status, 200);
    let began = std::time::Instant::now();
    let (mut asked, mut turned) = (0_u32, 0_u32);
    for _ in 0..60 {
        let strange = format!("stl_{}_{}", Uuid::new_v4().simple(), "0".repeat(64));
        let answer = api.get(&list, &strange).await;
        match answer.status {
            401 => asked += 1,
            _ => {
                assert_eq!(answer.refusal(429), "too_many_requests");
                turned += 1;
            }
        }
        assert_eq!(api.get(&list, &known).await.status, 200, "it counted before");
    }
    let most = 2 + 2 * u32::try_from(began.elapsed().as_secs() + 1).expect("seconds");
    assert!(
        asked <= most && turned > 0,
        "{asked} asked of at most {most}, {turned} turned away"
    );
    // What has no token's form costs nothing, and is told what it was told.
    assert_eq!(api.get(&list, "x").await.refusal(401), "unauthorized");
    // Once the flood ebbs a new one is let in as well.
    until("a new token is looked up", PATIENCE, async || {
        (api.get(&list, &new).await.status == 200).then_some(())
    })
    .await;
    // After a new start they are known before anybody asks; one that was made since, soon.
    api.stop().await;
    let api = Api::start(&place, &[("SETTLED_API__RATE_OF_STRANGERS", "1")]).await;
    let flood = async || {
        let strange = format!("stl_{}_{}", Uuid::new_v4().simple(), "0".repeat(64));
        until("a stranger is turned away", PATIENCE, async || {
            (api.get(&list, &strange).await.status == 429).then_some(())
        })
        .await;
    };
    for known in [&known, &new] {
        flood().await;
        assert_eq!(api.get(&list, known).await.status, 200, "in the flood");
    }
    let newest = token(&place, "acme", "partner", &[]).await;
    until("the newest one is known", PATIENCE, async || {
        flood().await;
        (api.get(&list, &newest).await.status == 200).then_some(())
    })
    .await;
    // And one that was known and is revoked does not count.
    place.json(&["token", "revoke", &known]).await;
    assert_eq!(api.get(&list, &known).await.refusal(401), "unauthorized");
}

/// So many reservations with as long a note as there may be.
async fn long_ones(place: &Place, partner: &Partner, count: usize) -> Vec<Reservation> {
    let mut all = Vec::new();
    while all.len() < count {
        let some: Vec<Reservation> = (all.len()..count.min(all.len() + 100))
            .map(|_| Reservation {
                notes: Some("n".repeat(16_384)),
                ..partner.allocation("BTC", "1")
            })
            .collect();
        place.reserve(&some).await;
        all.extend(some);
    }
    all
}

/// A page ends where its bytes do, and the next one goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_has_a_bound_of_bytes_and_loses_nothing_by_it() {
    let partner = Partner::new("acme");
    let place = place_of("api_bytes", &partner).await;
    let all = long_ones(&place, &partner, 14).await;
    let api = Api::start(&place, &[("SETTLED_API__PAGE_MAX_BYTES", "65536")]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let (mut found, mut pages, mut query) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = api
            .get(&format!("{ROOT}/acme/partners/allocations{query}"), &acme)
            .await;
        let entries = page.ok()["allocations"].as_array().expect("a list");
        pages.push(entries.len());
        found.extend(entries.iter().map(|one| one["id"].as_str().expect("an id").to_owned()));
        let Some(next) = page.body["nextBatchPrevId"].as_str() else {
            break;
        };
        query = format!("?prevId={next}");
    }
    assert_eq!(pages, [4, 4, 4, 2]);
    let mut expected: Vec<String> = all.iter().map(|one| one.id.to_string()).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    // One that is larger than all of a page is a page.
    let one = api
        .get(&format!("{ROOT}/acme/partners/allocations?pageSize=1"), &acme)
        .await;
    assert_eq!(one.ok()["allocations"].as_array().map(Vec::len), Some(1));
}

/// A long answer holds its place until it is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_its_answer_holds_its_place() {
    let partner = Partner::new("acme");
    let place = place_of("api_unread", &partner).await;
    long_ones(&place, &partner, 900).await;
    let settings = [
        ("SETTLED_API__REQUESTS_MAX", "1"),
        ("SETTLED_API__PAGE_MAX", "1000"),
        ("SETTLED_API__PAGE_MAX_BYTES", "16777216"),
        ("SETTLED_API__ANSWER_TIMEOUT", "10m"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let list = format!("{ROOT}/acme/partners/allocations?pageSize=1000");
    let balances = format!("{ROOT}/acme/partners/balances");
    let mut slow = TcpStream::connect(api.address()).await.expect("it listens");
    let request = format!("GET {list} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {acme}\r\n\r\n");
    slow.write_all(request.as_bytes()).await.expect("it reads");
    let mut first = [0; 15];
    slow.read_exact(&mut first).await.expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    for _ in 0..5 {
        let answer = api.get(&balances, &acme).await;
        assert_eq!(answer.refusal(503), "unavailable");
    }
    // Read to its end it is whole, and its place is free.
    let mut rest = Vec::new();
    let length = async {
        while !rest.ends_with(b"]}") {
            assert_ne!(slow.read_buf(&mut rest).await.expect("more"), 0);
        }
    };
    tokio::time::timeout(PATIENCE, length).await.expect("all of it");
    assert!(rest.len() > 14_000_000, "{} bytes", rest.len());
    until("the place is free", PATIENCE, async || {
        (api.get(&balances, &acme).await.status == 200).then_some(())
    })
    .await;
    // So it is when whoever asked goes away.
    slow.write_all(request.as_bytes()).await.expect("it reads");
    slow.read_exact(&mut first).await.expect("an answer");
    assert_eq!(api.get(&balances, &acme).await.status, 503);
    drop(slow);
    until("the place is free", PATIENCE, async || {
        (api.get(&balances, &acme).await.status == 200).then_some(())
    })
    .await;
}

/// A client that writes all of its body before it reads hears why it was refused, however little of it was read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_all_of_a_large_body_first_hears_the_answer() {
    let partner = Partner::new("acme");
    let place = place_of("api_unheard", &partner).await;
    let api = Api::start(&place, &[]).await;
    let acme = token(&place, "acme", "partner", &[]).await;
    let path = format!("{ROOT}/acme/partners/allocations");
    let body = vec![b' '; 12 << 20];
    for (token, status, name) in [("none", 401, "unauthorized"), (&acme, 400, "message_too_large")] {
        let head = format!(
            "PUT {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        for _ in 0..3 {
            let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
            let exchange = async {
                stream.write_all(head.as_bytes()).await.expect("the head is taken");
                stream.write_all(&body).await.expect("the body is taken");
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.expect("no reset");
                answer
            };
            let answer = tokio::time::timeout(PATIENCE, exchange).await.expect("in time");
            let answer = read_answer(&answer);
            as_documented(head.as_bytes(), &answer);
            assert_eq!(answer.refusal(status), name);
        }
    }
    // One that is answered and neither sends nor goes keeps its connection no longer than an idle one, and nobody from stopping.
    let mut silent = TcpStream::connect(api.address()).await.expect("it listens");
    let head = format!("PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n");
    silent.write_all(head.as_bytes()).await.expect("it reads");
    let mut answer = Vec::new();
    silent.read_to_end(&mut answer).await.expect("its side is closed");
    assert_eq!(read_answer(&answer).refusal(401), "unauthorized");
    tokio::time::timeout(Duration::from_secs(20), api.stop())
        .await
        .expect("it stops");
}

/// What comes back for these bytes, until the connection is closed: status and body of each answer.
async fn answers(api: &Api, request: &str) -> Vec<(u16, String)> {
    let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut text = String::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_string(&mut text)).await;
    read.expect("it closes").expect("text");
    let each = text.split("HTTP/1.1 ").skip(1);
    each.map(|answer| {
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(!head.contains("server:"), "{head}");
        (head[..3].parse().expect("a status"), body.to_owned())
    })
    .collect()
}

/// Odd requests of a stranger and of a partner: each has one answer of one shape, who may not ask is not asked for its body, and
/// what stands behind a refused update is taken for no request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_requests_have_one_answer_of_one_shape() {
    let partner = Partner::new("acme");
    let place = place_of("api_odd", &partner).await;
    let api = Api::start(&place, &[("SETTLED_API__RATE_OF_STRANGERS", "1000")]).await;
    let acme = token(&place, "acme", "partner", &["--rate", "1000"]).await;
    let path = format!("{ROOT}/acme/partners/allocations");
    let bearer = format!("authorization: Bearer {acme}\r\n");
    let behind = format!("GET {path} HTTP/1.1\r\nhost: x\r\n{bearer}connection: close\r\n\r\n");
    let ends = "connection: close\r\n";
    let put = |more: &str| format!("PUT {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}");
    let get = |method: &str, target: &str| format!("{method} {target} HTTP/1.1\r\nhost: x\r\n{ends}");
    let trailers = "0\r\nauthorization: Bearer x\r\nx-user: y\r\n\r\n";
    // The head without who asks, the rest, and what a stranger and a partner are answered.
    let odd: Vec<(String, String, &[u16], &[u16])> = vec![
        (get("OPTIONS", &path), String::new(), &[405], &[405]),
        (get("OPTIONS", "*"), String::new(), &[404], &[404]),
        (get("TRACE", &path), String::new(), &[405], &[405]),
        (get("DELETE", &path), String::new(), &[405], &[405]),
        (get("CONNECT", "elsewhere.example:443"), String::new(), &[404], &[404]),
        (
            get("GET", &format!("http://elsewhere.example{path}")),
            String::new(),
            &[401],
            &[200],
        ),
        (get("GET", &format!("{path}/")), String::new(), &[404], &[404]),
        (
            get("GET", &format!("{ROOT}/acme/receipts/%00")),
            String::new(),
            &[401],
            &[400],
        ),
        (get("GET", &format!("{path}?prevId=%ff")), String::new(), &[401], &[400]),
        (
            get("GET", &path) + "if-none-match: *\r\nrange: bytes=0-5\r\n",
            String::new(),
            &[401],
            &[200],
        ),
        (
            get("GET", &path) + "authorization: Basic eDp5\r\n",
            String::new(),
            &[401],
            &[401],
        ),
        (
            get("GET", &path) + "content-length: 5\r\n",
            "hello".to_owned(),
            &[401],
            &[400],
        ),
        (put(ends), String::new(), &[401], &[400]),
        (
            put(ends) + "content-encoding: gzip\r\ncontent-length: 2\r\n",
            "{}".to_owned(),
            &[401],
            &[400],
        ),
        (
            put(ends) + "transfer-encoding: chunked\r\n",
            format!("2\r\n{{}}\r\n{trailers}"),
            &[401],
            &[400],
        ),
        (
            put("transfer-encoding: chunked\r\n"),
            "zz\r\n".to_owned(),
            &[401],
            &[400],
        ),
        (
            put(ends) + "expect: 100-continue\r\ncontent-length: 2\r\n",
            "{}".to_owned(),
            &[401],
            &[100, 400],
        ),
        // A second request behind the first: one of its own for who may ask, and nothing for who may not.
        (
            put("content-length: 2\r\n"),
            format!("{{}}{behind}"),
            &[401],
            &[400, 200],
        ),
        (
            put("content-length: 2\r\ntransfer-encoding: chunked\r\n"),
            format!("0\r\n\r\n{behind}"),
            &[401],
            &[400],
        ),
    ];
    for (head, rest, of_stranger, of_partner) in odd {
        for (who, expected) in [("", of_stranger), (&*bearer, of_partner)] {
            let found = answers(&api, &format!("{head}{who}\r\n{rest}")).await;
            let statuses: Vec<u16> = found.iter().map(|(status, _)| *status).collect();
            assert_eq!(statuses, expected, "{head}{rest}: {found:?}");
            for (_, body) in found.iter().filter(|(status, _)| *status >= 400) {
                let error: serde_json::Value = serde_json::from_str(body).expect("JSON");
                for field in ["error", "name", "requestId"] {
                    assert!(error[field].is_string(), "{head}: {body}");
                }
                assert!(!body.contains(&acme) && !body.contains("elsewhere"), "{body}");
            }
        }
    }
    // Its length is told, and nothing comes.
    let head = format!("{}{bearer}\r\n", get("HEAD", &path));
    assert_eq!(answers(&api, &head).await, [(200, String::new())]);
    api.stop().await;
}

/// The parameters of a list count in the body as in the query, within the bounds of every body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_parameters_of_a_list_may_stand_in_the_body() {
    let acme = Partner::new("acme");
    let place = place_of("api_list_body", &acme).await;
    reserved(&place, &acme, 3).await;
    let settings = [
        ("SETTLED_API__BODY_MAX", "1024"),
        ("SETTLED_API__BODY_TIMEOUT", "500ms"),
    ];
    let api = Api::start(&place, &settings).await;
    let acme = token(&place, "acme", "partner", &["--rate", "1000"]).await;
    let list = format!("{ROOT}/acme/partners/allocations");
    let all = api.get(&list, &acme).await.ok()["allocations"].clone();
    let all = all.as_array().expect("a list");
    let last = &all[2]["id"];
    for (query, body, expected) in [
        ("", "{}".to_owned(), &all[..]),
        (
            "",
            r#"{"statuses":["reserved"],"types":"allocation"}"#.to_owned(),
            &all[..],
        ),
        ("", r#"{"statuses":["cleared","released"]}"#.to_owned(), &[]),
        ("", r#"{"pageSize":1}"#.to_owned(), &all[..1]),
        ("", r#"{"pageSize":"2"}"#.to_owned(), &all[..2]),
        ("?pageSize=1", format!(r#"{{"prevId":{}}}"#, all[0]["id"]), &all[1..2]),
        ("?statuses=reserved", format!(r#"{{"prevId":{last}}}"#), &[]),
    ] {
        let answer = api.ask("GET", &format!("{list}{query}"), &acme, body.as_bytes()).await;
        let found = answer.ok()["allocations"].as_array().map(Vec::as_slice);
        assert_eq!(found, Some(expected), "{query} {body}");
    }
    let long = format!(r#"{{"statuses":["{}"]}}"#, "x".repeat(1024));
    let named = format!(r#"{{"{}":[1,1,1]}}"#, "y".repeat(500));
    for (body, name) in [
        ("no JSON", "invalid_request"),
        ("[]", "invalid_request"),
        (r#"{"pageSize":1,"pageSize":2}"#, "invalid_request"),
        (r#"{"pageSize":null}"#, "invalid_request"),
        (r#"{"partnerIds":[]}"#, "invalid_request"),
        (r#"{"partnerIds":["x"]}"#, "invalid_request"),
        (&named, "invalid_request"),
        (&long, "message_too_large"),
    ] {
        for list in [&list, &format!("{ROOT}/acme/partners/balances")] {
            let answer = api.ask("GET", list, &acme, body.as_bytes()).await;
            assert_eq!(answer.refusal(400), name, "{body}");
        }
    }
    // One that does not come has its place no longer than that of an update has.
    let head = format!("GET {list} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {acme}\r\ncontent-length: 9\r\n\r\n{{");
    let answer = api.exchange(head.as_bytes()).await;
    assert_eq!(answer.refusal(408), "request_timeout");
    // What comes after a body is the next request, and not a part of this one.
    let more = |body: &str, connection: &str| {
        let length = body.len();
        format!(
            "GET {list} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {acme}\r\nconnection: {connection}\r\ncontent-length: \
             {length}\r\n\r\n{body}"
        )
    };
    let mut stream = TcpStream::connect(api.address()).await.expect("it listens");
    let both = more(r#"{"pageSize":1}"#, "keep-alive") + &more(r#"{"pageSize":2}"#, "close");
    stream.write_all(both.as_bytes()).await.expect("it reads");
    let mut answers = String::new();
    stream.read_to_string(&mut answers).await.expect("they come");
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{answers}");
    assert_eq!(answers.matches(r#""clientExternalId""#).count(), 3, "{answers}");
    api.stop().await;
}
