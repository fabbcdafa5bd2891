//! The partner's side: signs updates, right ones and one of each kind of wrong ones, and publishes them with confirms.
//! For simulation, demo, tests and benchmarks; everything is drawn from a seed.

pub mod lint;
pub mod vectors;

use std::time::{Duration, Instant};

use serde::Serialize;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    broker::{
        BrokerError, BrokerSettings, Connection,
        publisher::{BrokerAnswer, Publisher},
        topology,
    },
    config::RetrySettings,
    domain::{
        address,
        allocation::{Kind, PolicyResult},
        delivery::{Properties, Publication, PublicationKind},
        digest, draft,
        ledger::{Amount, Quantity},
        message,
        reason::Reason,
        signature::SigningKey,
        update::{Outcome, Update},
    },
    retry::Backoff,
};

/// The AMQP reply code of a message that no queue takes.
const NO_ROUTE: u16 = 312;
/// Messages published together at most.
const PUBLISH_MAX: usize = 256;

/// Numbers that look random and are the same for the same seed: SHA-256 over seed, label and a counter.
#[derive(Clone, Debug)]
pub struct Dice {
    seed: [u8; 32],
    count: u64,
}

impl Dice {
    pub fn new(seed: u64, label: &str) -> Self {
        Self {
            seed: digest::sha256([seed.to_be_bytes().as_slice(), label.as_bytes()].concat()),
            count: 0,
        }
    }

    pub fn bytes(&mut self) -> [u8; 32] {
        self.count = self.count.wrapping_add(1);
        let mut hash = Sha256::new();
        hash.update(self.seed);
        hash.update(self.count.to_be_bytes());
        hash.finalize().into()
    }

    pub fn number(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes().first_chunk::<8>().copied().unwrap_or_default())
    }

    /// A number below `bound`; 0 where there is none.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.number().checked_rem(bound as u64).unwrap_or(0)).unwrap_or(0)
    }

    /// True so often of a hundred times.
    pub fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> Option<&'t T> {
        from.get(self.below(from.len()))
    }

    pub fn uuid(&mut self) -> Uuid {
        uuid::Builder::from_random_bytes(self.bytes().first_chunk::<16>().copied().unwrap_or_default()).into_uuid()
    }

    pub fn key(&mut self) -> SigningKey {
        // Of 2^256 numbers only a few above 2^256 - 2^129 are no key.
        loop {
            if let Some(key) = SigningKey::from_bytes(self.bytes()) {
                return key;
            }
        }
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// What a client asked for and the partner is to answer: a line of `settled allocation reserve`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reservation {
    pub id: Uuid,
    #[serde(rename = "type")]
    pub kind: Kind,
    pub connection_id: Uuid,
    pub amount: Amount,
    pub client_external_id: String,
    pub initiated_by: String,
}

/// A partner with its key and its connection with one client.
#[derive(Clone, Debug)]
pub struct SigningPartner {
    pub enterprise_id: String,
    pub key: SigningKey,
    pub client_id: Uuid,
    pub connection_id: Uuid,
    pub partners_client_id: String,
    pub partners_connection_id: String,
    /// What its messages carry as `user_id`. The broker refuses any but the user that publishes.
    pub user_id: Option<String>,
}

/// How a message is wrong by itself. What is wrong because of where the allocation stands needs no wrong message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    TooLarge,
    Malformed,
    Field,
    /// Without the `user_id` that its partner is bound to.
    Sender,
    Signature,
    /// Signed by a key that nobody registered.
    Stranger,
    /// The body says something else than what was signed.
    Payload,
    /// Ended before it was sent, by its own word.
    Expired,
    Policy,
    /// Signed and complete, about another amount.
    Mismatch,
}

impl Flaw {
    /// What it is refused for.
    pub fn reason(self) -> Reason {
        match self {
            Flaw::TooLarge => Reason::MessageTooLarge,
            Flaw::Malformed => Reason::MalformedMessage,
            Flaw::Field => Reason::InvalidField,
            Flaw::Sender => Reason::SenderMismatch,
            Flaw::Signature => Reason::MalformedSignature,
            Flaw::Stranger => Reason::SignatureMismatch,
            Flaw::Payload => Reason::PayloadMismatch,
            Flaw::Expired => Reason::ExpiredUpdate,
            Flaw::Policy => Reason::PolicyContradiction,
            Flaw::Mismatch => Reason::AllocationMismatch,
        }
    }
}

impl SigningPartner {
    /// A partner of this name with everything else drawn.
    pub fn draw(enterprise_id: &str, dice: &mut Dice) -> Self {
        Self {
            enterprise_id: enterprise_id.to_owned(),
            key: dice.key(),
            client_id: dice.uuid(),
            connection_id: dice.uuid(),
            partners_client_id: format!("client-of-{enterprise_id}"),
            partners_connection_id: format!("connection-of-{enterprise_id}"),
            user_id: None,
        }
    }

    /// A reservation of this partner's client over its connection.
    pub fn reservation(&self, kind: Kind, amount: Amount, reference: String, dice: &mut Dice) -> Reservation {
        Reservation {
            id: dice.uuid(),
            kind,
            connection_id: self.connection_id,
            amount,
            client_external_id: reference,
            initiated_by: "simulated client".to_owned(),
        }
    }

    /// What the partner will say of a reservation.
    pub fn draft(&self, reservation: &Reservation, outcome: Outcome, nonce: String) -> Update {
        Update {
            enterprise_id: self.enterprise_id.clone(),
            kind: reservation.kind,
            id: reservation.id,
            amount: reservation.amount.clone(),
            client_id: self.client_id,
            connection_id: reservation.connection_id,
            partners_client_id: self.partners_client_id.clone(),
            partners_connection_id: self.partners_connection_id.clone(),
            partners_id: format!("at-partner-{}", reservation.client_external_id),
            outcome,
            nonce,
            evaluation_id: None,
            pending_approval_id: None,
            policy_result: None,
            expires_at: None,
        }
    }

    /// The signed message.
    pub fn update(&self, draft: &Update) -> Publication {
        self.signed(draft, &draft::payload_text(draft))
    }

    /// The same message as another program might write it: other key order and white space in what is signed.
    pub fn update_in_other_words(&self, draft: &Update) -> Publication {
        let payload = draft::payload_text(draft);
        let pretty = serde_json::from_str::<serde_json::Value>(&payload)
            .and_then(|value| serde_json::to_string_pretty(&value))
            .unwrap_or(payload);
        self.signed(draft, &pretty)
    }

    fn signed(&self, draft: &Update, payload: &str) -> Publication {
        let body = draft::body_text(draft, payload, &self.key.sign(payload));
        self.publication(draft, body)
    }

    fn publication(&self, draft: &Update, body: impl Into<Vec<u8>>) -> Publication {
        Publication {
            // Comes back where no queue takes it, which a partner wants to know.
            kind: PublicationKind::DeadLetter,
            exchange: topology::UPDATES.to_owned(),
            routing_key: address::routing_key(&draft.enterprise_id, draft.kind),
            properties: Properties {
                content_type: Some("application/json".to_owned()),
                delivery_mode: Some(2),
                message_id: Some(draft.nonce.clone()),
                user_id: self.user_id.clone(),
                ..Properties::default()
            },
            body: body.into(),
        }
    }

    /// The message, wrong in this way. Where there are several ways, the dice choose.
    pub fn wrong(&self, mut draft: Update, fault: Flaw, dice: &mut Dice) -> Publication {
        let payload = draft::payload_text(&draft);
        let good = self.key.sign(&payload);
        match fault {
            Flaw::TooLarge => {
                let mut body = draft::body_text(&draft, &payload, &good).into_bytes();
                // White space is JSON as well: it is refused for its size alone.
                body.resize(message::BODY_MAX + 1, b' ');
                self.publication(&draft, body)
            }
            Flaw::Malformed => {
                let mut update = self.update(&draft);
                match dice.below(4) {
                    0 => update.properties.content_type = Some("text/plain".to_owned()),
                    1 => drop(update.body.pop()),
                    2 => update.body.splice(0..0, *b"\xef\xbb\xbf").for_each(drop),
                    _ => {
                        let status = format!("{{\"status\":\"{}\",", draft.outcome.as_str());
                        update.body.splice(0..1, status.into_bytes()).for_each(drop);
                    }
                }
                update
            }
            Flaw::Field => {
                let body = draft::body_text(&draft, &payload, &good);
                let quantity = format!("\"quantity\":\"{}\"", draft.amount.quantity);
                let (from, to) = match dice.below(4) {
                    0 => (quantity.clone(), "\"quantity\":\"007\"".to_owned()),
                    1 => (quantity.clone(), format!("\"quantity\":{}", draft.amount.quantity)),
                    2 => (draft.client_id.to_string(), format!("{{{}}}", draft.client_id)),
                    _ => (
                        format!("\"status\":\"{}\"", draft.outcome.as_str()),
                        "\"status\":\"done\"".to_owned(),
                    ),
                };
                // The first is the body's own: what is signed stands escaped behind it.
                self.publication(&draft, body.replacen(&from, &to, 1))
            }
            Flaw::Sender => {
                let mut update = self.update(&draft);
                update.properties.user_id = None;
                update
            }
            Flaw::Signature => {
                let bare = good.get(2..).unwrap_or_default();
                let signature = match dice.below(4) {
                    0 => format!("1b{bare}"),
                    1 => format!("0x{good}"),
                    2 => format!("{good}00"),
                    _ => bare.to_owned(),
                };
                self.publication(&draft, draft::body_text(&draft, &payload, &signature))
            }
            Flaw::Stranger => {
                let signature = dice.key().sign(&payload);
                self.publication(&draft, draft::body_text(&draft, &payload, &signature))
            }
            Flaw::Payload => {
                draft.amount = more(&draft.amount);
                self.publication(&draft, draft::body_text(&draft, &payload, &good))
            }
            Flaw::Expired => {
                draft.expires_at = Some(jiff::Timestamp::UNIX_EPOCH);
                self.update(&draft)
            }
            Flaw::Policy => {
                draft.outcome = Outcome::Cleared;
                draft.policy_result = Some(PolicyResult::Rejected);
                self.update(&draft)
            }
            Flaw::Mismatch => {
                draft.amount = more(&draft.amount);
                self.update(&draft)
            }
        }
    }
}

/// Ten times as much, and a little.
fn more(amount: &Amount) -> Amount {
    Amount {
        currency: amount.currency.clone(),
        quantity: Quantity::parse(&format!("{}1", amount.quantity)).unwrap_or_else(|_| amount.quantity.clone()),
    }
}

/// Publishes until every confirm is in. A lost connection is rebuilt, and what was not confirmed is published again.
#[derive(Debug)]
pub struct Post {
    settings: BrokerSettings,
    name: String,
    patience: Duration,
    backoff: Backoff,
    link: Option<(Connection, Publisher)>,
    /// Connections lost so far.
    pub rebuilt: u32,
    /// Messages that had to be published again.
    pub republished: usize,
}

impl Post {
    /// Connects at the first publication. A broker that is away for longer than `patience` is an error.
    pub fn new(settings: BrokerSettings, name: &str, retry: &RetrySettings, patience: Duration) -> Self {
        Self {
            settings,
            name: name.to_owned(),
            patience,
            backoff: Backoff::new(retry),
            link: None,
            rebuilt: 0,
            republished: 0,
        }
    }

    /// # Errors
    /// The broker is away for too long, refuses, or has no queue for a message.
    pub async fn publish(&mut self, publications: &[Publication]) -> Result<(), BrokerError> {
        for part in publications.chunks(PUBLISH_MAX) {
            let mut left = part.to_vec();
            let mut troubled: Option<Instant> = None;
            while !left.is_empty() {
                let problem = match self.try_publish(&left).await {
                    Ok(again) => {
                        if again.is_empty() {
                            break;
                        }
                        left = again;
                        BrokerError::Away("it does not take the messages".to_owned())
                    }
                    // A broker that is coming up refuses what it has not loaded yet: 404, 530, 541.
                    Err(error @ BrokerError::Refused { .. }) if self.rebuilt == 0 => return Err(error),
                    Err(error @ BrokerError::Config(_)) => return Err(error),
                    Err(error) => {
                        if self.link.take().is_some() {
                            self.rebuilt += 1;
                        }
                        error
                    }
                };
                let since = *troubled.get_or_insert_with(|| {
                    self.republished += left.len();
                    Instant::now()
                });
                if since.elapsed() >= self.patience {
                    return Err(problem);
                }
                tokio::time::sleep(self.backoff.next()).await;
            }
            self.backoff.reset();
        }
        Ok(())
    }

    /// One try; returns what the broker did not take.
    async fn try_publish(&mut self, publications: &[Publication]) -> Result<Vec<Publication>, BrokerError> {
        let publisher = match &mut self.link {
            Some((_, publisher)) => publisher,
            None => {
                let connection = Connection::open(&self.settings, &self.name).await?;
                let publisher = Publisher::open(&connection).await?;
                &mut self.link.insert((connection, publisher)).1
            }
        };
        let fates = publisher.publish(publications).await?;
        let mut again = Vec::new();
        for (publication, fate) in publications.iter().zip(fates) {
            match fate {
                BrokerAnswer::Confirmed => {}
                BrokerAnswer::Nacked => again.push(publication.clone()),
                BrokerAnswer::Returned => {
                    return Err(BrokerError::Refused {
                        code: NO_ROUTE,
                        text: format!("no queue takes what is published to {}", publication.exchange),
                    });
                }
            }
        }
        Ok(again)
    }

    /// Says good-bye to the broker.
    pub async fn close(mut self) {
        if let Some((connection, publisher)) = self.link.take() {
            drop(publisher);
            // What was published is confirmed: a failed good-bye changes nothing.
            drop(connection.close().await);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{
        delivery::{Delivery, Source},
        message::Facts,
        signature::Signer,
    };

    fn facts(publication: Publication) -> Facts {
        message::facts(&Delivery {
            exchange: publication.exchange,
            routing_key: publication.routing_key,
            body: publication.body,
            properties: publication.properties,
            cut: None,
            redelivered: false,
            source: Source::Plain,
        })
    }

    fn some() -> (SigningPartner, Update, Dice) {
        let mut dice = Dice::new(7, "test");
        let partner = SigningPartner::draw("acme", &mut dice);
        let amount = Amount {
            currency: "BTC".to_owned(),
            quantity: Quantity::parse("1200").expect("a quantity"),
        };
        let reservation = partner.reservation(Kind::Allocation, amount, "r-1".to_owned(), &mut dice);
        let draft = partner.draft(&reservation, Outcome::Cleared, "n-1".to_owned());
        (partner, draft, dice)
    }

    #[test]
    fn right_messages_are_signed_and_agree() {
        let (partner, draft, _) = some();
        for publication in [partner.update(&draft), partner.update_in_other_words(&draft)] {
            let content = facts(publication).content.expect("it decodes");
            assert_eq!(content.signer, Signer::Key(partner.key.public_key()));
            assert_eq!(content.agreement, Ok(()));
        }
    }

    #[test]
    fn wrong_messages_are_wrong_in_their_own_way() {
        let (partner, draft, mut dice) = some();
        let ours = Signer::Key(partner.key.public_key());
        for _ in 0..30 {
            let mut wrong = |fault| facts(partner.wrong(draft.clone(), fault, &mut dice)).content;
            for fault in [Flaw::TooLarge, Flaw::Malformed, Flaw::Field] {
                assert_eq!(wrong(fault).map_err(|refusal| refusal.reason), Err(fault.reason()));
            }
            let mut decoded = |fault| wrong(fault).expect("it decodes");
            assert!(matches!(decoded(Flaw::Signature).signer, Signer::Malformed(_)));
            assert!(matches!(decoded(Flaw::Stranger).signer, Signer::Key(key) if Signer::Key(key) != ours));
            let payload = decoded(Flaw::Payload);
            assert!(payload.signer == ours && payload.agreement.is_err());
            for fault in [Flaw::Expired, Flaw::Policy, Flaw::Mismatch, Flaw::Sender] {
                let content = decoded(fault);
                assert!(content.signer == ours && content.agreement.is_ok(), "{fault:?}");
            }
        }
    }

    #[test]
    fn a_seed_says_it_all() {
        let draws = |seed| {
            let mut dice = Dice::new(seed, "partner");
            (SigningPartner::draw("acme", &mut dice).key.public_key(), dice.uuid())
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
        let mut order: Vec<usize> = (0..50).collect();
        Dice::new(1, "order").shuffle(&mut order);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(order != sorted && sorted == (0..50).collect::<Vec<_>>());
    }
}
