//! The books, checked from outside: by SQL, by what subscribers recorded, and by what was published. What they should be is
//! computed here from the published messages alone; the program's own rules are asked nothing.
//!
//! What must hold after every run. Each complaint begins with the number of what it found broken.
//!
//! | | invariant | looked at in |
//! |---|---|---|
//! | I1 | an accepted message has one effect | `check_records`, [`books::ledger`], [`books::batches`] |
//! | I2 | money is conserved: entries sum to zero, balances equal entries, states equal the fold of their transfers, nothing is negative | `check_balances`, [`books::ledger`] |
//! | I3 | of the messages that differ in routing key or body each is settled, dead-lettered, parked, held or still queued, one of these and not two; what came in is what it came to, batch by batch | `check_places`, [`books::batches`] |
//! | I4 | an effect has its event, under one id, with the same bytes in every copy; no event without its effect | `check_settlement_events`, `check_refusal_events`, `check_parked_events` |
//! | I5 | no nonce of a partner is accepted twice | `check_nonces`, [`books::ledger`] |
//! | I6 | what had an effect and is said again changes nothing | [`books::Books`], in `Place::settle_up` |
//! | I7 | after the faults queue, outbox and parked messages come to rest in time, and a consumer is attached | [`unrest`], in `Place::settle_up` |
//! | I8 | of valid messages none is dead-lettered, whatever fails below | `check_valid` |
//! | I9 | nothing has an effect without a valid signature of a key that was active | [`books::authority`], `check_strangers` |
//! | I10 | memory, unacknowledged messages, connections and outbox rows stay within their bounds | [`bounds`] |

use std::collections::{BTreeMap, BTreeSet};

use lapin::types::{AMQPValue, ShortString};
use num_bigint::BigInt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::kit::{amqp::Seen, contract};

pub(crate) mod books;
pub(crate) mod bounds;

/// What a published message should come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// It settles its allocation, or is as good as the one that did. Only another such message may be in its way.
    Settles,
    /// It is refused for this reason.
    Refused(&'static str),
    /// It waits for its allocation.
    Waits,
    /// Anything, as long as it is accounted for.
    Any,
}

/// A published message.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) routing_key: String,
    pub(crate) body: Vec<u8>,
    pub(crate) expect: Expect,
}

/// Funds that came in.
#[derive(Clone, Debug)]
pub(crate) struct Deposit {
    pub(crate) client: Uuid,
    pub(crate) currency: String,
    pub(crate) quantity: String,
}

/// Funds that went out.
#[derive(Clone, Debug)]
pub(crate) struct Gone {
    /// The kind of the account that they left, and whose it is.
    pub(crate) kind: &'static str,
    pub(crate) owner: Uuid,
    pub(crate) currency: String,
    pub(crate) quantity: String,
}

/// Who reserves.
const INITIATED_BY: &str = "the auditor";

/// A reservation that was made.
#[derive(Clone, Debug)]
pub(crate) struct Reservation {
    pub(crate) id: Uuid,
    pub(crate) kind: &'static str,
    pub(crate) connection: Uuid,
    pub(crate) client: Uuid,
    pub(crate) currency: String,
    pub(crate) quantity: String,
    pub(crate) client_external_id: String,
    pub(crate) notes: Option<String>,
}

impl Reservation {
    /// As `allocation reserve` takes it.
    pub(crate) fn line(&self) -> String {
        let mut line = json!({
            "id": self.id,
            "type": self.kind,
            "connectionId": self.connection,
            "amount": {"currency": self.currency, "quantity": self.quantity},
            "clientExternalId": self.client_external_id,
            "initiatedBy": INITIATED_BY,
        });
        if let Some(notes) = &self.notes {
            line["notes"] = json!(notes);
        }
        line.to_string()
    }
}

/// Everything a test did to the books.
#[derive(Clone, Debug, Default)]
pub(crate) struct Story {
    pub(crate) deposits: Vec<Deposit>,
    /// Funds that went out to the world, but for what partners settle.
    pub(crate) gone: Vec<Gone>,
    pub(crate) reservations: Vec<Reservation>,
    pub(crate) sent: Vec<Sent>,
    /// What partners took along to another cell, where it is accounted for.
    pub(crate) taken_along: Vec<Sent>,
    /// Enterprise and public key, in hex.
    pub(crate) keys: Vec<(String, String)>,
    /// Only valid messages without rivals are published: none may be dead-lettered (I8).
    pub(crate) only_valid: bool,
    /// What had an effect is said again before the books are closed (I6).
    pub(crate) repeats: bool,
    /// Keys end while messages that they signed are judged. A change of a key counts from its COMMIT on, and is written with a
    /// moment before it; how far these two are apart, `settled ledger check --signatures` knows, which is asked instead (I9).
    pub(crate) keys_end: bool,
}

/// What was seen from outside, beside the database.
#[derive(Clone, Debug, Default)]
pub(crate) struct Observed {
    pub(crate) events: Vec<Seen>,
    pub(crate) dead: Vec<Seen>,
    /// What is left in the input queue.
    pub(crate) queued: Vec<Seen>,
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The id of the row that a dead letter with this content type has, as docs/dead-letters.md tells it.
pub(crate) fn dead_letter_id(
    routing_key: &str,
    body: &[u8],
    content_type: Option<&str>,
    user_id: Option<&str>,
) -> Uuid {
    let digest = sha256(body);
    let parts = [
        Some(routing_key.as_bytes()),
        Some(digest.as_slice()),
        content_type.map(str::as_bytes),
        None,
        user_id.map(str::as_bytes),
    ];
    // Neither made by nobody known, nor too large.
    let mut text = b"settled dead letter 2\0\0".to_vec();
    for part in parts {
        text.push(u8::from(part.is_some()));
        text.extend((part.unwrap_or_default().len() as u64).to_be_bytes());
        text.extend(part.unwrap_or_default());
    }
    Uuid::from_slice(&sha256(&text)[..16]).expect("sixteen bytes")
}

/// The id of an event, from what it is about.
pub(crate) fn event_id(name: &str) -> String {
    let namespace = Uuid::from_u128(0x6f1d_0c52_0e0b_5c7e_9a53_3c1c_8a2d_7f10);
    Uuid::new_v5(&namespace, name.as_bytes()).to_string()
}

/// What a published body says.
struct Said {
    enterprise: String,
    subject: Option<Uuid>,
    nonce: String,
    status: String,
    payload_digest: [u8; 32],
    /// What it leaves in the record: reason, the partner's own id, evaluation, approval, policy result.
    left: [Option<String>; 5],
}

/// A published message, read once.
struct Known<'a> {
    sent: &'a Sent,
    digest: [u8; 32],
    /// The digest in hex.
    hex: String,
    said: Option<Said>,
}

impl<'a> Known<'a> {
    fn read(sent: &'a Sent) -> Self {
        let digest = sha256(&sent.body);
        let said = || {
            let body: Value = serde_json::from_slice(&sent.body).ok()?;
            let (enterprise, rest) = sent.routing_key.split_once('.')?;
            let kind = rest.strip_suffix(".update")?;
            let text = |name: &str| body[name].as_str().map(str::to_owned);
            let partners = match kind {
                "allocation" => "partnersAllocationId",
                _ => "partnersDeallocationId",
            };
            Some(Said {
                enterprise: enterprise.to_owned(),
                subject: body[format!("{kind}Id")].as_str().and_then(|id| id.parse().ok()),
                nonce: text("nonce")?,
                status: text("status")?,
                payload_digest: sha256(text("payload")?.as_bytes()),
                left: [
                    text("rejectReason"),
                    text(partners),
                    text("evaluationId"),
                    text("pendingApprovalId"),
                    text("policyResult").map(|result| result.to_ascii_lowercase()),
                ],
            })
        };
        Self {
            sent,
            digest,
            hex: hex::encode(digest),
            said: said(),
        }
    }

    fn name(&self) -> String {
        format!("{} {} {:?}", self.sent.routing_key, self.hex, self.sent.expect)
    }
}

/// The same bytes published again are the same message.
fn distinct(story: &Story) -> Vec<Known<'_>> {
    let mut told = BTreeSet::new();
    let known = story.sent.iter().map(Known::read);
    known
        .filter(|known| told.insert((&known.sent.routing_key, known.digest)))
        .collect()
}

/// Where messages can be found.
struct Places {
    /// Enterprise and nonce of those that had an effect or repeat one, with both digests.
    settled: BTreeMap<(String, String), (Vec<u8>, Vec<u8>)>,
    parked: BTreeSet<(String, [u8; 32])>,
    dead: BTreeSet<(String, [u8; 32])>,
    queued: BTreeSet<(String, [u8; 32])>,
    /// Bodies that were taken and wait in the side room to be judged.
    held: BTreeSet<[u8; 32]>,
}

impl Places {
    async fn look(db: &Client, dead: &[Seen], queued: &[Seen]) -> Self {
        let sql = "SELECT enterprise_id, nonce, payload_digest, message_digest
                   FROM settled.receipts WHERE verdict IN ('settled', 'duplicate')";
        let rows = db.query(sql, &[]).await.expect("receipts");
        let settled = rows
            .iter()
            .map(|row| ((row.get(0), row.get(1)), (row.get(2), row.get(3))))
            .collect();
        let rows = db
            .query("SELECT routing_key, body FROM settled.parked", &[])
            .await
            .expect("parked");
        let parked = rows.iter().map(|row| (row.get(0), sha256(row.get(1)))).collect();
        let rows = db.query("SELECT digests FROM settled.held", &[]).await.expect("held");
        let held = rows
            .iter()
            .flat_map(|row| {
                let (digests, rest) = row.get::<_, &[u8]>(0).as_chunks::<32>();
                assert!(rest.is_empty(), "digests of held messages");
                digests.to_vec()
            })
            .collect();
        let at = |seen: &[Seen]| {
            let at = |seen: &Seen| (seen.routing_key.clone(), digest_of(seen));
            seen.iter().map(at).collect()
        };
        // A dead letter that was replayed is where its replay brought it.
        let sql = "SELECT routing_key, digest FROM settled.dead_letters WHERE state IN ('settled', 'parked')";
        let mut dead: BTreeSet<(String, [u8; 32])> = at(dead);
        for row in db.query(sql, &[]).await.expect("dead letters") {
            let digest: &[u8] = row.get(1);
            dead.remove(&(row.get(0), digest.try_into().expect("a digest")));
        }
        Self {
            settled,
            parked,
            dead,
            queued: at(queued),
            held,
        }
    }

    /// Where a message is. It should be in one place exactly. What waits to be judged is in that place only if it is in no
    /// other: a copy may wait there of what was settled, and its acknowledgement lost.
    fn of(&self, known: &Known<'_>) -> Vec<&'static str> {
        let sent = known.sent;
        let at = (sent.routing_key.clone(), known.digest);
        let settled = known.said.as_ref().is_some_and(|said| {
            let receipt = self.settled.get(&(said.enterprise.clone(), said.nonce.clone()));
            receipt.is_some_and(|(payload, message)| match sent.expect {
                // Other bytes around the same signed text are the same message once its signature holds.
                Expect::Settles | Expect::Any => payload.as_slice() == said.payload_digest,
                Expect::Refused(_) | Expect::Waits => message.as_slice() == known.digest,
            })
        });
        let places = [
            (settled, "settled"),
            (self.parked.contains(&at), "parked"),
            (self.dead.contains(&at), "dead"),
        ];
        let mut places: Vec<&'static str> = places
            .into_iter()
            .filter_map(|(is, place)| is.then_some(place))
            .collect();
        if places.is_empty() && self.queued.contains(&at) {
            places.push("queued");
        }
        if places.is_empty() && self.held.contains(&known.digest) {
            places.push("held");
        }
        places
    }
}

/// How many of these messages have their effect in these books.
pub(crate) async fn settled_of(db: &Client, story: &Story) -> usize {
    let places = Places::look(db, &[], &[]).await;
    let known = distinct(story).into_iter();
    known.filter(|known| places.of(known) == ["settled"]).count()
}

/// What is not at rest yet (I7); empty at rest.
pub(crate) async fn unrest(db: &Client, story: &Story, dead: &[Seen]) -> Vec<String> {
    let mut problems = Vec::new();
    let places = Places::look(db, dead, &[]).await;
    let waiting: BTreeSet<Uuid> = story.reservations.iter().map(|reservation| reservation.id).collect();
    for known in distinct(story) {
        let at = places.of(&known);
        let subject = known.said.as_ref().and_then(|said| said.subject);
        let is_over = match at.as_slice() {
            [] => false,
            // One whose allocation is there has yet to be woken.
            ["held"] => false,
            ["parked"] => !subject.is_some_and(|id| waiting.contains(&id)),
            _ => true,
        };
        if !is_over {
            problems.push(format!("I7: not yet accounted for: {} {at:?}", known.name()));
        }
    }
    problems.truncate(5);
    // What was done to a partner waits for the next worker, and there may be none: cases::notices.
    let rows = db
        .query("SELECT count(*) FROM settled.outbox WHERE format <> 3", &[])
        .await
        .expect("outbox");
    let outbox: i64 = rows.first().map_or(0, |row| row.get(0));
    if outbox > 0 {
        problems.push(format!("I7: {outbox} rows in the outbox"));
    }
    problems
}

/// Everything that is wrong while no worker is running.
pub(crate) async fn audit(db: &Client, story: &Story, observed: &Observed) -> Vec<String> {
    let known = distinct(story);
    let mut audit = Audit {
        story,
        known: &known,
        observed,
        refused_again: refused_again(db).await,
        records: records(db).await,
        places: Places::look(db, &observed.dead, &observed.queued).await,
        problems: Vec::new(),
    };
    audit.check_places();
    audit.check_valid();
    audit.check_records();
    audit.check_balances(&balances(db).await);
    audit.check_settlement_events();
    audit.check_nonces();
    audit.check_refusal_events();
    audit.check_copies();
    let mut problems = audit.problems;
    let ledger = books::ledger(db).await.into_iter();
    problems.extend(ledger.filter(|problem| !story.keys_end || !problem.starts_with(books::BY_AN_ENDED_KEY)));
    problems.extend(books::authority(db, story).await);
    problems.extend(books::batches(db, story, observed).await);
    let mut told = story.clone();
    told.sent.extend(told.taken_along.clone());
    problems.extend(check_parked_events(db, &distinct(&told), &observed.events).await);
    problems.extend(check_strangers(db, &known).await);
    problems
}

/// The messages whose bytes had an effect: said again, each must be a duplicate.
pub(crate) async fn effective(db: &Client, story: &Story) -> Vec<Sent> {
    let sql = "SELECT message_digest FROM settled.receipts WHERE verdict = 'settled'";
    let rows = db.query(sql, &[]).await.expect("receipts");
    let settled: BTreeSet<Vec<u8>> = rows.iter().map(|row| row.get(0)).collect();
    let known = distinct(story).into_iter();
    known
        .filter(|known| settled.contains(known.digest.as_slice()))
        .map(|known| known.sent.clone())
        .collect()
}

/// An allocation as the database has it.
struct Record {
    id: Uuid,
    kind: String,
    status: String,
    connection: Uuid,
    client: Uuid,
    currency: String,
    quantity: String,
    client_external_id: String,
    initiated_by: String,
    notes: Option<String>,
    /// Reason, the partner's own id, evaluation, approval, policy result.
    left: [Option<String>; 5],
    /// What the partner called the currency.
    symbol: Option<String>,
    retriable: bool,
    nonce: Option<String>,
    created_at: String,
    updated_at: String,
    enterprise: String,
}

async fn records(db: &Client) -> BTreeMap<Uuid, Record> {
    let sql = "SELECT a.id, a.type, a.status, a.connection_id, a.client_id, a.currency, a.quantity::text,
                      a.client_external_id, a.initiated_by, a.notes,
                      a.reason, a.partner_external_id, a.evaluation_id, a.pending_approval_id, a.policy_result,
                      a.retriable, a.settled_nonce,
                      to_char(a.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'),
                      to_char(a.updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'),
                      c.enterprise_id, a.partner_symbol
               FROM settled.allocations AS a JOIN settled.connections AS c USING (connection_id)";
    let rows = db.query(sql, &[]).await.expect("allocations");
    let record = |row: &tokio_postgres::Row| Record {
        id: row.get(0),
        kind: row.get(1),
        status: row.get(2),
        connection: row.get(3),
        client: row.get(4),
        currency: row.get(5),
        quantity: row.get(6),
        client_external_id: row.get(7),
        initiated_by: row.get(8),
        notes: row.get(9),
        left: [10, 11, 12, 13, 14].map(|column| row.get(column)),
        retriable: row.get(15),
        nonce: row.get(16),
        created_at: row.get(17),
        updated_at: row.get(18),
        enterprise: row.get(19),
        symbol: row.get(20),
    };
    rows.iter().map(|row| (row.get(0), record(row))).collect()
}

impl Record {
    /// Whether it says what was reserved.
    fn is_of(&self, reservation: &Reservation) -> bool {
        let Reservation {
            id,
            kind,
            connection,
            client,
            currency,
            quantity,
            client_external_id,
            notes,
        } = reservation;
        (&self.id, self.kind.as_str(), &self.connection, &self.client) == (id, *kind, connection, client)
            && (&self.currency, &self.quantity) == (currency, quantity)
            && (&self.client_external_id, &self.notes) == (client_external_id, notes)
            && self.initiated_by == INITIATED_BY
    }

    /// The body of its event.
    fn event(&self, source: &Value) -> Value {
        let kind = format!("{}.{}", self.kind, self.status);
        let [
            reason,
            partner_external_id,
            evaluation_id,
            pending_approval_id,
            policy_result,
        ] = &self.left;
        let mut allocation = json!({
            "id": self.id,
            "amount": {"currency": self.currency, "quantity": self.quantity},
            "connectionId": self.connection,
            "clientExternalId": self.client_external_id,
            "initiatedBy": self.initiated_by,
            "createdAt": self.created_at,
            "updatedAt": self.updated_at,
            "retriable": self.retriable,
            "reason": reason,
            "status": self.status,
            "type": self.kind,
        });
        for (name, value) in [
            ("partnerExternalId", partner_external_id),
            ("partnerSymbol", &self.symbol),
            ("notes", &self.notes),
            ("evaluationId", evaluation_id),
            ("pendingApprovalId", pending_approval_id),
            ("policyResult", policy_result),
        ] {
            if let Some(value) = value {
                allocation[name] = json!(value);
            }
        }
        json!({
            "specversion": "1.0",
            "id": event_id(&format!("{kind}|{}", self.id)),
            "source": source,
            "type": kind,
            "subject": self.id,
            "time": self.updated_at,
            "datacontenttype": "application/json",
            "data": {
                "allocation": allocation,
                "enterpriseId": self.enterprise,
                "clientId": self.client,
                "nonce": self.nonce,
            },
        })
    }
}

/// Kind, owner and currency of an account.
type Account = (&'static str, Option<Uuid>, String);

async fn balances(db: &Client) -> BTreeMap<Account, BigInt> {
    let sql = "SELECT kind, owner, currency, balance::text FROM settled.accounts WHERE balance <> 0";
    let rows = db.query(sql, &[]).await.expect("accounts");
    let kind = |name: &str| {
        ["external", "available", "held", "allocated"]
            .into_iter()
            .find(|kind| *kind == name)
    };
    rows.iter()
        .map(|row| {
            (
                (kind(row.get(0)).unwrap_or("?"), row.get(1), row.get(2)),
                number(row.get(3)),
            )
        })
        .collect()
}

fn number(text: &str) -> BigInt {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

struct Audit<'a> {
    story: &'a Story,
    known: &'a [Known<'a>],
    observed: &'a Observed,
    records: BTreeMap<Uuid, Record>,
    places: Places,
    problems: Vec<String>,
    /// Replayed dead letters that were refused anew: routing key, digest, reason.
    refused_again: BTreeSet<(String, String, String)>,
}

impl Audit<'_> {
    fn blame(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// Every message is in one place, the one that was expected; nothing is anywhere that was not published.
    fn check_places(&mut self) {
        for known in self.known {
            let at = self.places.of(known);
            let [place] = at.as_slice() else {
                self.blame(format!("I3: {}: is in {at:?} instead of one place", known.name()));
                continue;
            };
            let reasons = self.reasons_of(known);
            let fine = match known.sent.expect {
                Expect::Any => true,
                _ if matches!(*place, "queued" | "held") => true,
                Expect::Waits => *place == "parked",
                Expect::Refused(reason) => *place == "dead" && reasons.iter().all(|given| given == reason),
                Expect::Settles => {
                    *place == "settled"
                        || *place == "dead" && reasons.iter().all(|reason| self.has_rival(known, reason))
                }
            };
            if !fine {
                self.blame(format!("I3: {}: is {place} {reasons:?}", known.name()));
            }
        }
        let published: BTreeSet<(&str, [u8; 32])> = self
            .known
            .iter()
            .map(|known| (known.sent.routing_key.as_str(), known.digest))
            .collect();
        let of_nobody = |places: &BTreeSet<(String, [u8; 32])>, what: &str| {
            let strange = places
                .iter()
                .filter(|(key, digest)| !published.contains(&(key.as_str(), *digest)));
            strange
                .map(|(key, _)| format!("I3: {what} that nobody published: {key}"))
                .collect::<Vec<_>>()
        };
        let dead = of_nobody(&self.places.dead, "a dead letter of a message");
        let parked = of_nobody(&self.places.parked, "a parked message");
        self.problems.extend(dead.into_iter().chain(parked));
    }

    /// Of valid traffic nothing is dead-lettered, by us or by the broker.
    fn check_valid(&mut self) {
        if !self.story.only_valid {
            return;
        }
        let invalid = |known: &&Known<'_>| matches!(known.sent.expect, Expect::Refused(_) | Expect::Any);
        if let Some(known) = self.known.iter().find(invalid) {
            self.blame(format!("I8: {} is not valid traffic", known.name()));
        }
        let dead = self.observed.dead.iter();
        let dead = dead.map(|seen| format!("I8: valid, and dead-lettered: {} {}", seen.routing_key, reason_of(seen)));
        let dead: Vec<String> = dead.collect();
        self.problems.extend(dead);
    }

    /// The reasons its dead letters give.
    fn reasons_of(&self, known: &Known<'_>) -> BTreeSet<String> {
        let dead = self.observed.dead.iter();
        dead.filter(|seen| seen.routing_key == known.sent.routing_key && seen.body == known.sent.body)
            .map(reason_of)
            .collect()
    }

    /// Whether another valid message may have come before it: for the same allocation, or with the same nonce.
    fn has_rival(&self, known: &Known<'_>, reason: &str) -> bool {
        let Some(said) = &known.said else {
            return false;
        };
        let others = self.known.iter().filter(|other| other.digest != known.digest);
        let mut rivals = others
            .filter(|other| other.sent.expect == Expect::Settles)
            .filter_map(|other| other.said.as_ref());
        match reason {
            "already_settled" => rivals.any(|other| other.subject == said.subject),
            "nonce_reused" => rivals.any(|other| (&other.enterprise, &other.nonce) == (&said.enterprise, &said.nonce)),
            _ => false,
        }
    }

    /// Whether it lost its nonce to another message, and so said nothing of its allocation.
    fn lost_its_nonce(&self, known: &Known<'_>) -> bool {
        let reasons = self.reasons_of(known);
        !reasons.is_empty() && reasons.iter().all(|reason| reason == "nonce_reused")
    }

    /// Every reservation is there as it was made, and left `reserved` only by the word of a message that may settle it; and
    /// what the record says of its outcome is what that message said.
    fn check_records(&mut self) {
        let mut problems = Vec::new();
        let mut by_subject: BTreeMap<Uuid, Vec<(&Known<'_>, &Said)>> = BTreeMap::new();
        for known in self.known {
            if let Some(said) = &known.said
                && let Some(subject) = said.subject
            {
                by_subject.entry(subject).or_default().push((known, said));
            }
        }
        for reservation in &self.story.reservations {
            let Some(record) = self.records.get(&reservation.id) else {
                problems.push(format!("I1: the reservation {} is gone", reservation.id));
                continue;
            };
            if !record.is_of(reservation) || record.retriable {
                problems.push(format!("I1: the reservation {} has changed", reservation.id));
            }
            let words = by_subject.get(&reservation.id).into_iter().flatten();
            let words: Vec<(&Known<'_>, &Said)> = words
                .filter(|(known, _)| matches!(known.sent.expect, Expect::Settles | Expect::Any))
                .filter(|(_, said)| said.enterprise == record.enterprise)
                .copied()
                .collect();
            if record.status == "reserved" {
                let unheard = words.iter().find(|(known, _)| {
                    known.sent.expect == Expect::Settles
                        && !matches!(*self.places.of(known), ["queued" | "held"])
                        && !self.lost_its_nonce(known)
                });
                if let Some((known, _)) = unheard {
                    let (id, name) = (record.id, known.name());
                    problems.push(format!(
                        "I1: {id} is still reserved, although a valid message came: {name}"
                    ));
                }
                if record.nonce.is_some() || record.left[0].as_deref() != Some("awaiting the partner's update") {
                    problems.push(format!("I1: the reservation {} has changed", reservation.id));
                }
                continue;
            }
            let said = words
                .iter()
                .filter(|(_, said)| Some(&said.nonce) == record.nonce.as_ref());
            if !said
                .clone()
                .any(|(_, said)| said.status == record.status && said.left == record.left)
            {
                problems.push(format!(
                    "I1: {} is {} by nonce {:?} and has {:?}, which says {:?}",
                    record.id,
                    record.status,
                    record.nonce,
                    record.left,
                    said.map(|(_, said)| (&said.status, &said.left)).collect::<Vec<_>>()
                ));
            }
        }
        if self.records.len() != self.story.reservations.len() {
            let (have, made) = (self.records.len(), self.story.reservations.len());
            problems.push(format!("I1: {have} allocations in the database, {made} were reserved"));
        }
        self.problems.extend(problems);
    }

    /// The balances are those that the deposits, the reservations and the outcomes come to.
    fn check_balances(&mut self, found: &BTreeMap<Account, BigInt>) {
        let mut expected: BTreeMap<Account, BigInt> = BTreeMap::new();
        let mut movement = |from: Account, to: Account, quantity: &str| {
            *expected.entry(from).or_default() -= number(quantity);
            *expected.entry(to).or_default() += number(quantity);
        };
        for deposit in &self.story.deposits {
            let currency = || deposit.currency.clone();
            let from = ("external", None, currency());
            movement(from, ("available", Some(deposit.client), currency()), &deposit.quantity);
        }
        for gone in &self.story.gone {
            let from = (gone.kind, Some(gone.owner), gone.currency.clone());
            movement(from, ("external", None, gone.currency.clone()), &gone.quantity);
        }
        for reservation in &self.story.reservations {
            let account = |kind: &'static str| {
                let owner = if kind == "available" {
                    reservation.client
                } else {
                    reservation.connection
                };
                (kind, Some(owner), reservation.currency.clone())
            };
            let (source, goal) = match reservation.kind {
                "allocation" => ("available", "allocated"),
                _ => ("allocated", "available"),
            };
            movement(account(source), account("held"), &reservation.quantity);
            match self.records.get(&reservation.id).map(|record| record.status.as_str()) {
                Some("cleared") => movement(account("held"), account(goal), &reservation.quantity),
                Some("released") => movement(account("held"), account(source), &reservation.quantity),
                _ => {}
            }
        }
        let zero = BigInt::default();
        expected.retain(|_, balance| *balance != zero);
        if expected != *found {
            self.blame(format!("I2: the balances are {found:?}, they should be {expected:?}"));
        }
    }

    /// One id and the same bytes for each effect, at least one copy, and none without an effect.
    fn check_settlement_events(&mut self) {
        let mut problems = Vec::new();
        let mut told: BTreeMap<Uuid, &Seen> = BTreeMap::new();
        for seen in &self.observed.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            let kind = event["type"].as_str().unwrap_or("?");
            // What is told of a partner itself is no settlement.
            if kind.starts_with("update.") || contract::is_of_a_partner(&event) {
                continue;
            }
            let subject: Option<Uuid> = event["subject"].as_str().and_then(|id| id.parse().ok());
            let Some(record) = subject.and_then(|id| self.records.get(&id)) else {
                problems.push(format!("I4: an event of nothing we know: {kind} {}", event["subject"]));
                continue;
            };
            let id = record.id;
            if let Some(first) = told.insert(id, seen)
                && (first.body != seen.body || first.message_id() != seen.message_id())
            {
                problems.push(format!("I4: two copies of the event of {id} differ"));
            }
            if record.status == "reserved" {
                problems.push(format!(
                    "I4: an event without its effect: {id} is reserved, and told to be {kind}"
                ));
                continue;
            }
            let expected = record.event(&event["source"]);
            if event != expected {
                problems.push(format!("I4: the event of {id} is {event}, not {expected}"));
            }
            let key = format!("{kind}.{}", record.enterprise);
            if seen.routing_key != key || seen.message_id() != expected["id"].as_str() || !is_event(seen) {
                problems.push(format!(
                    "I4: the event of {id} has other properties than it should: {seen:?}"
                ));
            }
        }
        for record in self.records.values() {
            if record.status != "reserved" && !told.contains_key(&record.id) {
                problems.push(format!("I4: {} is {} and nobody was told", record.id, record.status));
            }
        }
        self.problems.extend(problems);
    }

    /// No nonce of a partner stands for two effects, as subscribers were told.
    fn check_nonces(&mut self) {
        let mut effects: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for seen in &self.observed.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            if !text(&event["type"]).starts_with("update.") && !contract::is_of_a_partner(&event) {
                let by = (text(&event["data"]["enterpriseId"]), text(&event["data"]["nonce"]));
                effects.entry(by).or_default().insert(text(&event["subject"]));
            }
        }
        let twice = effects.iter().filter(|(_, subjects)| subjects.len() > 1);
        let twice = twice.map(|(by, subjects)| format!("I5: one nonce settled twice: {by:?} {subjects:?}"));
        self.problems.extend(twice);
    }

    /// Every copy of an event of a refusal or a parking is the same, whichever copy of the message it answers.
    fn check_copies(&mut self) {
        let mut told = BTreeMap::<String, &Seen>::new();
        let mut problems = Vec::new();
        for seen in &self.observed.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            if !event["type"].as_str().is_some_and(|kind| kind.starts_with("update.")) {
                continue;
            }
            let id = event["id"].as_str().unwrap_or_default();
            let first = told.entry(id.to_owned()).or_insert(seen);
            if first.body != seen.body || first.routing_key != seen.routing_key {
                let texts = [first.body.as_slice(), seen.body.as_slice()].map(String::from_utf8_lossy);
                problems.push(format!("I4: two copies of {id} differ: {} and {}", texts[0], texts[1]));
            }
        }
        self.problems.extend(problems);
    }

    /// Each dead letter has its event, and each such event its dead letter; both say what the reason means.
    fn check_refusal_events(&mut self) {
        let mut told = BTreeSet::new();
        let mut problems = Vec::new();
        for seen in &self.observed.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            if event["type"] != "update.rejected" {
                continue;
            }
            let data = &event["data"];
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let (id, digest, reason) = (text(&event["id"]), text(&data["messageDigest"]), text(&data["reason"]));
            let enterprise = data["enterpriseId"].as_str().map(|id| format!(".{id}"));
            let key = format!("update.rejected{}", enterprise.unwrap_or_default());
            if seen.routing_key != key || !is_event(seen) {
                problems.push(format!("I4: a rejection has other properties than it should: {seen:?}"));
            }
            let meaning = meaning_of(&reason).map(|(class, is_final)| (json!(class), json!(is_final)));
            if meaning != Some((data["class"].clone(), data["final"].clone())) || !data["detail"].is_string() {
                problems.push(format!("I4: a rejection does not say what its reason means: {data}"));
            }
            let keys: BTreeSet<&str> = self
                .known
                .iter()
                .filter(|known| known.hex == digest)
                .map(|known| known.sent.routing_key.as_str())
                .collect();
            let key = keys
                .iter()
                .find(|key| event_id(&format!("update.rejected|{key}|{digest}|{reason}")) == id);
            match key {
                Some(key) if seen.message_id() == Some(id.as_str()) => {
                    told.insert(((*key).to_owned(), digest, reason));
                }
                Some(_) | None => {
                    problems.push(format!("I4: a rejection with an id of its own: {id} {reason} {digest}"))
                }
            }
        }
        let mut dead = BTreeSet::new();
        for seen in &self.observed.dead {
            let (reason, digest) = (reason_of(seen), hex::encode(digest_of(seen)));
            let is_ours = !is_by_broker(seen);
            let whole = self.known.iter().find(|known| known.hex == digest);
            let is_message = whole.is_none_or(|known| is_all_or_head(seen, &known.sent.body, &reason));
            if is_ours && !(is_dead_letter(seen, &reason, &digest) && is_message) {
                problems.push(format!(
                    "I4: a dead letter does not say what its reason means: {seen:?}"
                ));
            }
            dead.insert((seen.routing_key.clone(), digest, reason));
        }
        // A replay that is refused is told, and is no second dead letter.
        dead.extend(self.refused_again.iter().cloned());
        for missing in dead.difference(&told) {
            problems.push(format!("I4: a dead letter without its event: {missing:?}"));
        }
        for missing in told.difference(&dead) {
            problems.push(format!("I4: a rejection without its dead letter: {missing:?}"));
        }
        self.problems.extend(problems);
    }
}

/// What replays were refused for, as their runs have it, and the rows of those that waited in between.
async fn refused_again(db: &Client) -> BTreeSet<(String, String, String)> {
    let sql = "SELECT d.routing_key, encode(d.digest, 'hex'), i.reason
               FROM settled.run_items AS i JOIN settled.dead_letters AS d ON d.id = i.dead_letter_id
               WHERE i.verdict = 'rejected'
               UNION
               SELECT routing_key, encode(digest, 'hex'), reason FROM settled.dead_letters WHERE verdict = 'rejected'";
    let rows = db.query(sql, &[]).await.expect("replays");
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

/// Of the dead letters that were published each is a row, once none waits to be collected; and no row is of anything else.
pub(crate) async fn uncollected(db: &Client, dead: &[Seen]) -> Vec<String> {
    let published: BTreeSet<(String, Vec<u8>)> = dead
        .iter()
        .map(|seen| (seen.routing_key.clone(), digest_of(seen).to_vec()))
        .collect();
    let sql = "SELECT routing_key, digest FROM settled.dead_letters";
    let rows = db.query(sql, &[]).await.expect("dead letters");
    let stored: BTreeSet<(String, Vec<u8>)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let name = |(key, digest): &(String, Vec<u8>)| format!("{key} {}", hex::encode(digest));
    let lost = published.difference(&stored);
    let lost = lost.map(|letter| format!("I3: a dead letter was taken and not stored: {}", name(letter)));
    let made = stored.difference(&published);
    lost.chain(made.map(|letter| format!("I3: a dead letter is stored that never was: {}", name(letter))))
        .take(5)
        .collect()
}

/// Class and finality of each reason.
const MEANINGS: [(&str, i64, bool); 22] = [
    ("message_too_large", 400, true),
    ("malformed_message", 400, true),
    ("invalid_field", 400, true),
    ("unknown_partner", 401, false),
    ("sender_mismatch", 403, false),
    ("malformed_signature", 401, true),
    ("signature_mismatch", 401, false),
    ("payload_mismatch", 400, true),
    ("nonce_voided", 409, true),
    ("nonce_reused", 409, true),
    ("expired_update", 408, true),
    ("policy_contradiction", 400, false),
    ("partner_inactive", 403, false),
    ("allocation_not_found", 404, false),
    ("not_permitted", 403, true),
    ("currency_unmapped", 500, false),
    ("currency_mismatch", 409, false),
    ("allocation_mismatch", 409, true),
    ("already_settled", 409, true),
    ("delivery_limit", 500, false),
    ("expired", 408, false),
    ("internal", 500, false),
];

fn meaning_of(reason: &str) -> Option<(i64, bool)> {
    let meaning = MEANINGS.iter().find(|(name, _, _)| *name == reason);
    meaning.map(|(_, class, is_final)| (*class, *is_final))
}

/// Whether a message has an event's properties.
fn is_event(seen: &Seen) -> bool {
    let kind = seen.properties.content_type().as_ref().map(ShortString::as_str);
    kind == Some("application/cloudevents+json") && *seen.properties.delivery_mode() == Some(2)
}

/// Whether a dead letter of ours has the headers that its reason and its body give it.
fn is_dead_letter(seen: &Seen, reason: &str, digest: &str) -> bool {
    let meaning = match (seen.header("settled-class"), seen.header("settled-final")) {
        (Some(AMQPValue::LongLongInt(class)), Some(AMQPValue::Boolean(is_final))) => Some((*class, *is_final)),
        _ => None,
    };
    meaning.is_some()
        && meaning == meaning_of(reason)
        && seen.text("settled-digest").as_deref() == Some(digest)
        && seen.text("settled-origin-routing-key").as_ref() == Some(&seen.routing_key)
        && seen.text("settled-detail").is_some()
        && seen.text("settled-failed-at").is_some()
        && *seen.properties.delivery_mode() == Some(2)
}

/// The digest of the message that a dead letter is of: of what was too large only the head is there.
pub(crate) fn digest_of(seen: &Seen) -> [u8; 32] {
    let cut = (!is_by_broker(seen))
        .then(|| seen.header("settled-body-length"))
        .flatten();
    let said = || hex::decode(seen.text("settled-digest")?).ok()?.try_into().ok();
    cut.and_then(|_| said()).unwrap_or_else(|| sha256(&seen.body))
}

/// Whether a dead letter of ours has the message's bytes: all of them, or the head of what was too large.
fn is_all_or_head(seen: &Seen, body: &[u8], reason: &str) -> bool {
    if reason != "message_too_large" {
        return seen.body == body && seen.header("settled-body-length").is_none();
    }
    let length = i64::try_from(body.len()).map(AMQPValue::LongLongInt).ok();
    seen.body == body[..body.len().min(4_096)] && seen.header("settled-body-length") == length.as_ref()
}

/// Whether the broker dead-lettered it, from an input queue.
pub(crate) fn is_by_broker(seen: &Seen) -> bool {
    seen.death()
        .is_some_and(|(queue, _)| queue.starts_with("settlement.updates"))
}

/// Why a dead letter is one. The broker's own say so in their first death.
fn reason_of(seen: &Seen) -> String {
    match seen.death() {
        Some((queue, reason)) if queue.starts_with("settlement.updates") => match reason.as_str() {
            "rejected" => "message_too_large".to_owned(),
            "delivery_limit" | "expired" => reason,
            _ => format!("?{reason}"),
        },
        Some(_) | None => seen.text("settled-reason").unwrap_or_else(|| "?".to_owned()),
    }
}

/// What was parked was told, and what was told was parked.
async fn check_parked_events(db: &Client, known: &[Known<'_>], events: &[Seen]) -> Vec<String> {
    let rows = db
        .query("SELECT DISTINCT key FROM settled.parkings WHERE step = 'parked'", &[])
        .await;
    let parked: BTreeSet<Uuid> = rows.expect("parkings").iter().map(|row| row.get(0)).collect();
    let told: BTreeSet<String> = events
        .iter()
        .filter_map(|seen| seen.message_id().map(str::to_owned))
        .collect();
    let mut explained = BTreeSet::new();
    let mut problems = Vec::new();
    let mut reported = BTreeSet::new();
    for known in known {
        let Some(said) = &known.said else {
            continue;
        };
        let name = [said.enterprise.as_bytes(), &[0], said.nonce.as_bytes()].concat();
        let mut head = [0; 16];
        head.copy_from_slice(sha256(&name).split_at(16).0);
        let key = Uuid::from_bytes(head);
        let (key_of, digest) = (&known.sent.routing_key, &known.hex);
        let id = event_id(&format!("update.parked|{key_of}|{digest}|allocation_not_found"));
        if told.contains(&id) {
            reported.insert(id);
            if parked.contains(&key) {
                explained.insert(key);
            } else {
                problems.push(format!("I4: it was told that {} waits, and it never did", known.name()));
            }
        }
    }
    for key in parked.difference(&explained) {
        problems.push(format!("I4: a message was parked ({key}) and nobody was told"));
    }
    for seen in events {
        let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        if event["type"] == "update.parked" && !reported.contains(seen.message_id().unwrap_or_default()) {
            problems.push(format!("I4: a parking of nothing that was published: {}", event["id"]));
        }
    }
    problems
}

/// Nothing that a stranger sends touches the receipts.
async fn check_strangers(db: &Client, known: &[Known<'_>]) -> Vec<String> {
    const UNPROVEN: [&str; 8] = [
        "message_too_large",
        "malformed_message",
        "invalid_field",
        "unknown_partner",
        "sender_mismatch",
        "malformed_signature",
        "signature_mismatch",
        "payload_mismatch",
    ];
    let rows = db
        .query("SELECT message_digest FROM settled.receipts", &[])
        .await
        .expect("receipts");
    let receipts: BTreeSet<Vec<u8>> = rows.iter().map(|row| row.get(0)).collect();
    known
        .iter()
        .filter(|known| matches!(known.sent.expect, Expect::Refused(reason) if UNPROVEN.contains(&reason)))
        .filter(|known| receipts.contains(known.digest.as_slice()))
        .map(|known| format!("I9: a stranger's message left a receipt: {}", known.name()))
        .collect()
}
