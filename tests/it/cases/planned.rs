//! What a plan says of a dead letter is what a fresh publication of it would get: of copies that differ in anything a check
//! may read, made by whoever, the plan's verdicts against those of a worker that gets the very same messages anew.

use std::collections::BTreeMap;

use lapin::{
    BasicProperties,
    types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable},
};
use proptest::{
    prelude::{Just, Strategy, any, prop_oneof},
    test_runner::{Config, TestCaseError, TestRunner},
};
use serde_json::{Value, json};
use settled::domain::delivery::{HeaderValue, Headers, Properties};

use crate::kit::{
    amqp::{Line, Message},
    auditor::{Expect, Reservation, sha256},
    command::Answer,
    partner::{Draft, Partner, new_key},
    raw::{self, Raw},
    support::{LEAVE_DEAD_LETTERS, PATIENCE, Place, until, userinfo},
};

/// What a partner says, as far as copies share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    /// Clears what is reserved.
    Clears,
    /// Releases the same.
    Releases,
    /// Clears another, with the first one's nonce.
    UsedNonce,
    /// Clears another, but not all of it.
    LessThanReserved,
    /// Clears what is reserved only later.
    TooEarly,
    /// Clears a third, with a key that nobody registers.
    StrangeKey,
    /// No JSON.
    Malformed,
    /// A field is missing.
    Incomplete,
    /// Above the limit for bodies.
    TooLarge,
    /// Clears, and says that the policy rejected it.
    Contradiction,
    /// Clears what is another partner's.
    Others,
    /// Clears its own, as a partner without a broker user.
    Unbound,
    /// Speaks for a partner that is registered later, if at all.
    Unregistered,
}

const SAID: [Said; 13] = [
    Said::Clears,
    Said::Releases,
    Said::UsedNonce,
    Said::LessThanReserved,
    Said::TooEarly,
    Said::StrangeKey,
    Said::Malformed,
    Said::Incomplete,
    Said::TooLarge,
    Said::Contradiction,
    Said::Others,
    Said::Unbound,
    Said::Unregistered,
];

/// Who publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Login {
    /// The partner's broker user, who says so.
    Partner,
    /// The partner's broker user, who says nothing.
    PartnerSilent,
    /// Somebody else, who says so.
    Stranger,
    /// The worker's own, who says nothing.
    Silent,
}

/// Headers that no check reads, but that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extra {
    None,
    Plain,
    /// Types that travel as text.
    Rare,
    /// As many bytes as there may be, nearly.
    Large,
    TooLarge,
    /// What dead letters carry, and the broker's own record.
    Forged,
}

/// How it becomes a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By a verdict, if it is refused.
    Judged,
    /// The broker gives it up.
    Expired,
    /// Put there by somebody who is no worker.
    PutThere,
    /// By a verdict, with properties that can not be decoded.
    Undecodable,
}

#[derive(Clone, Debug)]
struct Copy {
    said: Said,
    login: Login,
    content_type: Option<&'static str>,
    encoding: Option<&'static str>,
    extra: Extra,
    way: Way,
}

fn copy() -> impl Strategy<Value = Copy> {
    let logins = prop_oneof![
        4 => Just(Login::Partner),
        1 => Just(Login::PartnerSilent),
        1 => Just(Login::Stranger),
        1 => Just(Login::Silent),
    ];
    let content_types = prop_oneof![
        6 => Just(Some("application/json")),
        1 => Just(Some("Application/JSON; charset=UTF-8")),
        1 => Just(None),
        1 => Just(Some("")),
        1 => Just(Some("text/plain")),
    ];
    let encodings = prop_oneof![
        6 => Just(None),
        1 => Just(Some("identity")),
        1 => Just(Some("UTF-8")),
        1 => Just(Some("gzip")),
    ];
    let extras = prop_oneof![
        4 => Just(Extra::None),
        1 => Just(Extra::Plain),
        1 => Just(Extra::Rare),
        1 => Just(Extra::Large),
        1 => Just(Extra::TooLarge),
        1 => Just(Extra::Forged),
    ];
    let ways = prop_oneof![
        8 => Just(Way::Judged),
        2 => Just(Way::Expired),
        1 => Just(Way::PutThere),
        1 => Just(Way::Undecodable),
    ];
    let said = proptest::sample::select(&SAID[..]);
    (said, logins, content_types, encodings, extras, ways).prop_map(
        |(said, login, content_type, encoding, extra, way)| Copy {
            said,
            login,
            content_type,
            encoding,
            extra,
            way,
        },
    )
}

/// What the key of the bound partner is before it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Missing,
    Revoked,
    There,
}

/// What is mended between the failures and the plan.
#[derive(Clone, Debug)]
struct World {
    copies: Vec<Copy>,
    key: Key,
    /// The unbound partner is suspended at first.
    suspended: bool,
    mends_key: bool,
    resumes: bool,
    registers: bool,
    reserves: bool,
    suspends_the_bound: bool,
}

fn world() -> impl Strategy<Value = World> {
    let keys = prop_oneof![3 => Just(Key::Missing), 1 => Just(Key::Revoked), 1 => Just(Key::There)];
    let mends = (
        any::<bool>(),
        proptest::bool::weighted(0.8),
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    );
    let copies = proptest::collection::vec(copy(), 12..28);
    (copies, keys, mends, proptest::bool::weighted(0.1)).prop_map(
        |(copies, key, (suspended, mends_key, resumes, registers, reserves), suspends_the_bound)| World {
            copies,
            key,
            suspended,
            mends_key,
            resumes,
            registers,
            reserves,
            suspends_the_bound,
        },
    )
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table(entries: impl IntoIterator<Item = (&'static str, AMQPValue)>) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert(name.into(), value);
    }
    table
}

impl Extra {
    fn headers(self) -> Option<FieldTable> {
        let padded = |bytes: usize| table([("padding", text(&"x".repeat(bytes)))]);
        Some(match self {
            Extra::None => return None,
            Extra::Plain => table([("traceparent", text("00-1-2-3")), ("n", AMQPValue::LongInt(7))]),
            Extra::Rare => table([
                ("float", AMQPValue::Float(0.5)),
                (
                    "price",
                    AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 1_234 }),
                ),
                ("bytes", AMQPValue::ByteArray(ByteArray::from(vec![0, 255, 7]))),
            ]),
            Extra::Large => padded(16_000),
            Extra::TooLarge => padded(17_000),
            Extra::Forged => table([
                ("settled-reason", text("already_settled")),
                ("settled-origin-user-id", text("somebody")),
                (
                    "x-death",
                    AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(table([
                        ("queue", text("settlement.dead")),
                        ("reason", text("delivery_limit")),
                        ("count", AMQPValue::LongLongInt(1)),
                    ]))])),
                ),
            ]),
        })
    }
}

/// A header as the client library has it.
fn value(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Boolean(value) => AMQPValue::Boolean(*value),
        HeaderValue::ShortShortInt(value) => AMQPValue::ShortShortInt(*value),
        HeaderValue::ShortShortUInt(value) => AMQPValue::ShortShortUInt(*value),
        HeaderValue::ShortInt(value) => AMQPValue::ShortInt(*value),
        HeaderValue::ShortUInt(value) => AMQPValue::ShortUInt(*value),
        HeaderValue::LongInt(value) => AMQPValue::LongInt(*value),
        HeaderValue::LongUInt(value) => AMQPValue::LongUInt(*value),
        HeaderValue::LongLongInt(value) => AMQPValue::LongLongInt(*value),
        HeaderValue::Float(bits) => AMQPValue::Float(f32::from_bits(*bits)),
        HeaderValue::Double(bits) => AMQPValue::Double(f64::from_bits(*bits)),
        HeaderValue::Decimal { scale, value } => AMQPValue::DecimalValue(DecimalValue {
            scale: *scale,
            value: *value,
        }),
        HeaderValue::LongString(bytes) => AMQPValue::LongString(bytes.0.clone().into()),
        HeaderValue::Array(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(self::value).collect::<Vec<_>>()))
        }
        HeaderValue::Timestamp(seconds) => AMQPValue::Timestamp(*seconds),
        HeaderValue::Table(headers) => AMQPValue::FieldTable(fields(headers)),
        HeaderValue::ByteArray(bytes) => AMQPValue::ByteArray(ByteArray::from(bytes.0.clone())),
        HeaderValue::Void => AMQPValue::Void,
    }
}

fn fields(headers: &Headers) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, header) in headers {
        table.insert(name.as_str().into(), value(header));
    }
    table
}

/// Who takes part: partners, their messages, and the logins by which they publish.
struct Cast {
    bound: Partner,
    unbound: Partner,
    late: Partner,
    bodies: BTreeMap<Said, Message>,
    too_early: Reservation,
    partner: (String, Line),
    stranger: (String, Line),
}

impl Cast {
    async fn new(place: &Place, world: &World) -> Self {
        let [bound, unbound, late] = ["acme", "beta", "ghost"].map(Partner::new);
        let partner = login(place, "partner").await;
        let stranger = login(place, "stranger").await;
        let mut keyless = bound.clone();
        if world.key == Key::Missing {
            keyless.key = new_key();
        }
        place.register_with(&keyless, &["--broker-user", &partner.0]).await;
        place.register(&unbound).await;
        place.deposit(&bound, "BTC", "1000").await;
        place.deposit(&unbound, "BTC", "1000").await;
        let of_bound: Vec<Reservation> = (0..6).map(|_| bound.allocation("BTC", "2")).collect();
        let too_early = bound.allocation("BTC", "2");
        let of_unbound = unbound.allocation("BTC", "3");
        place
            .reserve(&[&of_bound[..], std::slice::from_ref(&of_unbound)].concat())
            .await;
        let clears = bound.draft(&of_bound[0], "cleared");
        let nonce = clears.fields.get("nonce").clone();
        let drafts: [(Said, Draft); 9] = [
            (Said::Releases, bound.draft(&of_bound[0], "released")),
            (
                Said::UsedNonce,
                bound.draft(&of_bound[1], "cleared").set("nonce", nonce),
            ),
            (
                Said::LessThanReserved,
                bound
                    .draft(&of_bound[2], "cleared")
                    .set("amount", json!({"currency": "BTC", "quantity": "1"})),
            ),
            (Said::TooEarly, bound.draft(&too_early, "cleared")),
            (
                Said::StrangeKey,
                bound.draft(&of_bound[3], "cleared").signed_by(new_key()),
            ),
            (Said::Incomplete, bound.draft(&of_bound[4], "cleared").without("nonce")),
            (
                Said::Contradiction,
                bound.draft(&of_bound[5], "cleared").set("policyResult", "rejected"),
            ),
            (Said::Others, bound.draft(&of_unbound, "cleared")),
            (Said::Unbound, unbound.draft(&of_unbound, "cleared")),
        ];
        let mut bodies: BTreeMap<Said, Message> = drafts
            .into_iter()
            .map(|(said, draft)| (said, draft.message(Expect::Any)))
            .collect();
        bodies.insert(Said::Clears, clears.message(Expect::Any));
        bodies.insert(
            Said::Unregistered,
            late.draft(&late.allocation("BTC", "1"), "cleared").message(Expect::Any),
        );
        let key = "acme.allocation.update";
        bodies.insert(Said::Malformed, Message::new(key, "no JSON", Expect::Any));
        bodies.insert(Said::TooLarge, Message::new(key, "x".repeat(262_145), Expect::Any));
        Self {
            bound,
            unbound,
            late,
            bodies,
            too_early,
            partner,
            stranger,
        }
    }

    fn message(&self, copy: &Copy) -> Message {
        let mut message = self.bodies[&copy.said].clone();
        let mut properties = BasicProperties::default().with_delivery_mode(2);
        if let Some(content_type) = copy.content_type {
            properties = properties.with_content_type(content_type.into());
        }
        if let Some(encoding) = copy.encoding {
            properties = properties.with_content_encoding(encoding.into());
        }
        if let Some(headers) = copy.extra.headers() {
            properties = properties.with_headers(headers);
        }
        properties = match copy.login {
            Login::Partner => properties.with_user_id(self.partner.0.as_str().into()),
            Login::Stranger => properties.with_user_id(self.stranger.0.as_str().into()),
            Login::PartnerSilent | Login::Silent => properties,
        };
        match copy.way {
            Way::Expired => properties = properties.with_expiration("1".into()),
            Way::PutThere => "settlement.dead".clone_into(&mut message.exchange),
            Way::Judged | Way::Undecodable => {}
        }
        message.properties = properties;
        message
    }

    async fn publish(&self, place: &Place, copy: &Copy) {
        let message = self.message(copy);
        if copy.way == Way::Undecodable {
            let mut raw = Raw::open(&place.broker_url).await;
            let list = raw::short(raw::UNDECODABLE);
            let (key, flags) = (&message.routing_key, raw::CONTENT_TYPE);
            raw.publish("settlement.updates", key, flags, &list, &message.body)
                .await;
            return;
        }
        self.line_of(place, copy.login).publish(&[message]).await;
    }

    fn line_of<'a>(&'a self, place: &'a Place, login: Login) -> &'a Line {
        match login {
            Login::Partner | Login::PartnerSilent => &self.partner.1,
            Login::Stranger => &self.stranger.1,
            Login::Silent => place.line(),
        }
    }

    /// The row, published anew: under its own `user_id`, with what it was received with. Its expiration is left out, as a
    /// replay has no use for it; of one that was too large there is only the head, so the first copy of it goes again.
    async fn publish_row(&self, place: &Place, row: &Value, world: &World) {
        let mut properties = row["properties"].clone();
        let named = properties.as_object_mut().expect("properties");
        if let Some(typed) = named.remove("typedHeaders") {
            named.insert("headers".to_owned(), typed);
        }
        let properties: Properties = serde_json::from_value(properties).expect("properties as they are stored");
        let user = properties.user_id.as_deref();
        let routing_key = row["routingKey"].as_str().expect("a routing key");
        if row["bodyBytesKept"].is_number() {
            let is_it = |copy: &&Copy| {
                let message = self.message(copy);
                let kept = &message.properties;
                let is_large = copy.said == Said::TooLarge || copy.extra == Extra::TooLarge;
                let same = |ours: Option<&str>, theirs: &Option<lapin::types::ShortString>| {
                    ours == theirs.as_ref().map(|text| text.as_str())
                };
                is_large
                    && copy.way != Way::Undecodable
                    && row["messageDigest"] == hex::encode(sha256(&message.body))
                    && same(user, kept.user_id())
                    && same(properties.content_type.as_deref(), kept.content_type())
                    && same(properties.content_encoding.as_deref(), kept.content_encoding())
            };
            if let Some(copy) = world.copies.iter().find(is_it) {
                let again = Copy {
                    way: Way::Judged,
                    ..copy.clone()
                };
                return self.publish(place, &again).await;
            }
            let large = world
                .copies
                .iter()
                .find(|copy| copy.said == Said::TooLarge && copy.way == Way::Undecodable);
            return self.publish(place, large.expect("what the row is the head of")).await;
        }
        let body = row["body"].as_str().expect("a body");
        let body = base64::Engine::decode(&base64::prelude::BASE64_STANDARD, body).expect("base64");
        if let Some(list) = &properties.undecodable {
            let (flags, list) = list.0.split_first_chunk::<2>().expect("flags");
            let mut raw = Raw::open(&place.broker_url).await;
            let flags = u16::from_be_bytes(*flags);
            return raw.publish("settlement.updates", routing_key, flags, list, &body).await;
        }
        let mut anew = BasicProperties::default().with_delivery_mode(2);
        if let Some(content_type) = properties.content_type {
            anew = anew.with_content_type(content_type.into());
        }
        if let Some(encoding) = properties.content_encoding {
            anew = anew.with_content_encoding(encoding.into());
        }
        if let Some(headers) = &properties.headers {
            anew = anew.with_headers(fields(headers));
        }
        let line = match user {
            None => place.line(),
            Some(user) if user == self.partner.0 => &self.partner.1,
            Some(user) if user == self.stranger.0 => &self.stranger.1,
            Some(user) => panic!("nobody is called {user}: {row}"),
        };
        if let Some(user) = user {
            anew = anew.with_user_id(user.into());
        }
        let mut message = Message::new(routing_key, body, Expect::Any);
        message.properties = anew;
        line.publish(&[message]).await;
    }

    async fn leave(&self, place: &Place) {
        for user in [&self.partner.0, &self.stranger.0] {
            place
                .services
                .manage("DELETE", &format!("/api/users/{user}"), None)
                .await;
        }
    }
}

/// A broker user of this place, and its connection.
async fn login(place: &Place, name: &str) -> (String, Line) {
    let user = format!("{}_{name}", place.name);
    let secret = uuid::Uuid::new_v4().simple().to_string();
    let asked = [
        (format!("/api/users/{user}"), json!({"password": secret, "tags": ""})),
        (
            format!("/api/permissions/{}/{user}", place.name),
            json!({"configure": "", "write": "settlement\\..*", "read": ""}),
        ),
    ];
    for (path, body) in asked {
        let (status, answer) = place.services.manage("PUT", &path, Some(body)).await;
        assert!(matches!(status, 201 | 204), "{path}: {status} {answer}");
    }
    let (ours, password) = userinfo(&place.broker_url);
    let url = place
        .broker_url
        .replace(&format!("{ours}:{password}@"), &format!("{user}:{secret}@"));
    let line = Line::open(&url).await;
    (user, line)
}

async fn succeed(place: &Place, arguments: &[&str]) {
    let answer = Answer::of(&place.run(arguments).await);
    assert!(answer.succeeded(), "{arguments:?}: {}", answer.all());
}

/// Nothing is left in any queue, nor in the outbox.
async fn at_rest(place: &Place, line: &Line) -> bool {
    for queue in ["settlement.updates", "settlement.dead", "settlement.dead.broker"] {
        if line.depth(queue).await > 0 {
            return false;
        }
    }
    let books: String = place
        .db()
        .await
        .query_one("SELECT 'settlement.dead.broker.' || replace(books::text, '-', '') FROM settled.epochs ORDER BY epoch DESC LIMIT 1", &[])
        .await
        .expect("the books")
        .get(0);
    if line.depth(&books).await > 0 {
        return false;
    }
    let sql = "SELECT (SELECT count(*) FROM settled.outbox) + (SELECT count(*) FROM settled.held)";
    let left: i64 = place.db().await.query_one(sql, &[]).await.expect(sql).get(0);
    left == 0
}

/// Verdict and reason.
type Came = (String, Option<String>);

/// What a plan says, row by row in its order, with the rows as they are exported.
async fn planned(place: &Place, flags: &[&str]) -> Vec<(Value, Came)> {
    let answer = Answer::of(&place.run(&[&["dead-letters", "plan", "--json"], flags].concat()).await);
    if answer.code == Some(1) && answer.err.contains("nothing to plan") {
        return Vec::new();
    }
    let plan = answer.document(0);
    let export = [&["dead-letters", "export", "--json"], flags].concat();
    let rows = Answer::of(&place.run(&export).await).lines(0);
    let rows: BTreeMap<String, Value> = rows
        .into_iter()
        .map(|row| (row["id"].as_str().expect("an id").to_owned(), row))
        .collect();
    let items = place
        .db()
        .await
        .query(
            "SELECT dead_letter_id::text, verdict, reason FROM settled.plan_items WHERE plan_id = $1 ORDER BY position",
            &[&plan["plan"].as_i64().expect("a plan")],
        )
        .await
        .expect("the plan's items");
    items
        .iter()
        .map(|item| {
            let id: String = item.get(0);
            (rows[&id].clone(), (item.get(1), item.get(2)))
        })
        .collect()
}

/// The verdicts of batches of one, in order.
async fn came_to(place: &Place, after: i64) -> Vec<Came> {
    let rows = place
        .db()
        .await
        .query(
            "SELECT received, settled, duplicate, parked, reasons::text
             FROM settled.batches
             WHERE source = 'queue'
             ORDER BY at, id
             OFFSET $1",
            &[&after],
        )
        .await
        .expect("batches");
    let verdict = |row: &tokio_postgres::Row| {
        let count = |column: usize| row.get::<_, i32>(column);
        assert_eq!(count(0), 1, "one at a time");
        let reasons: BTreeMap<String, Value> = serde_json::from_str(row.get(4)).expect("JSON");
        match (count(1), count(2), count(3)) {
            (1, 0, 0) => ("settled".to_owned(), None),
            (0, 1, 0) => ("duplicate".to_owned(), None),
            (0, 0, 1) => ("parked".to_owned(), Some("allocation_not_found".to_owned())),
            _ => ("rejected".to_owned(), reasons.into_keys().next()),
        }
    };
    rows.iter().map(verdict).collect()
}

async fn batches(place: &Place) -> i64 {
    let sql = "SELECT count(*) FROM settled.batches WHERE source = 'queue'";
    place.db().await.query_one(sql, &[]).await.expect(sql).get(0)
}

async fn check(world: &World) {
    let place = Place::new("planned").await;
    let cast = Cast::new(&place, world).await;
    let key = cast.bound.public_key();
    let of_key = ["--enterprise-id", "acme", "--public-key", &key];
    if world.key == Key::Revoked {
        succeed(&place, &[&["key", "revoke"], &of_key[..]].concat()).await;
    }
    if world.suspended {
        succeed(&place, &["partner", "suspend", "--enterprise-id", "beta"]).await;
    }

    // First what nobody is to read, then the rest; and everything has its place.
    for copy in world.copies.iter().filter(|copy| copy.way == Way::Expired) {
        cast.publish(&place, copy).await;
    }
    until("they expire", PATIENCE, async || {
        (place.line().depth("settlement.updates").await == 0).then_some(())
    })
    .await;
    for copy in world.copies.iter().filter(|copy| copy.way != Way::Expired) {
        cast.publish(&place, copy).await;
    }
    until("everything has its place", PATIENCE, async || {
        // What is not here yet is refused, and not kept waiting.
        let worker = place
            .ready_worker(&[
                ("SETTLED_PARK__MAX_PER_PARTNER", "0"),
                ("SETTLED_DEAD_LETTERS__LINGER", "20ms"),
                ("SETTLED_DEAD_LETTERS__RECHECK_INTERVAL", "1h"),
            ])
            .await;
        until("the queues are empty", PATIENCE, async || {
            at_rest(&place, place.line()).await.then_some(())
        })
        .await;
        assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
        // What was in hand is back.
        at_rest(&place, place.line()).await.then_some(())
    })
    .await;

    match world.key {
        Key::Missing if world.mends_key => place.add_key(&cast.bound).await,
        Key::Revoked if world.mends_key => {
            succeed(
                &place,
                &[&["key", "reinstate", "--reason", "a test"], &of_key[..]].concat(),
            )
            .await;
        }
        Key::Missing | Key::Revoked | Key::There => {}
    }
    if world.suspended && world.resumes {
        succeed(&place, &["partner", "resume", "--enterprise-id", "beta"]).await;
    }
    if world.suspends_the_bound {
        succeed(&place, &["partner", "suspend", "--enterprise-id", "acme"]).await;
    }
    if world.registers {
        place.register(&cast.late).await;
    }
    if world.reserves {
        place.reserve(std::slice::from_ref(&cast.too_early)).await;
    }
    assert_eq!(cast.unbound.enterprise, "beta");

    let worker = place
        .ready_worker(&[LEAVE_DEAD_LETTERS, ("SETTLED_DEAD_LETTERS__RECHECK_INTERVAL", "1h")])
        .await;
    // Those of nobody known are planned by themselves, and after the others.
    for flags in [&[][..], &["--made-by", "unknown"]] {
        let planned = planned(&place, flags).await;
        let before = batches(&place).await;
        for (number, (row, _)) in planned.iter().enumerate() {
            cast.publish_row(&place, row, world).await;
            let so_far = before + i64::try_from(number).expect("few") + 1;
            until("it is judged", PATIENCE, async || {
                (batches(&place).await >= so_far).then_some(())
            })
            .await;
        }
        let came = came_to(&place, before).await;
        assert_eq!(came.len(), planned.len());
        for ((row, expected), came) in planned.iter().zip(&came) {
            assert_eq!(expected, came, "the plan, and a fresh publication, of {row}");
        }
    }
    assert_eq!(worker.terminate().await.code(), Some(0), "{}", worker.said());
    assert_eq!(place.json(&["ledger", "check"]).await["ok"], true);
    cast.leave(&place).await;
}

#[test]
fn a_plan_says_what_a_fresh_publication_would_get() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let config = Config {
        cases: 3,
        max_shrink_iters: 12,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&world(), |world| {
            runtime.block_on(check(&world));
            Ok::<(), TestCaseError>(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
