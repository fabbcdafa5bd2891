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
