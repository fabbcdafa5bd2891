//! How a batch's events are put into messages: each by itself, or many in one.

use std::collections::HashMap;

use serde_json::value::RawValue;
use uuid::Uuid;

use super::super::{
    delivery::{HeaderValue, Properties, Publication, PublicationKind},
    event_id::NAMESPACE,
    names::{content_type, header},
};

/// How the events of a batch are put into messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Each is a message of its own.
    Single,
    /// Those under one routing key are one message, a JSON array of at most so many bytes. An event that is larger than
    /// that is alone in its array.
    Batched { max_bytes: usize },
}

/// Which publications a message is made of, by their places.
pub(in crate::domain) enum Of {
    One(usize),
    /// An array of them.
    Many(Vec<usize>),
}

impl Of {
    pub(in crate::domain) fn is_array(&self) -> bool {
        matches!(self, Of::Many(_))
    }

    pub(in crate::domain) fn places(&self) -> impl Iterator<Item = usize> {
        let places = match self {
            Of::One(place) => std::slice::from_ref(place),
            Of::Many(places) => places,
        };
        places.iter().copied()
    }
}

/// Events, and whatever else is published, in either format; what is no event stays as it is.
pub fn in_format(publications: Vec<Publication>, format: Format) -> Vec<Publication> {
    let grouped = grouped(publications, format).into_iter();
    grouped.map(|(publication, _)| publication).collect()
}

/// The same, each with what it is made of.
pub(in crate::domain) fn grouped(publications: Vec<Publication>, format: Format) -> Vec<(Publication, Of)> {
    let publications = publications.into_iter().enumerate();
    let Format::Batched { max_bytes } = format else {
        return publications
            .map(|(place, publication)| (publication, Of::One(place)))
            .collect();
    };
    let (events, others): (Vec<_>, Vec<_>) =
        publications.partition(|(_, publication)| publication.kind == PublicationKind::Event);
    let mut groups: Vec<(Vec<Publication>, Vec<usize>)> = Vec::new();
    // The last group of each routing key, and the bytes of its array. One that is full takes nothing more, however small,
    // or the next event would overtake.
    let mut last: HashMap<String, (usize, usize)> = HashMap::new();
    for (place, event) in events {
        // With the bracket or comma before it.
        let bytes = event.body.len().saturating_add(1);
        if let Some((group, size)) = last.get_mut(&event.routing_key)
            && let Some((events, places)) = groups.get_mut(*group)
            && size.saturating_add(bytes) <= max_bytes
        {
            *size = size.saturating_add(bytes);
            events.push(event);
            places.push(place);
        } else {
            // And the bracket behind the last one.
            last.insert(event.routing_key.clone(), (groups.len(), bytes.saturating_add(1)));
            groups.push((vec![event], vec![place]));
        }
    }
    let arrays = groups
        .into_iter()
        .filter_map(|(events, places)| Some((array_of(&events)?, Of::Many(places))));
    arrays
        .chain(
            others
                .into_iter()
                .map(|(place, publication)| (publication, Of::One(place))),
        )
        .collect()
}

/// Events under one routing key as one message.
pub(in crate::domain) fn array_of(events: &[Publication]) -> Option<Publication> {
    let first = events.first()?;
    let bytes: usize = events.iter().map(|event| event.body.len().saturating_add(1)).sum();
    let mut body = Vec::with_capacity(bytes.saturating_add(1));
    // The same events in the same order have the same name, whoever publishes them.
    let mut name = format!("batch|{}", first.routing_key);
    for event in events {
        body.push(if body.is_empty() { b'[' } else { b',' });
        body.extend_from_slice(&event.body);
        name.push('|');
        name.push_str(event.properties.message_id.as_deref().unwrap_or_default());
    }
    body.push(b']');
    // A message has one trace or none: what its events do not have in common can not travel.
    let shared = events
        .iter()
        .all(|event| event.properties.headers == first.properties.headers);
    let mut headers = shared
        .then(|| first.properties.headers.clone())
        .flatten()
        .unwrap_or_default();
    // 32 bits: RabbitMQ's stream client for Node can not read a small number of 64.
    let count = i32::try_from(events.len()).unwrap_or(i32::MAX);
    headers.insert(header::EVENTS.into(), HeaderValue::LongInt(count));
    Some(Publication {
        kind: PublicationKind::Event,
        exchange: first.exchange.clone(),
        routing_key: first.routing_key.clone(),
        properties: Properties {
            content_type: Some(content_type::EVENTS.into()),
            message_id: Some(Uuid::new_v5(&NAMESPACE, name.as_bytes()).to_string()),
            headers: Some(headers),
            ..first.properties.clone()
        },
        body,
    })
}

/// How many events a publication stands for; a dead letter is one, whatever headers its sender gave it.
pub fn count_of(publication: &Publication) -> u64 {
    let headers = match publication.kind {
        PublicationKind::Event => publication.properties.headers.as_ref(),
        PublicationKind::DeadLetter | PublicationKind::Reply => None,
    };
    match headers.and_then(|headers| headers.get(header::EVENTS)) {
        Some(HeaderValue::LongInt(count)) => u64::try_from(*count).unwrap_or(1),
        // As earlier versions left it in the outbox.
        Some(HeaderValue::LongLongInt(count)) => u64::try_from(*count).unwrap_or(1),
        Some(_) | None => 1,
    }
}

/// The events of a message as a subscriber reads it, in order and byte for byte, whichever format it has.
///
/// # Errors
/// Its content type promises an array, and the body is none.
pub fn read<'a>(content_type: Option<&str>, body: &'a [u8]) -> Result<Vec<&'a [u8]>, serde_json::Error> {
    if content_type != Some(content_type::EVENTS) {
        return Ok(vec![body]);
    }
    let events: Vec<&RawValue> = serde_json::from_slice(body)?;
    Ok(events.into_iter().map(|event| event.get().as_bytes()).collect())
}
