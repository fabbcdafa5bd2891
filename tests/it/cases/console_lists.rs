//! Lists of the console: long ones come in pages, what came since is counted by their own filter, and an export that breaks off is
//! seen to.

use std::collections::BTreeSet;

use age::x25519::Identity;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::exported::decrypted;
use crate::kit::{
    console::{Console, Visitor},
    support::Place,
};

/// Letters of some partners: names, and how many of each, with a body so long.
fn letters(partners: &[(&str, u32)], bytes: u32) -> String {
    let each = partners.iter().map(|(name, count)| {
        format!(
            "INSERT INTO settled.dead_letters (
                id, exchange, routing_key, digest, format, properties, body, enterprise_id, reason, detail, group_id, made_by,
                first_failed_at, last_failed_at, collected_at
             )
             SELECT gen_random_uuid(), 'settlement.updates', '{name}.allocation.update',
                    sha256(convert_to('{name}' || copy || clock_timestamp(), 'UTF8')), 1, '{{}}', convert_to(repeat('x', {bytes}), 'UTF8'),
                    '{name}', 'unknown_partner', 'detail', left(md5('{name}'), 16), 'settled', now(), now(), now()
             FROM generate_series(1, {count}) AS copy;"
        )
    });
    each.collect()
}

/// Follows a list to its end by its own links, and gathers what stands between two texts.
async fn walked(console: &Console, visitor: &Visitor, path: &str, before: &str, after: &str) -> (Vec<String>, usize) {
    let (mut found, mut pages, mut next) = (Vec::new(), 0, Some(path.to_owned()));
    while let Some(path) = next {
        let page = console.get(visitor, &path).await;
        assert_eq!(page.status, 200, "{path}: {page:?}");
        pages += 1;
        let parts = page.text.split(before).skip(1);
        found.extend(parts.map(|part| part.split(after).next().expect("a text").to_owned()));
        next = page.text.split_once("rel=\"next\" href=\"").map(|(_, rest)| {
            let link = rest.split('"').next().expect("a link");
            link.replace("&#38;", "&").replace("&amp;", "&")
        });
    }
    (found, pages)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_lists_come_in_pages() {
    let place = Place::new("console_pages").await;
    place
        .tamper(
            "INSERT INTO settled.partners (enterprise_id, name, async_allocations, async_deallocations)
             SELECT 'partner-' || n, 'Partner ' || n, true, true FROM generate_series(100, 219) AS n;
             INSERT INTO settled.connections (connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id)
             SELECT md5('c' || n)::uuid, 'partner-100', md5('client')::uuid, 'theirs', 'connection-' || n
             FROM generate_series(1, 120) AS n;
             INSERT INTO settled.funds (holder, owner, currency, held, allocated)
             SELECT 'connection', md5('c' || n)::uuid, 'BTC', 100000000000000000000000000000000000000, n FROM generate_series(1, 120) AS n;
             INSERT INTO settled.funds (holder, owner, currency, external)
             SELECT 'world', '00000000-0000-0000-0000-000000000000', 'BTC', -sum(held) - sum(allocated) FROM settled.funds",
        )
        .await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let all = |found: &[String]| found.iter().cloned().collect::<BTreeSet<String>>();

    let (partners, pages) = walked(&console, &ann, "/partners", "href=\"/partners/partner-", "\"").await;
    assert_eq!((partners.len(), all(&partners).len(), pages), (120, 120, 3));
    let (connections, pages) = walked(
        &console,
        &ann,
        "/partners/partner-100",
        "<td class=\"one\">connection-",
        "<",
    )
    .await;
    assert_eq!((connections.len(), all(&connections).len(), pages), (120, 120, 3));
    // Two accounts of a connection, and the world's.
    let (accounts, pages) = walked(&console, &ann, "/ledger", "<tr><td><code>", "<").await;
    assert_eq!((accounts.len(), all(&accounts).len(), pages), (241, 121, 3));
    let (none, _) = walked(&console, &ann, "/ledger?currency=EUR", "<tr><td><code>", "<").await;
    assert!(none.is_empty(), "{none:?}");
    let one = accounts.iter().find(|owner| owner.len() > 30).expect("a connection");
    let (its, _) = walked(
        &console,
        &ann,
        &format!("/ledger?owner={}", &one[..13]),
        "<tr><td><code>",
        "<",
    )
    .await;
    assert_eq!(its, [one.clone(), one.clone()]);
    // The sums are of all of it, to the last unit.
    let page = console.get(&ann, "/ledger?owner=ffffffffffff").await;
    let plain = page.text.replace("<i>", "").replace("</i>", "");
    for sum in [
        "−12000000000000000000000000000000000007260",
        "12000000000000000000000000000000000000000",
        ">7260<",
        "</b>0</span>",
    ] {
        assert!(plain.contains(sum), "{sum}: {page:?}");
    }
    for query in ["owner=x", "currency=a%20b", "after=7"] {
        let page = console.get(&ann, &format!("/ledger?{query}")).await;
        assert!(
            page.status == 400 && page.text.contains(">Filter<"),
            "{query}: {page:?}"
        );
    }
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_since_is_counted_by_its_own_filter() {
    let place = Place::new("console_since").await;
    place.tamper(&letters(&[("acme", 3)], 10)).await;
    let console = Console::start(&place, &[("SETTLED_DEAD_LETTERS__PLAN_MAX", "100")]).await;
    let ann = console.sign_in().await;
    let frozen = "/letters?partner=acme&upto=3";
    place.tamper(&letters(&[("globex", 7)], 10)).await;
    let page = console.get(&ann, frozen).await;
    assert!(
        !page.text.contains("came since"),
        "what came is none of acme's: {page:?}"
    );
    place.tamper(&letters(&[("acme", 2)], 10)).await;
    let page = console.get(&ann, frozen).await;
    assert!(page.text.contains(">2 came since: refresh<"), "{page:?}");
    // Beyond what one plan holds they are not counted, and the button says what one would hold.
    place.tamper(&letters(&[("acme", 200)], 10)).await;
    place
        .tamper("UPDATE settled.dead_letters SET made_by = 'unknown' WHERE seq IN (SELECT seq FROM settled.dead_letters LIMIT 4)")
        .await;
    let page = console.get(&ann, "/letters").await;
    assert!(
        page.text.contains("With all of this filter, more than 104,") && page.text.contains("Plan 100 messages"),
        "{page:?}"
    );
    let page = console.get(&ann, "/letters?partner=globex").await;
    assert!(
        page.text.contains("With all 7 of this filter") && page.text.contains("Plan 6 messages"),
        "one of them nobody known made: {page:?}"
    );
    console.stop().await;
}

/// Sends a form that is answered by a file, and reads the head of the answer.
async fn export_begins(console: &Console, visitor: &Visitor, more: &str) -> (TcpStream, Vec<u8>) {
    export_begins_by("HTTP/1.1", console, visitor, more).await
}

async fn export_begins_by(version: &str, console: &Console, visitor: &Visitor, more: &str) -> (TcpStream, Vec<u8>) {
    let form = format!("form_token={}&state=open{more}", visitor.token);
    let request = format!(
        "POST /export {version}\r\nconnection: close\r\nhost: {}\r\ncookie: {}\r\ncontent-type: application/x-www-form-urlencoded\r\n\
         content-length: {}\r\n\r\n{form}",
        console.address(),
        visitor.cookie.as_deref().expect("a session"),
        form.len()
    );
    let mut stream = TcpStream::connect(console.address()).await.expect("it listens");
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut begun = vec![0; 1_024];
    let read = stream.read(&mut begun).await.expect("an answer");
    begun.truncate(read);
    (stream, begun)
}

/// What came in chunks; none where the last of them never came.
fn whole(answer: &[u8]) -> Option<Vec<u8>> {
    let find = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|part| part == what);
    let mut rest = &answer[find(answer, b"\r\n\r\n")? + 4..];
    let mut body = Vec::new();
    loop {
        let end = find(rest, b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?, 16).ok()?;
        rest = &rest[end + 2..];
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..length)?);
        rest = rest.get(length + 2..)?;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_that_breaks_off_is_seen_to() {
    let place = Place::new("console_export").await;
    // More than stands in any buffer on the way.
    place.tamper(&letters(&[("acme", 400)], 100_000)).await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let (mut stream, mut answer) = export_begins(&console, &ann, "").await;
    assert!(
        answer.starts_with(b"HTTP/1.1 200 "),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    place
        .tamper("ALTER TABLE settled.dead_letters RENAME COLUMN detail TO gone")
        .await;
    drop(stream.read_to_end(&mut answer).await);
    assert!(answer.len() > 1_000_000, "it went on for a while: {}", answer.len());
    assert!(
        whole(&answer).is_none(),
        "what is not all of it does not end as if it were"
    );
    place
        .tamper("ALTER TABLE settled.dead_letters RENAME COLUMN gone TO detail")
        .await;
    let (mut stream, mut answer) = export_begins(&console, &ann, "").await;
    stream.read_to_end(&mut answer).await.expect("all of it");
    let text = String::from_utf8(whole(&answer).expect("all of it")).expect("text");
    assert_eq!(text.lines().count(), 400);
    console.stop().await;
}

/// Over HTTP/1.0 an answer ends with its connection, and one that breaks off looks whole: there is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_export_leaves_where_nobody_could_see_that_it_broke() {
    let place = Place::new("console_export_old").await;
    place.tamper(&letters(&[("acme", 3)], 10)).await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let (mut stream, mut answer) = export_begins_by("HTTP/1.0", &console, &ann, "").await;
    stream.read_to_end(&mut answer).await.expect("an answer");
    let text = String::from_utf8_lossy(&answer);
    assert!(text.starts_with("HTTP/1.0 505 "), "{text}");
    assert!(
        text.contains("a file that broke off looks whole; nothing was exported")
            && text.contains("proxy_http_version 1.1"),
        "{text}"
    );
    assert!(!text.contains("routingKey"), "{text}");
    let audit = console.get(&ann, "/audit?act=export").await;
    assert!(audit.text.contains("No such act"), "{audit:?}");
    // A page has its length, and is answered to whoever asks.
    let mut stream = TcpStream::connect(console.address()).await.expect("it listens");
    let cookie = ann.cookie.as_deref().expect("a session");
    let head = format!(
        "GET /plans HTTP/1.0\r\nhost: {}\r\ncookie: {cookie}\r\n\r\n",
        console.address()
    );
    stream.write_all(head.as_bytes()).await.expect("it reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    assert!(
        answer.starts_with(b"HTTP/1.0 200 "),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_is_encrypted_for_whom_it_says() {
    let place = Place::new("console_sealed").await;
    place.tamper(&letters(&[("acme", 5)], 60_000)).await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let (mine, theirs) = (Identity::generate(), Identity::generate());
    let recipients = format!("&recipient={}+{}", mine.to_public(), theirs.to_public());
    let (mut stream, mut answer) = export_begins(&console, &ann, &recipients).await;
    stream.read_to_end(&mut answer).await.expect("all of it");
    let head = String::from_utf8_lossy(&answer[..answer.len().min(1_024)]).to_lowercase();
    assert!(head.contains("dead-letters.ndjson.age"), "{head}");
    let sealed = whole(&answer).expect("all of it");
    for identity in [&mine, &theirs] {
        assert_eq!(decrypted(&sealed, identity).expect("theirs to read").lines().count(), 5);
    }
    assert!(decrypted(&sealed, &Identity::generate()).is_err());
    let audit = console.get(&ann, "/audit?act=export").await;
    assert!(audit.text.contains(&mine.to_public().to_string()), "{audit:?}");
    // What is no public key is not used, not written down, and not said again.
    for (typed, says) in [("AGE-SECRET-KEY-1QQ", "private key"), ("age", "no public key")] {
        let page = console.act(&ann, "/export", &[("recipient", typed)]).await;
        assert!(
            page.status == 400 && page.text.contains(says) && !page.text.contains("AGE-SECRET-KEY-1QQ"),
            "{page:?}"
        );
    }
    let audit = console.get(&ann, "/audit?act=export").await;
    assert_eq!(audit.text.matches("<td>export</td>").count(), 1, "{audit:?}");
    console.stop().await;
}
