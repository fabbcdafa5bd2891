//! The books, checked from outside: by SQL, by what subscribers recorded, and by what was published. What they should be is
//! computed here from the published messages alone; the program's own rules are asked nothing.

use std::collections::{BTreeMap, BTreeSet};

use num_bigint::BigInt;
use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{amqp::Seen, partner};

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
            "initiatedBy": "the auditor",
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
    pub(crate) reservations: Vec<Reservation>,
    pub(crate) sent: Vec<Sent>,
    /// Enterprise and public key, in hex.
    pub(crate) keys: Vec<(String, String)>,
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
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
            let subject = format!("{}Id", rest.strip_suffix(".update")?);
            Some(Said {
                enterprise: enterprise.to_owned(),
                subject: body[&subject].as_str().and_then(|id| id.parse().ok()),
                nonce: body["nonce"].as_str()?.to_owned(),
                status: body["status"].as_str()?.to_owned(),
                payload_digest: sha256(body["payload"].as_str()?.as_bytes()),
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
}

impl Places {
    async fn look(db: &Client, dead: &[Seen]) -> Self {
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
        let dead = dead
            .iter()
            .map(|seen| (seen.routing_key.clone(), sha256(&seen.body)))
            .collect();
        Self { settled, parked, dead }
    }

    /// Where a message is. It should be in one place exactly.
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
        places
            .into_iter()
            .filter_map(|(is, place)| is.then_some(place))
            .collect()
    }
}

/// What is not at rest yet; empty at rest.
pub(crate) async fn unrest(db: &Client, story: &Story, dead: &[Seen]) -> Vec<String> {
    let mut problems = Vec::new();
    let places = Places::look(db, dead).await;
    let waiting: BTreeSet<Uuid> = story.reservations.iter().map(|reservation| reservation.id).collect();
    for known in distinct(story) {
        let at = places.of(&known);
        let subject = known.said.as_ref().and_then(|said| said.subject);
        let is_over = match at.as_slice() {
            [] => false,
            // One whose allocation is there has yet to be woken.
            ["parked"] => !subject.is_some_and(|id| waiting.contains(&id)),
            _ => true,
        };
        if !is_over {
            problems.push(format!("not yet accounted for: {} {at:?}", known.name()));
        }
    }
    problems.truncate(5);
    let rows = db
        .query("SELECT count(*) FROM settled.outbox", &[])
        .await
        .expect("outbox");
    let outbox: i64 = rows.first().map_or(0, |row| row.get(0));
    if outbox > 0 {
        problems.push(format!("{outbox} rows in the outbox"));
    }
    problems
}

/// Everything that is wrong, at rest and with no worker running.
pub(crate) async fn audit(db: &Client, story: &Story, events: &[Seen], dead: &[Seen]) -> Vec<String> {
    let known = distinct(story);
    let mut audit = Audit {
        story,
        known: &known,
        events,
        dead,
        records: records(db).await,
        places: Places::look(db, dead).await,
        problems: Vec::new(),
    };
    let db_books = books(db).await;
    audit.check_places();
    audit.check_records();
    audit.check_balances(&db_books);
    audit.check_settlement_events();
    audit.check_refusal_events();
    let mut problems = audit.problems;
    problems.extend(check_ledger(db).await);
    problems.extend(check_authority(db, story).await);
    problems.extend(check_batches(db, known.len()).await);
    problems.extend(check_parked_events(db, &known, events).await);
    problems.extend(check_strangers(db, &known).await);
    problems.extend(unrest(db, story, dead).await);
    problems
}

/// An allocation as the database has it.
struct Record {
    id: Uuid,
    kind: String,
    status: String,
    reason: Option<String>,
    partner_external_id: Option<String>,
    nonce: Option<String>,
    updated_at: String,
    enterprise: String,
    currency: String,
    quantity: String,
}

async fn records(db: &Client) -> BTreeMap<Uuid, Record> {
    let sql = "SELECT a.id, a.type, a.status, a.reason, a.partner_external_id, a.settled_nonce,
                      to_char(a.updated_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'),
                      c.enterprise_id, a.currency, a.quantity::text
               FROM settled.allocations AS a JOIN settled.connections AS c USING (connection_id)";
    let rows = db.query(sql, &[]).await.expect("allocations");
    let record = |row: &tokio_postgres::Row| Record {
        id: row.get(0),
        kind: row.get(1),
        status: row.get(2),
        reason: row.get(3),
        partner_external_id: row.get(4),
        nonce: row.get(5),
        updated_at: row.get(6),
        enterprise: row.get(7),
        currency: row.get(8),
        quantity: row.get(9),
    };
    rows.iter().map(|row| (row.get(0), record(row))).collect()
}

/// Kind, owner and currency of an account.
type Account = (&'static str, Option<Uuid>, String);

async fn books(db: &Client) -> BTreeMap<Account, BigInt> {
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
    events: &'a [Seen],
    dead: &'a [Seen],
    records: BTreeMap<Uuid, Record>,
    places: Places,
    problems: Vec<String>,
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
                self.blame(format!("{}: is in {at:?} instead of one place", known.name()));
                continue;
            };
            let reasons = self.reasons_of(known);
            let fine = match known.sent.expect {
                Expect::Any => true,
                Expect::Waits => *place == "parked",
                Expect::Refused(reason) => *place == "dead" && reasons.iter().all(|given| given == reason),
                Expect::Settles => {
                    *place == "settled"
                        || *place == "dead"
                            && self.has_rival(known)
                            && reasons
                                .iter()
                                .all(|reason| reason == "already_settled" || reason == "nonce_reused")
                }
            };
            if !fine {
                self.blame(format!("{}: is {place} {reasons:?}", known.name()));
            }
        }
        let published: BTreeSet<(&str, [u8; 32])> = self
            .known
            .iter()
            .map(|known| (known.sent.routing_key.as_str(), known.digest))
            .collect();
        let is_known = |key: &str, digest| published.contains(&(key, digest));
        let dead = self
            .dead
            .iter()
            .filter(|seen| !is_known(&seen.routing_key, sha256(&seen.body)));
        let dead = dead.map(|seen| format!("a dead letter of a message that nobody published: {}", seen.routing_key));
        let parked = self
            .places
            .parked
            .iter()
            .filter(|(key, digest)| !is_known(key, *digest));
        let parked = parked.map(|(key, _)| format!("a parked message that nobody published: {key}"));
        self.problems.extend(dead.chain(parked));
    }

    /// The reasons its dead letters give.
    fn reasons_of(&self, known: &Known<'_>) -> BTreeSet<String> {
        self.dead
            .iter()
            .filter(|seen| seen.routing_key == known.sent.routing_key && seen.body == known.sent.body)
            .map(reason_of)
            .collect()
    }

    /// Whether another valid message competes with it: for the allocation, or for the nonce.
    fn has_rival(&self, known: &Known<'_>) -> bool {
        let Some(said) = &known.said else {
            return false;
        };
        let others = self.known.iter().filter(|other| other.digest != known.digest);
        others
            .filter(|other| other.sent.expect == Expect::Settles)
            .any(|other| {
                other.said.as_ref().is_some_and(|other| {
                    other.subject == said.subject || (other.enterprise == said.enterprise && other.nonce == said.nonce)
                })
            })
    }

    /// Every reservation is there as it was made, and left `reserved` only by the word of a message that may settle it.
    fn check_records(&mut self) {
        let mut problems = Vec::new();
        for reservation in &self.story.reservations {
            let Some(record) = self.records.get(&reservation.id) else {
                problems.push(format!("the reservation {} is gone", reservation.id));
                continue;
            };
            let is_same = (record.kind.as_str(), record.currency.as_str(), record.quantity.as_str())
                == (
                    reservation.kind,
                    reservation.currency.as_str(),
                    reservation.quantity.as_str(),
                );
            if !is_same {
                problems.push(format!("the reservation {} has changed", reservation.id));
            }
            let words: Vec<(&Said, &Sent)> = self
                .known
                .iter()
                .filter(|known| matches!(known.sent.expect, Expect::Settles | Expect::Any))
                .filter_map(|known| Some((known.said.as_ref()?, known.sent)))
                .filter(|(said, _)| said.subject == Some(reservation.id) && said.enterprise == record.enterprise)
                .collect();
            let given = words
                .iter()
                .find(|(said, _)| Some(&said.nonce) == record.nonce.as_ref());
            match (record.status.as_str(), given) {
                ("reserved", None) => {
                    if words.iter().any(|(_, sent)| sent.expect == Expect::Settles) {
                        problems.push(format!(
                            "{} is still reserved, although a valid message came",
                            record.id
                        ));
                    }
                }
                (status, Some((said, _))) if said.status == status => {}
                (status, given) => problems.push(format!(
                    "{} is {status} by nonce {:?}, which says {:?}",
                    record.id,
                    record.nonce,
                    given.map(|(said, _)| &said.status)
                )),
            }
        }
        if self.records.len() != self.story.reservations.len() {
            let (have, made) = (self.records.len(), self.story.reservations.len());
            problems.push(format!("{have} allocations in the database, {made} were reserved"));
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
            self.blame(format!("the balances are {found:?}, they should be {expected:?}"));
        }
    }

    /// One id and the same bytes for each effect, at least one copy, and none without an effect.
    fn check_settlement_events(&mut self) {
        let mut problems = Vec::new();
        let mut told: BTreeMap<Uuid, &Seen> = BTreeMap::new();
        for seen in self.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            let kind = event["type"].as_str().unwrap_or("?");
            if kind.starts_with("update.") {
                continue;
            }
            let subject: Option<Uuid> = event["subject"].as_str().and_then(|id| id.parse().ok());
            let Some(record) = subject.and_then(|id| self.records.get(&id)) else {
                problems.push(format!("an event of nothing we know: {kind} {}", event["subject"]));
                continue;
            };
            if let Some(first) = told.insert(record.id, seen)
                && (first.body != seen.body || first.message_id() != seen.message_id())
            {
                problems.push(format!("two copies of the event of {} differ", record.id));
            }
            let id = event_id(&format!("{kind}|{}", record.id));
            let data = &event["data"];
            let allocation = &data["allocation"];
            let text = |value: &Option<String>| value.clone().map_or(Value::Null, Value::String);
            let facts = [
                (
                    "type",
                    json!(format!("{}.{}", record.kind, record.status)),
                    &event["type"],
                ),
                ("specversion", json!("1.0"), &event["specversion"]),
                ("id", json!(id), &event["id"]),
                ("message_id", json!(id), &json!(seen.message_id())),
                ("time", json!(record.updated_at), &event["time"]),
                (
                    "key",
                    json!(format!("{kind}.{}", record.enterprise)),
                    &json!(seen.routing_key),
                ),
                ("enterpriseId", json!(record.enterprise), &data["enterpriseId"]),
                ("nonce", text(&record.nonce), &data["nonce"]),
                ("allocation.id", json!(record.id), &allocation["id"]),
                ("status", json!(record.status), &allocation["status"]),
                ("reason", text(&record.reason), &allocation["reason"]),
                (
                    "partnerExternalId",
                    text(&record.partner_external_id),
                    &allocation["partnerExternalId"],
                ),
                ("currency", json!(record.currency), &allocation["amount"]["currency"]),
                ("quantity", json!(record.quantity), &allocation["amount"]["quantity"]),
            ];
            for (name, expected, found) in facts {
                if expected != *found {
                    problems.push(format!("the event of {}: {name} is {found}, not {expected}", record.id));
                }
            }
        }
        for record in self.records.values() {
            if record.status != "reserved" && !told.contains_key(&record.id) {
                problems.push(format!("{} is {} and nobody was told", record.id, record.status));
            }
        }
        self.problems.extend(problems);
    }

    /// Each dead letter has its event, and each such event its dead letter.
    fn check_refusal_events(&mut self) {
        let mut told = BTreeSet::new();
        let mut problems = Vec::new();
        for seen in self.events {
            let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
            if event["type"] != "update.rejected" {
                continue;
            }
            let data = &event["data"];
            let (digest, reason) = (data["messageDigest"].as_str(), data["reason"].as_str());
            let (digest, reason) = (
                digest.unwrap_or_default().to_owned(),
                reason.unwrap_or_default().to_owned(),
            );
            let enterprise = data["enterpriseId"]
                .as_str()
                .map(|id| format!(".{id}"))
                .unwrap_or_default();
            if seen.routing_key != format!("update.rejected{enterprise}") {
                problems.push(format!("a rejection went out under {}", seen.routing_key));
            }
            let id = event["id"].as_str().unwrap_or_default();
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
                Some(key) if seen.message_id() == Some(id) => {
                    told.insert(((*key).to_owned(), digest, reason));
                }
                Some(_) | None => problems.push(format!("a rejection with an id of its own: {id} {reason} {digest}")),
            }
        }
        let dead: BTreeSet<(String, String, String)> = self
            .dead
            .iter()
            .map(|seen| {
                (
                    seen.routing_key.clone(),
                    hex::encode(sha256(&seen.body)),
                    reason_of(seen),
                )
            })
            .collect();
        for missing in dead.difference(&told) {
            problems.push(format!("a dead letter without its event: {missing:?}"));
        }
        for missing in told.difference(&dead) {
            problems.push(format!("a rejection without its dead letter: {missing:?}"));
        }
        self.problems.extend(problems);
    }
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

/// The database's own books: what must hold of any ledger, whatever was published.
async fn check_ledger(db: &Client) -> Vec<String> {
    let checks = [
        (
            "entries of a currency do not sum to zero",
            "SELECT a.currency, sum(e.change)::text FROM settled.entries AS e
             JOIN settled.accounts AS a ON a.id = e.account_id GROUP BY a.currency HAVING sum(e.change) <> 0",
        ),
        (
            "entries of no account",
            "SELECT e.transfer_id::text, e.account_id::text FROM settled.entries AS e
             LEFT JOIN settled.accounts AS a ON a.id = e.account_id WHERE a.id IS NULL",
        ),
        (
            "a balance is not the sum of its entries",
            "SELECT a.id::text, a.balance::text || ' and ' || coalesce(sum(e.change), 0)::text
             FROM settled.accounts AS a LEFT JOIN settled.entries AS e ON e.account_id = a.id
             GROUP BY a.id HAVING a.balance <> coalesce(sum(e.change), 0)",
        ),
        (
            "a balance is negative",
            "SELECT kind, balance::text FROM settled.accounts WHERE balance < 0 AND kind <> 'external'",
        ),
        (
            "a transfer has not its two entries",
            "SELECT t.id::text, count(e.*)::text FROM settled.transfers AS t
             LEFT JOIN settled.entries AS e ON e.transfer_id = t.id
              AND ((e.account_id = t.debit_account AND e.change = -t.amount)
                OR (e.account_id = t.credit_account AND e.change = t.amount))
             GROUP BY t.id HAVING count(e.*) <> 2",
        ),
        (
            "entries of no transfer, or too many of one",
            "SELECT e.transfer_id::text, count(*)::text FROM settled.entries AS e
             LEFT JOIN settled.transfers AS t ON t.id = e.transfer_id
             GROUP BY e.transfer_id, t.id HAVING count(*) <> 2 OR t.id IS NULL",
        ),
        (
            "a state is not the fold of its transfers",
            "SELECT a.id::text, a.status FROM settled.allocations AS a
             LEFT JOIN settled.transfers AS r ON r.subject_id = a.id AND r.step = 0
             LEFT JOIN settled.transfers AS s ON s.subject_id = a.id AND s.step = 1
             WHERE (r.event = 'reserved'
                AND r.amount = a.quantity
                AND r.debit_account = CASE a.type WHEN 'allocation' THEN a.available_account ELSE a.allocated_account END
                AND r.credit_account = a.held_account
                AND CASE a.status
                    WHEN 'reserved' THEN s.id IS NULL
                    ELSE s.event = a.status AND s.amount = a.quantity AND s.debit_account = a.held_account
                     AND s.credit_account = CASE (a.type = 'allocation') = (a.status = 'cleared')
                                            WHEN true THEN a.allocated_account ELSE a.available_account END
                    END) IS NOT TRUE",
        ),
        (
            "transfers of nothing",
            "SELECT t.id::text, t.event FROM settled.transfers AS t
             WHERE NOT EXISTS (SELECT FROM settled.allocations AS a WHERE a.id = t.subject_id)
               AND NOT EXISTS (SELECT FROM settled.deposits AS d WHERE d.id = t.subject_id)",
        ),
        (
            "an outcome without its authority, or the other way round",
            "SELECT coalesce(a.id, s.allocation_id)::text, coalesce(a.status, 'none') FROM settled.settlements AS s
             FULL JOIN (SELECT * FROM settled.allocations WHERE status <> 'reserved') AS a ON a.id = s.allocation_id
             WHERE a.id IS NULL OR s.allocation_id IS NULL OR a.settled_nonce <> s.nonce",
        ),
        (
            "a nonce was accepted twice",
            "SELECT enterprise_id, nonce FROM settled.settlements GROUP BY enterprise_id, nonce HAVING count(*) > 1",
        ),
        (
            "publications were set aside",
            "SELECT batch_id::text, refusal FROM settled.outbox_refused",
        ),
    ];
    let mut problems = Vec::new();
    for (problem, sql) in checks {
        for row in db.query(sql, &[]).await.expect(problem).iter().take(5) {
            let (left, right): (String, String) = (row.get(0), row.get(1));
            problems.push(format!("{problem}: {left} {right}"));
        }
    }
    problems
}

/// Nothing has an effect without a signature that a key of that partner made over that text.
async fn check_authority(db: &Client, story: &Story) -> Vec<String> {
    let sql = "SELECT allocation_id, enterprise_id, nonce, payload, signature, public_key FROM settled.settlements";
    let mut problems = Vec::new();
    for row in db.query(sql, &[]).await.expect("settlements") {
        let id: Uuid = row.get(0);
        let (enterprise, nonce, payload): (String, String, String) = (row.get(1), row.get(2), row.get(3));
        let (signature, key): (Vec<u8>, Vec<u8>) = (row.get(4), row.get(5));
        let signer = signature.split_first().and_then(|(header, scalars)| {
            let recovery = RecoveryId::try_from(i32::from(*header) - 31).ok()?;
            let signature = RecoverableSignature::from_compact(scalars, recovery).ok()?;
            Some(signature.recover(partner::digest(&payload)).ok()?.serialize().to_vec())
        });
        let signed: Value = serde_json::from_str(&payload).unwrap_or_default();
        let is_theirs = story.keys.contains(&(enterprise.clone(), hex::encode(&key)));
        let names = [&signed["allocationId"], &signed["deallocationId"]];
        let is_of_this = names
            .into_iter()
            .filter_map(Value::as_str)
            .any(|name| name.parse() == Ok(id));
        if signer != Some(key) || !is_theirs || !is_of_this || signed["nonce"] != nonce {
            problems.push(format!("{id} has an effect that {enterprise} did not sign for"));
        }
    }
    problems
}

/// What came in is what it came to.
async fn check_batches(db: &Client, published: usize) -> Vec<String> {
    let mut problems = Vec::new();
    let sql = "SELECT id::text FROM settled.batches WHERE received <> settled + duplicate + parked + rejected";
    for row in db.query(sql, &[]).await.expect("batches") {
        let id: String = row.get(0);
        problems.push(format!("the batch {id} does not add up"));
    }
    let sql = "SELECT (SELECT coalesce(sum(settled), 0) FROM settled.batches)::bigint,
                      (SELECT count(*) FROM settled.allocations WHERE status <> 'reserved'),
                      (SELECT coalesce(sum(received), 0) FROM settled.batches WHERE source = 'queue')::bigint";
    let row = db.query_one(sql, &[]).await.expect("sums");
    let (settled, outcomes, received): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    if settled != outcomes {
        problems.push(format!(
            "the batches settled {settled}, {outcomes} allocations have an outcome"
        ));
    }
    if usize::try_from(received).unwrap_or_default() < published {
        problems.push(format!("the batches received {received} of {published} messages"));
    }
    problems
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
                problems.push(format!("it was told that {} waits, and it never did", known.name()));
            }
        }
    }
    for key in parked.difference(&explained) {
        problems.push(format!("a message was parked ({key}) and nobody was told"));
    }
    for seen in events {
        let event: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
        if event["type"] == "update.parked" && !reported.contains(seen.message_id().unwrap_or_default()) {
            problems.push(format!("a parking of nothing that was published: {}", event["id"]));
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
        .map(|known| format!("a stranger's message left a receipt: {}", known.name()))
        .collect()
}
