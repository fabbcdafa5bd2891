//! Messages in hand, with what each tells by itself.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use crate::{
    domain::{
        address,
        delivery::{Delivery, Source},
        message::{self, EarlyRefusal, Facts, Message, MessageRef},
        reason::Reason,
    },
    fail::{self, Point},
};

/// Messages that are read where they are, which holds up an I/O thread for a tenth of a millisecond: to have another thread
/// wake up and answer takes as long.
const READ_AT_ONCE: usize = 3;

/// Messages that are settled together, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    messages: Arc<Vec<Message>>,
}

impl From<Vec<Message>> for Batch {
    fn from(messages: Vec<Message>) -> Self {
        Self {
            messages: Arc::new(messages),
        }
    }
}

impl Batch {
    /// Decodes, checks agreement and recovers signers: a few messages where they are, more off the I/O threads and on as many
    /// cores as there are.
    pub async fn read(deliveries: Vec<Delivery>) -> Self {
        shortened(read_by(deliveries, message::facts).await).into()
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Where each came from.
    pub fn sources(&self) -> impl Iterator<Item = Source> {
        self.messages.iter().map(|message| message.delivery.source)
    }

    pub fn into_messages(self) -> Vec<Message> {
        Arc::unwrap_or_clone(self.messages)
    }

    pub fn len(&self) -> usize {
        self.messages.len()
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Its messages, as the domain takes them.
    pub fn refs(&self) -> Vec<MessageRef<'_>> {
        self.messages.iter().map(Message::by_ref).collect()
    }

    /// Those at the places that are picked.
    pub fn part(&self, picks: impl Fn(usize) -> bool) -> Self {
        if (0..self.len()).all(&picks) {
            return self.clone();
        }
        let messages = self.messages.iter().enumerate().filter(|(index, _)| picks(*index));
        messages.map(|(_, message)| message.clone()).collect::<Vec<_>>().into()
    }

    /// The two halves, where there is more than one message: for a search for the one that the database refuses.
    pub fn halves(&self) -> Option<[Self; 2]> {
        let (left, right) = self.messages.split_at_checked(self.messages.len() / 2)?;
        (!left.is_empty()).then(|| [left, right].map(|half| half.to_vec().into()))
    }
}

/// Messages as [`Batch::read`] does it, but with the signers of some only, by their places: those of whom is asked whether
/// their effect is there must be known, the others are only kept.
pub async fn read_signed_where(deliveries: Vec<Delivery>, is_signed: impl Fn(usize) -> bool) -> Vec<Message> {
    let mut messages = read_by(deliveries, message::unsigned_facts).await;
    let asked: Vec<usize> = (0..messages.len()).filter(|index| is_signed(*index)).collect();
    let deliveries = asked.iter().filter_map(|index| messages.get(*index));
    let deliveries: Vec<Delivery> = deliveries.map(|message| message.delivery.clone()).collect();
    let with_signers = Batch::read(deliveries).await.into_messages();
    for (index, signed) in asked.into_iter().zip(with_signers) {
        if let Some(message) = messages.get_mut(index) {
            message.facts = signed.facts;
        }
    }
    messages
}

async fn read_by(deliveries: Vec<Delivery>, read: Reader) -> Vec<Message> {
    let bytes = deliveries.iter().map(|delivery| delivery.body.len()).sum::<usize>();
    let messages = if deliveries.len() <= READ_AT_ONCE && bytes <= READ_AT_ONCE * message::BODY_MAX {
        deliveries
            .into_iter()
            .map(|delivery| Message {
                facts: read_one(&delivery, read),
                delivery,
            })
            .collect()
    } else {
        read_apart(deliveries, read).await
    };
    fail::point(Point::AfterFacts).await;
    messages
}

type Reader = fn(&Delivery) -> Facts;

/// A message as it is judged: of one that is too large the head only, since all that becomes of it is a dead letter with that.
fn shortened(mut messages: Vec<Message>) -> Vec<Message> {
    for message in &mut messages {
        message::shorten(&mut message.delivery, &message.facts);
    }
    messages
}

/// Reads messages on other threads, each a share of them.
async fn read_apart(deliveries: Vec<Delivery>, read: Reader) -> Vec<Message> {
    // As many as the runtime has threads, which is as many as there are cores: to ask the system again reads its files.
    let cores = tokio::runtime::Handle::current().metrics().num_workers();
    // A signature takes 30 us: below a handful a second thread costs more than it brings.
    let share = deliveries.len().div_ceil(cores).max(8);
    let deliveries = Arc::new(deliveries);
    let tasks: Vec<_> = (0..deliveries.len())
        .step_by(share)
        .map(|start| {
            let deliveries = Arc::clone(&deliveries);
            tokio::task::spawn_blocking(move || {
                deliveries
                    .iter()
                    .skip(start)
                    .take(share)
                    .map(|delivery| read_one(delivery, read))
                    .collect::<Vec<_>>()
            })
        })
        .collect();
    let mut shares = Vec::with_capacity(tasks.len());
    for task in tasks {
        // Only a runtime that shuts down reads nothing (a panic is caught message by message).
        shares.push(task.await.unwrap_or_default());
    }
    joined(Arc::unwrap_or_clone(deliveries), share, shares, read)
}

/// Each message with its facts, which stand in the same place of the same share. What nobody has read is read here: no message
/// is left out.
fn joined(deliveries: Vec<Delivery>, share: usize, shares: Vec<Vec<Facts>>, read: Reader) -> Vec<Message> {
    let mut shares = shares.into_iter();
    let mut messages = Vec::with_capacity(deliveries.len());
    let mut facts = Vec::new().into_iter();
    for (index, delivery) in deliveries.into_iter().enumerate() {
        if index % share == 0 {
            facts = shares.next().unwrap_or_default().into_iter();
        }
        let facts = facts.next().unwrap_or_else(|| read_one(&delivery, read));
        messages.push(Message { delivery, facts });
    }
    messages
}

/// A panic of ours in reading a message is that message's own fate, not the batch's.
fn read_one(delivery: &Delivery, read: Reader) -> Facts {
    catch_unwind(AssertUnwindSafe(|| read(delivery))).unwrap_or_else(|_| unreadable(delivery))
}

fn unreadable(delivery: &Delivery) -> Facts {
    Facts {
        message_digest: delivery.digest(),
        enterprise_id: address::parse_routing_key(&delivery.routing_key).map(|(enterprise, _)| enterprise.to_owned()),
        content: Err(EarlyRefusal {
            reason: Reason::Internal,
            detail: "this version failed to read the message".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{delivery::Properties, digest};

    fn deliveries(count: u8) -> Vec<Delivery> {
        let delivery = |number| Delivery {
            exchange: String::new(),
            routing_key: String::new(),
            body: vec![number],
            properties: Properties::default(),
            cut: None,
            redelivered: false,
            source: Source::Plain,
        };
        (0..count).map(delivery).collect()
    }

    /// Their numbers; each stands beside its own facts.
    fn numbers(batch: &Batch) -> Vec<u8> {
        let number = |message: &Message| {
            assert_eq!(
                message.facts.message_digest,
                digest::sha256(&message.delivery.body),
                "its own facts"
            );
            message.delivery.body[0]
        };
        batch.messages().iter().map(number).collect()
    }

    fn numbered(count: u8) -> Batch {
        joined(deliveries(count), 8, Vec::new(), message::facts).into()
    }

    /// A batch cut in two until every message stands alone, by their numbers in the order they are found.
    fn cut(batch: &Batch, most: u32) -> Vec<u8> {
        match batch.halves() {
            Some([left, right]) => {
                assert!(most > 0, "a search that does not end");
                [cut(&left, most - 1), cut(&right, most - 1)].concat()
            }
            None => {
                assert_eq!(batch.len(), 1, "one message in a piece");
                numbers(batch)
            }
        }
    }

    #[test]
    fn halves_are_never_empty_and_together_the_whole() {
        for count in 1..=65 {
            assert_eq!(
                cut(&numbered(count), 7),
                (0..count).collect::<Vec<_>>(),
                "{count} messages"
            );
        }
        assert!(numbered(0).halves().is_none());
    }

    /// Wherever a share comes back short or not at all, as from a runtime that ends, every delivery has its own facts.
    #[test]
    fn no_message_is_left_out_or_gets_the_facts_of_another() {
        let facts = |from: u8, to: u8| -> Vec<Facts> {
            let all = deliveries(to);
            all.iter().skip(from.into()).map(message::facts).collect()
        };
        for shares in [
            vec![facts(0, 8), facts(8, 16), facts(16, 20)],
            vec![facts(0, 8), Vec::new(), facts(16, 20)],
            vec![facts(0, 3), facts(8, 16)],
            Vec::new(),
        ] {
            let batch = joined(deliveries(20), 8, shares, message::facts).into();
            assert_eq!(numbers(&batch), (0..20).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_part_has_those_that_are_picked() {
        let batch = numbered(9);
        assert_eq!(numbers(&batch.part(|index| index % 4 == 0)), [0, 4, 8]);
        assert_eq!(numbers(&batch.part(|_| true)), numbers(&batch));
        assert!(batch.part(|_| false).is_empty());
    }
}
