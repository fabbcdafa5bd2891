//! A few hundred messages of every sort, as partners would send them, and what is to become of each.

use serde_json::json;
use uuid::Uuid;

use crate::kit::{
    amqp::Message,
    auditor::{Expect, Reservation},
    partner::{Draft, Partner, new_key},
    support::{PATIENCE, Place, Worker, until, userinfo},
};

/// Numbers that look random and are the same for the same seed.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or_default() % bound.max(1)
    }

    fn shuffle<T>(&mut self, things: &mut [T]) {
        for place in (1..things.len()).rev() {
            things.swap(place, self.below(place + 1));
        }
    }
}

/// Messages in the order they go out, and the reservations that some of them wait for.
pub(crate) struct Traffic {
    pub(crate) messages: Vec<Message>,
    /// To be reserved while the messages run: theirs are parked first.
    pub(crate) late: Vec<Reservation>,
}

/// How much of each sort.
pub(crate) struct Mix {
    pub(crate) valid: usize,
    /// Among the valid ones some that contradict others, of which the first wins: for an allocation, or for a nonce.
    pub(crate) rivals: bool,
    /// Refused for every reason that a partner can cause.
    pub(crate) invalid: bool,
    /// Messages whose allocation never comes.
    pub(crate) parked: usize,
    /// Messages whose allocation comes later.
    pub(crate) late: usize,
}

impl Mix {
    pub(crate) const FULL: Mix = Mix {
        valid: 240,
        rivals: true,
        invalid: true,
        parked: 8,
        late: 8,
    };

    /// Only what must settle, some of it twice: whatever fails below, nothing of it may be dead-lettered, and the auditor
    /// demands it.
    pub(crate) const VALID: Mix = Mix {
        valid: 300,
        rivals: false,
        invalid: false,
        parked: 0,
        late: 0,
    };
}

const CURRENCIES: [&str; 2] = ["BTC", "ofc:eth.test-1"];

/// Registers two partners, funds and reserves for them, and prepares what they will say.
pub(crate) async fn prepare(place: &Place, seed: u64, mix: &Mix) -> Traffic {
    let partners = fund(place, mix).await;
    reserve_and_draft(place, &partners, seed, mix).await
}

/// Partners with funds.
pub(crate) struct Funded {
    pub(crate) pair: [Partner; 2],
    /// One that is bound to our own user of the broker, and may not settle: where refusals are wanted.
    bound: Option<Partner>,
}

/// Registers partners, two of them with funds. One allocation a partner and currency is cleared by a worker, so that there
/// is something to deallocate.
pub(crate) async fn fund(place: &Place, mix: &Mix) -> Funded {
    {
        let mut story = place.story();
        story.only_valid = !mix.rivals && !mix.invalid;
        story.repeats = true;
    }
    let pair = [Partner::new("acme"), Partner::new("Zed_9-Trading")];
    let mut reservations = Vec::new();
    let mut first = Vec::new();
    for partner in &pair {
        place.register(partner).await;
        for currency in CURRENCIES {
            place.deposit(partner, currency, "1000000000000000000000000").await;
            let reservation = partner.allocation(currency, "500000000000000000000000");
            first.push(partner.cleared(&reservation));
            reservations.push(reservation);
        }
    }
    place.reserve(&reservations).await;
    place.publish(&first).await;
    let worker = place.ready_worker(&[]).await;
    place.rest().await;
    worker.terminate().await;
    let mut bound = None;
    if mix.invalid {
        let partner = bound.insert(Partner::new("bound-and-silent"));
        let user = userinfo(&place.broker_url).0;
        let flags = ["--broker-user", user, "--no-async-allocations"];
        place.register_with(partner, &flags).await;
    }
    Funded { pair, bound }
}

/// Reserves for partners that have funds, and prepares what they will say.
pub(crate) async fn reserve_and_draft(place: &Place, partners: &Funded, seed: u64, mix: &Mix) -> Traffic {
    let Funded { pair, bound } = partners;
    let mut dice = Dice::new(seed);
    let stranger = Partner::new("nobody");
    let mut made = Vec::new();
    let mut messages = Vec::new();
    for number in 0..mix.valid {
        let partner = &pair[dice.below(2)];
        let currency = CURRENCIES[dice.below(2)];
        let quantity = (1 + dice.below(1_000_000)).to_string();
        let reservation = match number % 3 {
            0 => partner.deallocation(currency, &quantity),
            _ => partner.allocation(currency, &quantity),
        };
        let message = match dice.below(3) {
            0 => partner.released(&reservation),
            _ => partner.cleared(&reservation),
        };
        match dice.below(12) {
            // The same again.
            0 => messages.push(message.clone()),
            // The opposite: one of the two is first.
            1 if mix.rivals => messages.push(partner.draft(&reservation, other(&message)).message(Expect::Settles)),
            // The same nonce for something else: here too.
            2 if mix.rivals => {
                let another = partner.allocation(currency, "11");
                let draft = partner.draft(&another, "cleared").set("nonce", nonce_of(&message));
                messages.push(draft.message(Expect::Settles));
                made.push(another);
            }
            _ => {}
        }
        messages.push(message);
        made.push(reservation);
    }
    if mix.invalid {
        messages.extend(refused(pair, &stranger, &mut made));
    }
    if let Some(bound) = bound {
        messages.extend(refused_by_registry(bound, userinfo(&place.broker_url).0));
    }
    place.reserve(&made).await;
    for _ in 0..mix.parked {
        let partner = &pair[dice.below(2)];
        let nowhere = partner.allocation("BTC", "1");
        messages.push(partner.draft(&nowhere, "cleared").message(Expect::Waits));
    }
    let mut late = Vec::new();
    for _ in 0..mix.late {
        let partner = &pair[dice.below(2)];
        let reservation = partner.allocation("BTC", "7");
        messages.push(partner.cleared(&reservation));
        late.push(reservation);
    }
    dice.shuffle(&mut messages);
    Traffic { messages, late }
}

fn body_of(message: &Message) -> serde_json::Value {
    serde_json::from_slice(&message.body).expect("JSON")
}

fn nonce_of(message: &Message) -> String {
    body_of(message)["nonce"].as_str().expect("a nonce").to_owned()
}

fn other(message: &Message) -> &'static str {
    if body_of(message)["status"] == "cleared" {
        "released"
    } else {
        "cleared"
    }
}

/// One message for each reason that bytes alone can cause, and one for each that the record can.
pub(crate) fn refused(partners: &[Partner; 2], stranger: &Partner, made: &mut Vec<Reservation>) -> Vec<Message> {
    let [one, two] = partners;
    let mut new = |reservation: Reservation| {
        made.push(reservation.clone());
        reservation
    };
    let theirs = new(two.allocation("BTC", "3"));
    let untouched = new(one.allocation("BTC", "3"));
    let draft = || one.draft(&untouched, "cleared");
    let no = Expect::Refused;
    let mut signature = partner_signature(&draft().message(Expect::Any));
    signature.push('0');
    vec![
        Message::new("acme.allocation.update", vec![b' '; 262_145], no("message_too_large")),
        Message::new("acme.allocation.update", "not json", no("malformed_message")),
        Message::new("no routing key of ours", "{}", no("malformed_message")),
        draft()
            .message(no("malformed_message"))
            .with(|p| p.with_content_type("text/plain".into())),
        draft()
            .set("amount", json!({"currency": "BTC", "quantity": 3}))
            .message(no("invalid_field")),
        draft().without("nonce").message(no("invalid_field")),
        stranger.draft(&untouched, "cleared").message(no("unknown_partner")),
        draft().message_signed(&draft().fields.text(), &signature, no("malformed_signature")),
        draft().signed_by(new_key()).message(no("signature_mismatch")),
        draft().message_with("{\"status\":\"cleared\"}", no("payload_mismatch")),
        {
            let mut message = draft();
            let payload = message.fields.text();
            message
                .fields
                .set("amount", json!({"currency": "BTC", "quantity": "4"}));
            message.message_with(&payload, no("payload_mismatch"))
        },
        draft()
            .set("policyResult", "rejected")
            .message(no("policy_contradiction")),
        one.draft(&theirs, "cleared").message(no("not_permitted")),
        Draft::of_other_kind(one, &untouched).message(no("not_permitted")),
        draft()
            .set("amount", json!({"currency": "BTC", "quantity": "4"}))
            .message(no("allocation_mismatch")),
        draft()
            .set("clientId", json!(Uuid::new_v4()))
            .message(no("allocation_mismatch")),
    ]
}

/// From a partner that may speak as one broker user only, and not of allocations.
fn refused_by_registry(partner: &Partner, user: &str) -> Vec<Message> {
    let draft = || partner.draft(&partner.allocation("BTC", "1"), "cleared");
    vec![
        draft().message(Expect::Refused("sender_mismatch")),
        draft()
            .message(Expect::Refused("partner_inactive"))
            .with(|properties| properties.with_user_id(user.into())),
    ]
}

/// The signature in a message's body.
pub(crate) fn partner_signature(message: &Message) -> String {
    body_of(message)["signature"].as_str().expect("a signature").to_owned()
}

/// Publishes in small lots, so that the worker is at work meanwhile and at rest in between.
pub(crate) async fn publish_in_lots(place: &Place, messages: &[Message]) {
    for lot in messages.chunks(20) {
        place.publish(lot).await;
    }
}

/// Waits until every late message is parked; then reserves what they wait for.
pub(crate) async fn reserve_late(place: &Place, late: &[Reservation], worker: &Worker) {
    if late.is_empty() {
        return;
    }
    let db = place.db().await;
    let ids: Vec<Uuid> = late.iter().map(|reservation| reservation.id).collect();
    until("the late messages are parked", PATIENCE, async || {
        assert!(worker.ended().is_none(), "the worker ended: {}", worker.said());
        let sql = "SELECT count(*) FROM settled.parked WHERE allocation_id = ANY ($1)";
        let count: i64 = db.query_one(sql, &[&ids]).await.expect("parked").get(0);
        (count == ids.len() as i64).then_some(())
    })
    .await;
    place.reserve(late).await;
}
