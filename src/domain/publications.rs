//! Everything that is said of one judged message: its event, its dead letter, its replies.

use jiff::Timestamp;

use super::{
    dead_letter::write::dead_letter_of,
    delivery::{Properties, Publication, PublicationKind},
    event::{refusal_event, settlement_event},
    event_id::{PARKED, REJECTED},
    message::MessageRef,
    reason::Reason,
    reply::ReplyTo,
    snapshot::Rules,
    told::{Firsts, first_words},
    trace::traceparent,
    verdict::{Judgement, Verdict, VerdictKind},
};

/// Everything that is said about one judged message, in the order it is said, if nobody said anything of it before.
pub fn publications(message: MessageRef<'_>, judgement: &Judgement, now: Timestamp, rules: &Rules) -> Vec<Publication> {
    publications_after(message, judgement, now, &Firsts::new(), None, rules)
}

/// The same after what was told before: a refusal says what the first of its id said. Who else asked for an answer gets
/// the same one.
pub fn publications_after(
    message: MessageRef<'_>,
    judgement: &Judgement,
    now: Timestamp,
    firsts: &Firsts,
    also: Option<&ReplyTo>,
    rules: &Rules,
) -> Vec<Publication> {
    let Some((event, publish)) = event_of(message, judgement, now, firsts, rules) else {
        return Vec::new();
    };
    let own = reply_to(message, judgement);
    let also = also
        .filter(|also| judgement.proven && own.as_ref() != Some(also))
        .cloned();
    let replies: Vec<Publication> = [own, also]
        .into_iter()
        .flatten()
        .map(|to| reply_at(to, &event))
        .collect();
    let dead = match &judgement.verdict {
        Verdict::Settled { .. } | Verdict::Duplicate { .. } | Verdict::Parked { .. } => None,
        // It is one already, and its row takes the verdict.
        Verdict::Rejected { .. } if message.delivery.source.dead_letter().is_some() => None,
        Verdict::Rejected { reason, detail } => Some(dead_letter_of(message, *reason, detail, now)),
    };
    [publish.then_some(event), dead]
        .into_iter()
        .flatten()
        .chain(replies)
        .collect()
}

/// The event of a verdict, and whether it is published (a repeated parking is only replied).
fn event_of(
    message: MessageRef<'_>,
    judgement: &Judgement,
    now: Timestamp,
    firsts: &Firsts,
    rules: &Rules,
) -> Option<(Publication, bool)> {
    let refusal = |kind, reason| {
        let (id, _, own) = first_words(message, &judgement.verdict, now)?;
        let first = firsts.get(&id).unwrap_or(&own);
        Some(refusal_event(message, (kind, reason), first, rules))
    };
    Some(match &judgement.verdict {
        Verdict::Settled { allocation } | Verdict::Duplicate { allocation } => {
            let traceparent = traceparent(message.delivery);
            (settlement_event(allocation, traceparent, &rules.event_source)?, true)
        }
        Verdict::Parked { again, .. } => (refusal(PARKED, Reason::AllocationNotFound)?, !again),
        Verdict::Rejected { reason, .. } => (refusal(REJECTED, *reason)?, true),
    })
}

/// Where the message asks to be answered.
fn reply_to(message: MessageRef<'_>, judgement: &Judgement) -> Option<ReplyTo> {
    // Who waits was told when it was parked; only who asks again is told again.
    let waits_on = message.delivery.source.is_parked() && judgement.verdict.kind() == VerdictKind::Parked;
    if !judgement.proven || waits_on {
        return None;
    }
    ReplyTo::of(message)
}

/// The same event for a queue that somebody waits at.
fn reply_at(to: ReplyTo, event: &Publication) -> Publication {
    Publication {
        kind: PublicationKind::Reply,
        exchange: String::new(),
        routing_key: to.reply_to,
        properties: Properties {
            correlation_id: to.correlation_id,
            ..event.properties.clone()
        },
        body: event.body.clone(),
    }
}

#[cfg(test)]
mod tests;
