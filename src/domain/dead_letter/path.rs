//! The three ways by which a dead letter that the broker made comes, and what each is for.

use super::death::death_at_input;
use crate::domain::{
    delivery::{Delivery, HeaderValue},
    names::{BROKER_MADE, DEAD},
};

/// Whether the broker may have kept a dead letter of its own making away from its queue. It compares that queue with the
/// queues in the message's record, whoever wrote them, and drops without a trace what it takes for a cycle: so a message
/// that brings along a record of that queue never comes this way. Which records make a cycle differs from version to
/// version (an entry with the reason `rejected` may break it): where this says yes the letter may come both ways, or one.
pub fn may_be_cut(delivery: &Delivery) -> bool {
    may_be_cut_from(delivery, &[DEAD])
}

/// Whether it may have kept the letter away from the second way too. No true record names that queue: a sender made it up.
pub fn may_be_cut_twice(delivery: &Delivery) -> bool {
    may_be_cut_from(delivery, &[DEAD, BROKER_MADE])
}

/// Whether there are records of all of these.
fn may_be_cut_from(delivery: &Delivery, queues: &[&str]) -> bool {
    // Nobody can say what its record is.
    if delivery.properties.undecodable.is_some() {
        return true;
    }
    let Some(headers) = &delivery.properties.headers else {
        return false;
    };
    // Only what it dead-lettered just now, from an input queue: what was put there by hand came as it is.
    if death_at_input(headers).is_none() {
        return false;
    }
    let Some(HeaderValue::Array(deaths)) = headers.get("x-death") else {
        return false;
    };
    let is_of = |death: &HeaderValue, queue: &str| {
        let HeaderValue::Table(death) = death else {
            return false;
        };
        death.get("queue").and_then(HeaderValue::as_text) == Some(queue)
    };
    queues
        .iter()
        .all(|queue| deaths.iter().any(|death| is_of(death, queue)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::delivery::{Headers, Properties, Source};

    fn death(queue: &str, reason: &str) -> HeaderValue {
        HeaderValue::Table(Headers::from([
            ("queue".to_owned(), HeaderValue::text(queue)),
            ("reason".to_owned(), HeaderValue::text(reason)),
        ]))
    }

    fn with(deaths: &[HeaderValue]) -> Delivery {
        Delivery {
            exchange: String::new(),
            routing_key: String::new(),
            body: Vec::new(),
            properties: Properties {
                headers: Some([("x-death".to_owned(), HeaderValue::Array(deaths.to_vec()))].into()),
                ..Properties::default()
            },
            cut: None,
            redelivered: false,
            source: Source::Plain,
        }
    }

    #[test]
    fn only_records_of_both_queues_cut_a_letter_off_twice() {
        let input = || death("settlement.updates", "expired");
        let (dead, second) = (
            death("settlement.dead", "expired"),
            death("settlement.dead.broker", "expired"),
        );
        for (deaths, expected) in [
            (vec![input()], false),
            (vec![input(), dead.clone()], false),
            (vec![input(), second.clone()], false),
            (vec![input(), dead.clone(), second.clone()], true),
            (vec![input(), second.clone(), HeaderValue::Void, dead.clone()], true),
            (vec![second.clone(), dead.clone(), input()], false),
        ] {
            assert_eq!(may_be_cut_twice(&with(&deaths)), expected, "{deaths:?}");
        }
    }

    #[test]
    fn only_a_record_of_the_dead_letter_queue_cuts_a_letter_off() {
        let input = || death("settlement.updates", "expired");
        let dead = || death("settlement.dead", "delivery_limit");
        for (deaths, expected) in [
            (vec![input()], false),
            (vec![], false),
            (vec![HeaderValue::Void], false),
            (vec![input(), dead()], true),
            (vec![death("settlement.updates.acme", "delivery_limit"), dead()], true),
            (vec![input(), HeaderValue::Void, dead()], true),
            (vec![input(), death("settlement.updates", "rejected"), dead()], true),
            (vec![input(), death("settlement.dead", "rejected")], true),
            (vec![input(), death("settlement.unreadable", "expired")], false),
            (vec![input(), death("theirs", "expired")], false),
            (vec![input(), HeaderValue::text("settlement.dead")], false),
            // It died there, and somebody put it back by hand.
            (vec![dead(), input()], false),
            (vec![death("theirs", "expired"), dead()], false),
        ] {
            assert_eq!(may_be_cut(&with(&deaths)), expected, "{deaths:?}");
        }
    }
}
