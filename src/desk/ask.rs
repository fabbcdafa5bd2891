//! What there is: dead letters, one of them, groups and counts, all with their bodies; and what operators did.

use std::ops::ControlFlow;

use serde::{Serialize, Serializer};
use serde_json::json;
use uuid::Uuid;

use super::{
    AuditRecord, Command, DeadLetter, Desk, Group, Moment, Page, Refusal, Replayed, Which, act::filters_of,
    headers::plainly, life::digest, which::said,
};
use crate::{
    domain::{
        allocation::Allocation,
        calendar::rfc3339,
        dead_letter::State,
        delivery::{Delivery, Properties},
        event::AllocationView,
        event_id, message,
        reason::Reason,
    },
    store::{
        audit::{ACTS, Act, AuditFilter},
        letters::{Exported, Name, Stat},
    },
};

/// Replays and acts that one letter shows at most.
const LINEAGE_MAX: i64 = 100;
/// Partners that counts name.
const PARTNERS_MAX: i64 = 20;
/// Messages that one statement of an export reads: bodies have up to 256 KiB.
const EXPORT_PAGE: i64 = 64;
/// The shortest prefix of an id that is looked for.
const PREFIX_MIN: usize = 4;

impl Desk {
    /// A page of dead letters, in order of arrival, after a cursor: those that wait, unless states are named.
    ///
    /// # Errors
    /// The database is away.
    pub async fn letters(&self, which: &Which, after: i64, limit: i64) -> Result<Page<DeadLetter>, Refusal> {
        let filter = self.filter(which, &[State::Open, State::Due]).await?;
        let found = self.store.dead_letters(&filter, after, limit + 1).await?;
        Ok(Page::of(found, limit))
    }
}

// One letter ---------------------------------------------------------------------------------------------------------

/// A dead letter as somebody named it: by its id, the beginning of it, or the SHA-256 of the message.
#[derive(Clone, Debug)]
pub struct LetterName {
    text: String,
    name: Name,
}

impl LetterName {
    /// What was typed, as a range of ids or a digest.
    ///
    /// # Errors
    /// It is neither.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let named = |name| Self {
            text: text.to_owned(),
            name,
        };
        if let Some(digest) = digest(text) {
            return Ok(named(Name::Digest(digest)));
        }
        let digits: String = text.chars().filter(|letter| *letter != '-').collect();
        let fits = (PREFIX_MIN..=32).contains(&digits.len()) && digits.chars().all(|letter| letter.is_ascii_hexdigit());
        let bound = |fill: &str| {
            let rest = 32_usize.saturating_sub(digits.len());
            u128::from_str_radix(&format!("{digits}{}", fill.repeat(rest)), 16)
        };
        match (fits, bound("0"), bound("f")) {
            (true, Ok(first), Ok(last)) => Ok(named(Name::Ids(Uuid::from_u128(first), Uuid::from_u128(last)))),
            _ => Err(
                Refusal::usage(format!("{text:?} is no id, no beginning of one, and no digest")).hint(format!(
                    "an id is a UUID, {PREFIX_MIN} or more of its hexadecimal digits will do; a digest has 64"
                )),
            ),
        }
    }
}

/// Everything about one message.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FullLetter {
    pub dead_letter: DeadLetter,
    #[serde(serialize_with = "plainly")]
    pub properties: Option<Properties>,
    #[serde(flatten)]
    pub body: Option<Body>,
    /// None where nobody told the partner anything: somebody put the message there by hand.
    pub told: Option<ToldEvent>,
    /// As it stands now.
    #[serde(serialize_with = "view")]
    pub allocation: Option<Allocation>,
    /// What the partner must do instead.
    pub advice: Option<&'static str>,
    /// What the operator can do.
    pub operator_advice: Option<&'static str>,
    /// The key that made the signature, compressed, in hexadecimal; none where there is none to recover.
    pub recovered_key: Option<String>,
    pub replays: Vec<Replayed>,
    pub acts: Vec<AuditRecord>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    /// `utf-8`, or `base64` for what is no text.
    pub body_encoding: &'static str,
    pub body: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ToldEvent {
    pub event_id: Uuid,
    #[serde(rename = "type")]
    pub kind: String,
}

fn view<S: Serializer>(allocation: &Option<Allocation>, serializer: S) -> Result<S::Ok, S::Error> {
    allocation.as_ref().map(AllocationView::from).serialize(serializer)
}

impl Desk {
    /// One dead letter; with its body where an operator looks at it, which is an act.
    ///
    /// # Errors
    /// There is none of that name, or several; the database is away.
    pub async fn letter(&self, named: &LetterName, body_for: Option<&str>) -> Result<FullLetter, Refusal> {
        let found = self.store.find_dead_letters(&named.name, 10).await?;
        let text = &named.text;
        let none = || {
            Refusal::refused(format!("there is no dead letter {text:?}"))
                .hint("`settled dead-letters list --state all` shows them; what still waits in the queue settlement.dead is not collected yet")
        };
        let id = match found.as_slice() {
            [] => return Err(none()),
            [id] => *id,
            // Which ones they are is for whoever may see them.
            [_, _, ..] if self.limits().is_some() => {
                return Err(
                    Refusal::refused(format!("{text:?} means several dead letters")).hint("give more of the id")
                );
            }
            [first, second, ..] => {
                return Err(
                    Refusal::refused(format!("{text:?} means several dead letters: {first}, {second}"))
                        .hint("give more of the id"),
                );
            }
        };
        let Some((exported, bytes)) = self.store.dead_letter(id).await? else {
            return Err(Refusal::refused(format!("the dead letter {id} was purged just now")));
        };
        if !self.sees(exported.dead_letter.enterprise_id.as_deref()) {
            return Err(none());
        }
        if let Some(operator) = body_for {
            let filters = json!({ "deadLetter": id });
            let act = Act {
                name: "show body",
                operator,
                why: None,
                filters: &filters,
                voucher: self.voucher.as_deref(),
            };
            // Before a byte of it is shown; and who can not be written down sees none.
            self.store.record(act, &json!({ "bytes": bytes.len() })).await?;
        }
        let (replays, acts) = self.store.lineage(id, LINEAGE_MAX).await?;
        let allocation = match exported.dead_letter.allocation_id {
            // It may be another partner's: that is why such a message was refused.
            Some(id) => self
                .store
                .allocation(id)
                .await?
                .filter(|found| self.sees(Some(&found.enterprise_id))),
            None => None,
        };
        let stored = self.store.dead_letter_deliveries(&[id]).await?;
        let recovered_key = stored.into_iter().find_map(|(_, delivery)| recovered_key(&delivery?));
        let Exported {
            dead_letter,
            properties,
            body: encoded,
        } = exported;
        Ok(FullLetter {
            told: told(&dead_letter, allocation.as_ref()),
            advice: (dead_letter.state != State::Settled.as_str()).then(|| dead_letter.why.reason.advice_to_partner()),
            operator_advice: (dead_letter.state != State::Settled.as_str())
                .then(|| dead_letter.why.reason.advice_to_operator()),
            recovered_key,
            body: body_for.map(|_| body(bytes, encoded)),
            dead_letter,
            properties,
            allocation,
            replays,
            acts,
        })
    }
}

/// The key that made a message's signature, as far as it can be told.
fn recovered_key(delivery: &Delivery) -> Option<String> {
    let facts = message::facts(delivery);
    let key = facts.content.ok()?.signer.key()?;
    Some(key.to_hex())
}

/// Bodies that are read at a time.
const EXAMPLES: usize = 64;

fn body(bytes: Vec<u8>, encoded: String) -> Body {
    match String::from_utf8(bytes) {
        Ok(text) => Body {
            body_encoding: "utf-8",
            body: text,
        },
        Err(_) => Body {
            body_encoding: "base64",
            body: encoded,
        },
    }
}

/// The event that told the partner of the message's last verdict.
fn told(dead_letter: &DeadLetter, allocation: Option<&Allocation>) -> Option<ToldEvent> {
    let digest = digest(&dead_letter.message_digest)?;
    let refusal = |kind: &str, reason| ToldEvent {
        event_id: event_id::refusal_id_of(kind, &dead_letter.routing_key, &digest, reason),
        kind: kind.to_owned(),
    };
    match State::parse(&dead_letter.state)? {
        State::Settled => {
            let allocation = allocation?;
            Some(ToldEvent {
                event_id: event_id::settlement_id(allocation)?,
                kind: format!("{}.{}", allocation.kind.as_str(), allocation.status.as_str()),
            })
        }
        State::Parked => Some(refusal(event_id::PARKED, Reason::AllocationNotFound)),
        State::Open | State::Due | State::Discarded => {
            let was_judged = dead_letter.made_by != "unknown" || dead_letter.replays > 0;
            was_judged.then(|| refusal(event_id::REJECTED, dead_letter.why.reason))
        }
    }
}

// Groups and stats ---------------------------------------------------------------------------------------------------

/// The largest groups of one partner, reason and kind of detail.
#[derive(Clone, Debug, Serialize)]
pub struct Groups {
    /// How many there are, shown or not.
    pub total: i64,
    pub groups: Vec<Group>,
}

/// How many there are.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    pub messages: i64,
    pub oldest_failed_at: Option<String>,
    pub reasons: Vec<ByReason>,
    /// Those with the most, the most first.
    pub partners: Vec<ByPartner>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ByReason {
    pub state: String,
    pub reason: Reason,
    #[serde(rename = "final")]
    pub is_final: bool,
    pub messages: i64,
    pub first_failed_at: String,
    pub last_failed_at: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ByPartner {
    pub enterprise_id: Option<String>,
    pub messages: i64,
    pub first_failed_at: String,
    pub last_failed_at: String,
}

impl Desk {
    /// The largest groups; of open ones, unless states are named.
    ///
    /// # Errors
    /// The database is away.
    pub async fn groups(&self, which: &Which, limit: i64) -> Result<Groups, Refusal> {
        let filter = self.filter(which, &[State::Open]).await?;
        let (mut groups, total) = self.store.dead_letter_groups(&filter, limit).await?;
        let is_asked = |group: &&mut Group| group.why.reason == Reason::SignatureMismatch;
        let mut asked: Vec<&mut Group> = groups.iter_mut().filter(is_asked).collect();
        for some in asked.chunks_mut(EXAMPLES) {
            let ids: Vec<Uuid> = some.iter().map(|group| group.example).collect();
            for (id, delivery) in self.store.dead_letter_deliveries(&ids).await? {
                let key = delivery.as_ref().and_then(recovered_key);
                for group in some.iter_mut().filter(|group| group.example == id) {
                    group.recovered_key.clone_from(&key);
                }
            }
        }
        Ok(Groups { total, groups })
    }

    /// Counts by state, reason and partner; of open ones, unless states are named.
    ///
    /// # Errors
    /// The database is away.
    pub async fn stats(&self, which: &Which) -> Result<Stats, Refusal> {
        let filter = self.filter(which, &[State::Open]).await?;
        let stats = self.store.dead_letter_stats(&filter, PARTNERS_MAX).await?;
        let (by_reason, by_partner): (Vec<&Stat>, Vec<&Stat>) = stats.iter().partition(|stat| stat.state.is_some());
        let mut reasons: Vec<ByReason> = by_reason
            .iter()
            .map(|stat| {
                let reason = stat.reason.unwrap_or(Reason::Internal);
                ByReason {
                    state: stat.state.clone().unwrap_or_default(),
                    reason,
                    is_final: reason.is_final(),
                    messages: stat.count.messages,
                    first_failed_at: rfc3339(stat.count.first_failed_at),
                    last_failed_at: rfc3339(stat.count.last_failed_at),
                }
            })
            .collect();
        let place = |line: &ByReason| State::parse(&line.state).map(|state| state as usize);
        reasons.sort_by_key(|line| (place(line), line.reason));
        let partners = by_partner.iter().map(|stat| ByPartner {
            enterprise_id: stat.partner.clone(),
            messages: stat.count.messages,
            first_failed_at: rfc3339(stat.count.first_failed_at),
            last_failed_at: rfc3339(stat.count.last_failed_at),
        });
        Ok(Stats {
            messages: by_reason.iter().map(|stat| stat.count.messages).sum(),
            oldest_failed_at: by_reason
                .iter()
                .map(|stat| stat.count.first_failed_at)
                .min()
                .map(rfc3339),
            partners: partners.collect(),
            reasons,
        })
    }
}

// Export -------------------------------------------------------------------------------------------------------------

/// Messages with their bodies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub which: Which,
    /// To whom it is encrypted, as public keys; none: to nobody, it is plain.
    pub recipients: Vec<String>,
    pub operator: String,
}

impl Export {
    /// The command line that does it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["dead-letters", "export"]);
        self.which.add_to(&mut command, "--reason");
        for recipient in &self.recipients {
            command.flag("--recipient", Some(recipient));
        }
        command.flag("--operator", Some(&self.operator));
        command
    }
}

/// A dead letter with the message itself: complete enough to publish it again.
#[derive(Clone, Debug, Serialize)]
pub struct ExportedLine {
    #[serde(flatten)]
    pub dead_letter: DeadLetter,
    #[serde(serialize_with = "plainly")]
    pub properties: Option<Properties>,
    /// In base64.
    pub body: String,
}

/// How far an export went.
#[derive(Clone, Copy, Debug)]
pub struct Exports {
    pub messages: u64,
    /// Nobody reads it any more.
    pub is_cut: bool,
}

impl Desk {
    /// Gives every message of a selection to `each`, with how many were selected, until it breaks off. Of open ones, unless
    /// states are named.
    ///
    /// # Errors
    /// The database is away, or `each` can not.
    pub async fn export<E: From<Refusal>>(
        &self,
        wish: &Export,
        mut each: impl FnMut(&ExportedLine, i64) -> Result<ControlFlow<()>, E>,
    ) -> Result<Exports, E> {
        let filter = self.filter(&wish.which, &[State::Open]).await?;
        let total = self
            .store
            .count_dead_letters(&filter)
            .await
            .map_err(|error| E::from(error.into()))?;
        let filters = filters_of(&filter);
        let mut outcome = json!({ "selected": total });
        if !wish.recipients.is_empty() {
            outcome["recipients"] = json!(wish.recipients);
        }
        let act = Act {
            name: "export",
            operator: &wish.operator,
            why: None,
            filters: &filters,
            voucher: self.voucher.as_deref(),
        };
        // Before the first byte leaves: an export that breaks off was one all the same.
        self.store
            .record(act, &outcome)
            .await
            .map_err(|error| E::from(error.into()))?;
        let mut after = 0;
        let mut messages = 0;
        loop {
            let page = self
                .patiently(async || self.store.exported(&filter, after, EXPORT_PAGE).await)
                .await
                .map_err(|error| E::from(error.into()))?;
            let Some(last) = page.last() else { break };
            after = last.dead_letter.cursor;
            for exported in page {
                let line = ExportedLine {
                    dead_letter: exported.dead_letter,
                    properties: exported.properties,
                    body: exported.body,
                };
                let goes_on = each(&line, total)?;
                messages += 1;
                if goes_on.is_break() {
                    return Ok(Exports { messages, is_cut: true });
                }
            }
        }
        Ok(Exports {
            messages,
            is_cut: false,
        })
    }
}

// Acts ---------------------------------------------------------------------------------------------------------------

/// Which acts of operators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditQuestion {
    pub operator: Option<String>,
    pub act: Option<String>,
    pub since: Option<Moment>,
    pub until: Option<Moment>,
}

impl AuditQuestion {
    /// The command line that asks it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&["audit", "list"]);
        command.flag("--operator", self.operator.as_ref());
        command.flag("--act", self.act.as_ref());
        command.flag("--since", self.since.map(said));
        command.flag("--until", self.until.map(said));
        command
    }
}

impl Desk {
    /// What operators did, the newest first, after an act's number.
    ///
    /// # Errors
    /// The database is away.
    pub async fn acts(
        &self,
        question: &AuditQuestion,
        after: Option<i64>,
        limit: i64,
    ) -> Result<Page<AuditRecord>, Refusal> {
        let (since, until) = self.window(question.since, question.until).await?;
        let filter = AuditFilter {
            operator: question.operator.clone(),
            act: question.act.clone(),
            since,
            until,
        };
        let acts = self.store.audit(&filter, after.unwrap_or(i64::MAX), limit + 1).await?;
        // Another version may have written acts that this one does not know: what is there is shown.
        if let (true, Some(act)) = (acts.is_empty(), &question.act)
            && !ACTS.contains(&act.as_str())
        {
            let nearest = ACTS.into_iter().min_by_key(|known| strsim::osa_distance(known, act));
            return Err(Refusal::usage(format!("no act is called {act:?}")).hint(format!(
                "did you mean `{}`? The acts are: {}",
                nearest.unwrap_or_default(),
                ACTS.join(", ")
            )));
        }
        Ok(Page::of(acts, limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_found_by_their_beginning() {
        let id = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
        let name = |text: &str| LetterName::parse(text).map(|named| named.name);
        let range = |text: &str| match name(text) {
            Ok(Name::Ids(first, last)) => Some((first.to_string(), last.to_string())),
            Ok(Name::Digest(_)) | Err(_) => None,
        };
        assert_eq!(range(id), Some((id.to_owned(), id.to_owned())));
        assert_eq!(
            range("3F25-04"),
            Some((
                "3f250400-0000-0000-0000-000000000000".to_owned(),
                "3f2504ff-ffff-ffff-ffff-ffffffffffff".to_owned()
            ))
        );
        assert!(matches!(name(&"ab".repeat(32)), Ok(Name::Digest(_))));
        for text in [
            "",
            "3f2",
            "3f25x",
            "3f2504e04f8941d39a0c0305e82c33010",
            &"ab".repeat(31),
        ] {
            assert!(name(text).is_err(), "{text}");
        }
    }
}
