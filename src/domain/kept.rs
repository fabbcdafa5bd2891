//! What the outbox keeps of a publication: a settlement's event is made again from the record, byte for byte, and is only
//! named; everything else is kept whole.

use std::collections::HashMap;

use uuid::Uuid;

use super::{
    allocation::Allocation,
    delivery::{Publication, PublicationKind},
    event::{Format, array_of, grouped, settlement_event},
    trace,
};

/// The event of a settlement, by what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub allocation_id: Uuid,
    /// Its place in a trace is the message's, and stands in no record.
    pub traceparent: Option<String>,
}

impl Named {
    /// Of an event that was just made of this record.
    pub fn of(event: &Publication, allocation: &Allocation) -> Option<Self> {
        (event.kind == PublicationKind::Event).then(|| Self {
            allocation_id: allocation.id,
            traceparent: trace::carried(event).map(str::to_owned),
        })
    }
}

/// What is kept of one publication.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The publication itself.
    Whole,
    /// The event of a settlement.
    Event(Named),
    /// Events of settlements that are one message.
    Array(Vec<Named>),
}

impl Kept {
    pub fn names(&self) -> &[Named] {
        match self {
            Kept::Whole => &[],
            Kept::Event(named) => std::slice::from_ref(named),
            Kept::Array(names) => names,
        }
    }
}

/// Puts events into messages, and says what is to be kept of each message. `names` are those of the publications, in their
/// order; a message is named where everything in it is.
pub fn in_format_and_kept(
    publications: Vec<Publication>,
    names: Vec<Option<Named>>,
    format: Format,
) -> (Vec<Publication>, Vec<Kept>) {
    let mut names: Vec<Option<Named>> = names;
    names.resize(publications.len(), None);
    if format == Format::Single {
        let kept = names.into_iter();
        let kept = kept.map(|named| named.map_or(Kept::Whole, Kept::Event)).collect();
        return (publications, kept);
    }
    grouped(publications, format)
        .into_iter()
        .map(|(publication, of)| {
            let named: Option<Vec<Named>> = of
                .places()
                .map(|place| names.get_mut(place).and_then(Option::take))
                .collect();
            let kept = match (named, of.is_array()) {
                (Some(names), true) => Kept::Array(names),
                (Some(names), false) => names.into_iter().next().map_or(Kept::Whole, Kept::Event),
                (None, _) => Kept::Whole,
            };
            (publication, kept)
        })
        .unzip()
}

/// Makes what is named again, of the records as they are. None where a record is missing, or is of no settlement.
pub fn told_of(kept: &Kept, records: &HashMap<Uuid, Allocation>, source: &str) -> Option<Publication> {
    let event = |named: &Named| {
        let allocation = records.get(&named.allocation_id)?;
        settlement_event(allocation, named.traceparent.as_deref(), source)
    };
    match kept {
        Kept::Whole => None,
        Kept::Event(named) => event(named),
        Kept::Array(names) => {
            let events: Option<Vec<Publication>> = names.iter().map(event).collect();
            array_of(&events?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::Properties;

    fn publication(kind: PublicationKind, body: &str) -> Publication {
        Publication {
            kind,
            exchange: "settlement.events".to_owned(),
            routing_key: "allocation.cleared.acme".to_owned(),
            properties: Properties::default(),
            body: body.as_bytes().to_vec(),
        }
    }

    /// Each in its place, with its own name; what has no name is kept whole, those behind the last name too.
    #[test]
    fn a_message_of_its_own_keeps_its_own_name() {
        let (event, letter) = (PublicationKind::Event, PublicationKind::DeadLetter);
        let said = vec![
            publication(event, "1"),
            publication(letter, "2"),
            publication(event, "3"),
            publication(event, "4"),
        ];
        let named = |id| Named {
            allocation_id: Uuid::from_u128(id),
            traceparent: None,
        };
        let names = vec![Some(named(1)), None, Some(named(3))];
        let (told, kept) = in_format_and_kept(said.clone(), names, Format::Single);
        assert_eq!(told, said);
        assert_eq!(
            kept,
            [Kept::Event(named(1)), Kept::Whole, Kept::Event(named(3)), Kept::Whole]
        );
    }
}
