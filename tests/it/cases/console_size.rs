//! The console at size: every screen with a million dead letters, two hundred people who watch, and what that costs a worker. Left out of the suite, since it
//! takes minutes: `make console-size`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use settled::console::{Needs, table};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::kit::{
    console::{Console, Visitor},
    partner::Partner,
    support::{PATIENCE, Place, Worker, count, until},
};

/// A million, or as many as `LETTERS` says.
fn all_letters() -> u32 {
    let said = std::env::var("LETTERS").ok();
    said.map_or(1_000_000, |said| said.parse().expect("LETTERS is a number"))
}

/// Plans, and a run of each; together they hold all letters. Of a million each is as large as one may be by default.
const PLANS: u32 = 10;
/// Partners; a hundred of them have letters.
const PARTNERS: u32 = 2_000;
/// Connections of one partner, each with ten currencies.
const CONNECTIONS: u32 = 10_000;
/// How often each screen is asked for, after twice that do not count.
const TIMES: usize = 40;
/// What a screen may take, at the 95th of a hundred.
const P95: Duration = Duration::from_millis(300);
const VIEWERS: usize = 200;
/// Memory of the program while they watch.
const MEMORY_MAX_KB: u64 = 100 * 1024;
/// Messages that a worker settles in a round, and rounds, in turns with nobody and with everybody watching.
const SETTLED: usize = 1_000;
/// Of these so many at a time, the next ones when these are settled: where cores are shared a worker that is kept waiting finds more
/// that wait, and larger batches cost it less.
const AT_A_TIME: usize = 20;
const ROUNDS: usize = 8;
/// What a worker's own time for them may come to while they watch, in hundredths of what it is without. Two rounds of the same kind
/// differ by as much.
const COST_MAX_PERCENT: u64 = 115;

/// Partners, connections and accounts; a million letters of a hundred partners over a month, seven of ten open, in some six hundred
/// groups; with plans and runs of them, an hour of batches, and acts.
async fn fill(place: &Place) {
    let letters = all_letters();
    let planned = letters / PLANS;
    place
        .tamper(&format!(
            "INSERT INTO settled.partners (enterprise_id, name, async_allocations, async_deallocations)
             SELECT 'partner-' || n, 'Partner ' || n, true, true FROM generate_series(0, {PARTNERS} - 1) AS n;
             INSERT INTO settled.connections (connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id)
             SELECT md5('connection' || n)::uuid, 'partner-7', md5('client' || n % 100)::uuid, 'theirs', 'connection-' || n
             FROM generate_series(1, {CONNECTIONS}) AS n;
             INSERT INTO settled.funds (holder, owner, currency, held, allocated)
             SELECT 'connection', md5('connection' || n)::uuid, 'CUR' || c, n, 1000000000000000000
             FROM generate_series(1, {CONNECTIONS}) AS n, generate_series(1, 10) AS c;
             INSERT INTO settled.funds (holder, owner, currency, external)
             SELECT 'world', '00000000-0000-0000-0000-000000000000', currency, -sum(held) - sum(allocated)
             FROM settled.funds GROUP BY currency;
             INSERT INTO settled.dead_letters (
                id, state, exchange, routing_key, digest, format, properties, body, enterprise_id, nonce, allocation_id,
                reason, detail, group_id, made_by, first_failed_at, last_failed_at, collected_at, run_id, discarded_at
             )
             SELECT md5('id' || n)::uuid, s.state, 'settlement.updates', p.name || '.allocation.update',
                    sha256(convert_to('body ' || n, 'UTF8')), 1, '{{}}', convert_to('body ' || n || repeat(' filler', 60), 'UTF8'),
                    p.name, 'nonce-' || n, md5('allocation' || n / 2)::uuid, r.reason, 'detail ' || n,
                    left(md5(p.name || r.reason), 16), 'settled', f.at, f.at + interval '1 minute', f.at,
                    CASE WHEN s.state = 'due' THEN 1 END, CASE WHEN s.state = 'discarded' THEN now() END
             FROM generate_series(1, {letters}) AS n
             CROSS JOIN LATERAL (SELECT 'partner-' || n % 100 AS name) AS p
             CROSS JOIN LATERAL (SELECT now() - n * interval '2.592 seconds' AS at) AS f
             CROSS JOIN LATERAL (
                SELECT (ARRAY['signature_mismatch', 'unknown_partner', 'invalid_field', 'already_settled', 'internal',
                              'partner_inactive'])[1 + n / 100 % 6] AS reason
             ) AS r
             CROSS JOIN LATERAL (
                SELECT CASE n % 10 WHEN 1 THEN 'discarded' WHEN 2 THEN 'settled' WHEN 3 THEN 'parked' ELSE 'open' END AS state
             ) AS s;
             INSERT INTO settled.plans (id, at, operator, filters, messages)
             SELECT n, now() - n * interval '1 hour', 'ann', '{{\"states\": [\"open\"]}}', {planned}
             FROM generate_series(1, {PLANS}) AS n;
             INSERT INTO settled.plan_items (plan_id, position, dead_letter_id, verdict, reason, detail, currency, quantity)
             SELECT p, n, md5('id' || ((p - 1) * {planned} + n))::uuid, CASE WHEN n % 3 > 0 THEN 'settled' ELSE 'rejected' END,
                    CASE WHEN n % 3 = 0 THEN 'internal' END, NULL,
                    CASE WHEN n % 3 > 0 THEN 'CUR' || n % 20 END, CASE WHEN n % 3 > 0 THEN 1000000000000000000 END
             FROM generate_series(1, {PLANS}) AS p, generate_series(1, {planned}) AS n;
             INSERT INTO settled.runs (plan_id, state, operator, why, all_verdicts, started_at, changed_at)
             SELECT p, 'done', 'ann', 'why', true, now(), now() FROM generate_series(1, {PLANS}) AS p;
             INSERT INTO settled.run_items (run_id, position, dead_letter_id, planned, state, verdict, judged_at)
             SELECT plan_id, position, dead_letter_id, verdict, 'judged', verdict, now() FROM settled.plan_items;
             INSERT INTO settled.audit (at, operator, act, why, filters, outcome)
             SELECT now(), 'ann', 'plan', 'why', '{{}}', '{{}}' FROM generate_series(1, 100000);
             INSERT INTO settled.batches (id, worker, source, at, received, settled, duplicate, parked, rejected, reasons)
             SELECT (lpad(to_hex((extract(epoch FROM b.at) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3) || '8'
                     || substr(md5(n::text), 4, 15))::uuid, 'w', 'queue', b.at, 100, 90, 0, 0, 10, '{{\"internal\": 10}}'
             FROM generate_series(1, 20000) AS n
             CROSS JOIN LATERAL (SELECT now() - n * interval '180 milliseconds' AS at) AS b"
        ))
        .await;
    let db = place.db().await;
    for table in [
        "dead_letters",
        "plans",
        "plan_items",
        "runs",
        "run_items",
        "audit",
        "batches",
        "partners",
        "connections",
        "funds",
    ] {
        let sql = format!("VACUUM ANALYZE settled.{table}");
        db.batch_execute(&sql).await.expect("it is looked at");
    }
}

/// Every screen that is looked at, with something in its place; those with filters several times.
fn screens(letter: (&str, uuid::Uuid), allocation: uuid::Uuid) -> Vec<String> {
    let (nonce, letter) = letter;
    let mut screens = Vec::new();
    for route in table().filter(|route| route.method == "GET" && !matches!(route.needs, Needs::Nobody)) {
        screens.extend(match route.path {
            // A stream has no end; it is measured by itself.
            "/live" => Vec::new(),
            "/letters" => [
                "",
                "?state=all",
                "?state=discarded",
                "?partner=partner-7",
                "?partner=nobody",
                "?reason=internal",
                "?reason=message_too_large",
                "?final=no",
                &format!("?nonce={nonce}"),
                "?group=none",
                "?since=24h",
                "?since=1h&reason=internal",
                "?until=2001-01-01T00:00:00Z",
                &format!("?after={}", u64::from(all_letters()) * 99 / 100),
                "?made_by=unknown",
                "?partner=partner-7&reason=internal&since=168h&final=no",
            ]
            .iter()
            .map(|query| format!("/letters{query}"))
            .collect(),
            "/letters/{id}" => vec![format!("/letters/{letter}")],
            "/plans/{id}" => vec!["/plans/3".to_owned()],
            // As it is watched, too.
            "/runs/{id}" => vec!["/runs/3".to_owned(), "/runs/3?again=1".to_owned()],
            "/partners" => vec!["/partners".to_owned(), "/partners?after=partner-5".to_owned()],
            "/partners/{id}" => vec!["/partners/partner-7".to_owned()],
            "/ledger" => vec![
                "/ledger".to_owned(),
                "/ledger?currency=CUR3".to_owned(),
                "/ledger?owner=ab".to_owned(),
            ],
            "/timeline" => vec![format!("/timeline?of={allocation}"), "/timeline?of=nonce-77".to_owned()],
            "/discard" | "/restore" => ["", "?partner=partner-7", "?state=open"]
                .iter()
                .map(|query| format!("{}{query}", route.path))
                .collect(),
            "/purge" => vec!["/purge?before=1m&settled=yes".to_owned()],
            "/audit" => vec![
                "/audit".to_owned(),
                "/audit?operator=nobody".to_owned(),
                "/audit?act=replay".to_owned(),
            ],
            path => vec![path.to_owned()],
        });
    }
    screens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: make console-size"]
async fn every_screen_with_a_million_letters() {
    let place = Place::new("console_size").await;
    let began = Instant::now();
    fill(&place).await;
    println!("{} letters and more, made in {:?}", all_letters(), began.elapsed());
    let db = place.db().await;
    let nonce = format!("nonce-{}", all_letters() / 2 + 1);
    let row = db
        .query_one(
            "SELECT id, allocation_id FROM settled.dead_letters WHERE nonce = $1",
            &[&nonce],
        )
        .await
        .expect("a letter");
    let console = Console::start(&place, &[("SETTLED_LOG__LEVEL", "warn")]).await;
    let ann = console.sign_in().await;
    let mut slow = Vec::new();
    println!(
        "{:>8} {:>8} {:>8} {:>9}  screen ({TIMES} times each, ms at the client; KB of the page)",
        "p50", "p95", "most", "KB"
    );
    for path in screens((&nonce, row.get(0)), row.get(1)) {
        let mut taken = Vec::new();
        let mut bytes = 0;
        for round in 0..TIMES + 2 {
            let began = Instant::now();
            let page = console.get(&ann, &path).await;
            let elapsed = began.elapsed();
            assert!(matches!(page.status, 200 | 404), "{path}: {page:?}");
            bytes = page.text.len();
            if round >= 2 {
                taken.push(elapsed);
            }
        }
        taken.sort();
        let at = |part: usize| taken[(taken.len() * part / 100).min(taken.len() - 1)];
        let ms = |time: Duration| format!("{:.1}", time.as_secs_f64() * 1000.0);
        println!(
            "{:>8} {:>8} {:>8} {:>9}  {path}",
            ms(at(50)),
            ms(at(95)),
            ms(at(100)),
            bytes / 1024
        );
        if at(95) > P95 {
            slow.push(path);
        }
    }
    assert!(slow.is_empty(), "slower than {P95:?}: {slow:?}");
    console.stop().await;
}

/// Somebody who watches, and counts what comes.
async fn watch(console: &Console, visitor: &Visitor) -> TcpStream {
    let mut stream = TcpStream::connect(console.address()).await.expect("it listens");
    let cookie = visitor.cookie.as_deref().expect("a session");
    let head = format!(
        "GET /live HTTP/1.1\r\nhost: {}\r\ncookie: {cookie}\r\n\r\n",
        console.address()
    );
    stream.write_all(head.as_bytes()).await.expect("it reads");
    stream
}

/// Everybody who watches: what comes is read, and how often each saw something new is counted.
struct Watching {
    open: tokio::task::JoinSet<()>,
    told: tokio::sync::mpsc::UnboundedReceiver<(usize, usize)>,
    seen: Vec<usize>,
}

impl Watching {
    async fn begin(console: &Console, visitor: &Visitor, viewers: usize) -> Self {
        let (tell, told) = tokio::sync::mpsc::unbounded_channel();
        let mut open = tokio::task::JoinSet::new();
        for number in 0..viewers {
            let (mut stream, tell) = (watch(console, visitor).await, tell.clone());
            open.spawn(async move {
                let mut bytes = vec![0; 64 * 1024];
                loop {
                    let Ok(read @ 1..) = stream.read(&mut bytes).await else {
                        return;
                    };
                    let looks = String::from_utf8_lossy(&bytes[..read]).matches("\n\n").count();
                    if tell.send((number, looks)).is_err() {
                        return;
                    }
                }
            });
        }
        Self {
            open,
            told,
            seen: vec![0; viewers],
        }
    }

    /// How often whoever saw least has seen something new.
    fn least(&mut self) -> usize {
        while let Ok((number, events)) = self.told.try_recv() {
            self.seen[number] += events;
        }
        self.seen.iter().copied().min().unwrap_or_default()
    }

    async fn end(mut self) {
        self.open.shutdown().await;
    }
}

/// Hands connections on, and counts them.
pub(super) async fn counted(to: String) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::Relaxed);
            let to = to.clone();
            tokio::spawn(async move {
                if let Ok(mut to) = TcpStream::connect(to).await {
                    drop(tokio::io::copy_bidirectional(&mut from, &mut to).await);
                }
            });
        }
    });
    (address, connections)
}

/// What a program has used of the processors until now, in hundredths of a second.
fn used(worker: &Worker) -> u64 {
    let id = worker.id().expect("it runs");
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).expect("it runs");
    // After the name, which may hold anything; user and system time are the 14th and 15th field of all.
    let (_, fields) = stat.rsplit_once(')').expect("a name");
    let fields: Vec<&str> = fields.split_whitespace().collect();
    fields[11..13]
        .iter()
        .map(|field| field.parse::<u64>().expect("ticks"))
        .sum()
}

/// A worker settles as many messages with nobody and with two hundred people watching it, in turns: its own time for them is the same,
/// and it is asked no oftener than one viewer would have it asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: make console-size"]
async fn two_hundred_people_cost_the_worker_nothing() {
    let place = Place::new("console_cost").await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000000000").await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let http = port.local_addr().expect("an address").to_string();
    drop(port);
    let worker = place.ready_worker(&[("SETTLED_HTTP__LISTEN", http.as_str())]).await;
    let (front, asked) = counted(http).await;
    let console = Console::start(
        &place,
        &[
            ("SETTLED_LOG__LEVEL", "warn"),
            ("SETTLED_CONSOLE__LIVE_INTERVAL", "1s"),
            ("SETTLED_CONSOLE__WORKERS", front.as_str()),
        ],
    )
    .await;
    let ann = console.sign_in().await;
    let db = place.db().await;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    let mut looks = 0;
    // The first one fills caches, and does not count.
    for round in 0..=ROUNDS {
        let reservations: Vec<_> = (0..SETTLED).map(|_| partner.allocation("BTC", "7")).collect();
        place.reserve(&reservations).await;
        let messages: Vec<_> = reservations.iter().map(|one| partner.cleared(one)).collect();
        let viewers = if round % 2 == 0 { VIEWERS } else { 0 };
        let mut watching = Watching::begin(&console, &ann, viewers).await;
        if viewers > 0 {
            until("everybody sees something", 4 * PATIENCE, async || {
                (watching.least() > 0).then_some(())
            })
            .await;
        }
        let (asked_before, began, before) = (asked.load(Ordering::Relaxed), Instant::now(), used(&worker));
        let batches_before = count(&db, "batches").await;
        for (part, some) in messages.chunks(AT_A_TIME).enumerate() {
            place.publish(some).await;
            let all = i64::try_from(round * SETTLED + part * AT_A_TIME + some.len()).expect("few");
            until("all of it is settled", 4 * PATIENCE, async || {
                (count(&db, "receipts WHERE verdict = 'settled'").await == all).then_some(())
            })
            .await;
        }
        let batches = count(&db, "batches").await - batches_before;
        // So that they have seen it, and the worker was asked in between.
        let seen = watching.least();
        if viewers > 0 {
            until("everybody sees more", 4 * PATIENCE, async || {
                (watching.least() > seen + 1).then_some(())
            })
            .await;
        }
        let (took, own) = (began.elapsed(), used(&worker) - before);
        let asks = asked.load(Ordering::Relaxed) - asked_before;
        println!(
            "{viewers:>4} viewers: {SETTLED} messages in {batches} batches and {took:?}, of which the worker worked {own} hundredths of \
             a second; it was asked {asks} times"
        );
        // Two questions a look, and a look a second, however many look.
        let most = 2 * (usize::try_from(took.as_secs()).expect("few") + 2);
        assert!(asks <= most, "asked {asks} times in {took:?}");
        if viewers > 0 {
            looks += asks;
        }
        watching.end().await;
        if round > 0 {
            if viewers > 0 { &mut with } else { &mut without }.push(own);
        }
    }
    assert!(looks > 0, "it is watched");
    let (without, with): (u64, u64) = (without.iter().sum(), with.iter().sum());
    println!(
        "the worker's own time for {} messages: {without} hundredths of a second with nobody, {with} with {VIEWERS} viewers",
        ROUNDS / 2 * SETTLED
    );
    assert!(
        with * 100 <= without * COST_MAX_PERCENT,
        "{with} with viewers, {without} without"
    );
    console.stop().await;
    drop(worker);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: make console-size"]
async fn two_hundred_people_watch() {
    let place = Place::new("console_viewers").await;
    fill(&place).await;
    let console = Console::start(
        &place,
        &[("SETTLED_LOG__LEVEL", "warn"), ("SETTLED_CONSOLE__LIVE_INTERVAL", "1s")],
    )
    .await;
    let ann = console.sign_in().await;
    let before = console.memory_kb("VmRSS");
    let mut watching = Watching::begin(&console, &ann, VIEWERS).await;
    // Each sees it anew, again and again.
    let began = Instant::now();
    let mut most = 0;
    until("everybody sees twenty looks", 4 * PATIENCE, async || {
        most = most.max(console.memory_kb("VmRSS"));
        (watching.least() >= 20).then_some(())
    })
    .await;
    let (peak, took) = (console.memory_kb("VmHWM"), began.elapsed());
    println!(
        "{VIEWERS} viewers, each saw {} looks or more in {took:?}: the console had {before} kB before, {most} kB meanwhile, {peak} kB \
         at most",
        watching.least()
    );
    // And whoever asks for a page is answered meanwhile.
    let asked = Instant::now();
    assert_eq!(console.get(&ann, "/letters").await.status, 200);
    println!("a page meanwhile: {:?}", asked.elapsed());
    assert!(peak < MEMORY_MAX_KB, "{peak} kB");
    watching.end().await;
    console.stop().await;
}
