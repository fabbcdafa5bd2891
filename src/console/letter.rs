//! One letter: why, what the partner was told, the message itself, the allocation today, and what was done.

use std::collections::BTreeSet;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use serde_json::Value;
use uuid::Uuid;

use super::{
    answer::{NotDone, Notice, page},
    ask::Ask,
    fields::query_of,
    frame::Frame,
    shown::{self, At, Chip, Digits, Markup, MaybeAt, at, escaped, lines, short},
    trail::{ActLine, act_lines},
};
use crate::{
    desk::{Body, DeadLetter, FullLetter, LetterName, RefusalKind, ToldEvent},
    domain::reason::Reason,
};

#[derive(Template)]
#[template(path = "letter.html")]
struct LetterPage {
    frame: Frame,
    id: Uuid,
    short: String,
    state: Chip,
    reason: Reason,
    class: u16,
    again: &'static str,
    detail: String,
    advice: Option<&'static str>,
    operator_advice: Option<&'static str>,
    facts: Vec<(&'static str, Markup)>,
    allocation: Option<Vec<(&'static str, Markup)>>,
    body: Option<BodyShown>,
    bytes: Digits,
    command: String,
    replays: Vec<ReplayLine>,
    acts: Vec<ActLine>,
    links: Vec<(String, &'static str)>,
}

struct BodyShown {
    encoding: &'static str,
    rows: Vec<CompareRow>,
    differ: usize,
    lines: Vec<String>,
}

struct CompareRow {
    field: String,
    body: String,
    payload: String,
    differs: bool,
    chip: Chip,
}

struct ReplayLine {
    run: i64,
    at: MaybeAt,
    operator: String,
    why: String,
    planned: Chip,
    came: Markup,
}

pub(super) async fn letter(ask: &Ask, notice: Option<Notice>, with_body: bool) -> Result<Response, NotDone> {
    let named = LetterName::parse(&ask.part).map_err(|refusal| NotDone {
        status: StatusCode::NOT_FOUND,
        ..NotDone::from(refusal)
    })?;
    let operator = with_body.then_some(ask.viewer.name.as_str());
    let full = ask.desk.letter(&named, operator).await?;
    let told = match &full.told {
        Some(told) => Some(told_markup(ask, &full.dead_letter, told).await?),
        None => None,
    };
    Ok(page(StatusCode::OK, &shown(ask, full, told, notice)))
}

/// What the partner was told, and whether it left.
async fn told_markup(ask: &Ask, letter: &DeadLetter, told: &ToldEvent) -> Result<Markup, NotDone> {
    let name = format!("{} <code>{}</code>", escaped(&told.kind), told.event_id);
    let with = if letter.state == "settled" {
        ""
    } else {
        ", with the reason and the detail of this page"
    };
    // Of a message that is not written down in full the life is not known.
    let life = ask.desk.timeline(&letter.message_digest).await;
    let moment = match life {
        Ok(life) => life
            .timeline
            .into_iter()
            .find(|moment| moment.event_id == Some(told.event_id)),
        Err(refusal) if refusal.kind == RefusalKind::Refused => None,
        Err(refusal) => return Err(refusal.into()),
    };
    let left = moment.map_or_else(String::new, |moment| {
        let state = moment.detail.rsplit_once(": ").map_or("", |(_, state)| state);
        let said = match state {
            "confirmed" => "the broker has confirmed it",
            "pending" => "it waits to be published",
            _ => "the broker refused it",
        };
        format!("; written at {}, and {said}", at(&moment.at))
    });
    Ok(Markup(format!("{name}{with}{left}")))
}

fn text(text: &str) -> Markup {
    Markup(escaped(text))
}

fn code(of: impl ToString) -> Markup {
    Markup(format!("<code>{}</code>", escaped(&of.to_string())))
}

fn shown(ask: &Ask, full: FullLetter, told: Option<Markup>, notice: Option<Notice>) -> LetterPage {
    let letter = &full.dead_letter;
    let mut facts: Vec<(&'static str, Markup)> = vec![("id", code(letter.id))];
    let mut fact = |name: &'static str, value: Option<Markup>| facts.extend(value.map(|value| (name, value)));
    fact(
        "partner",
        letter.enterprise_id.as_deref().map(|id| {
            let id = escaped(id);
            Markup(format!("<a href=\"/partners/{id}\">{id}</a>"))
        }),
    );
    fact("nonce", letter.nonce.as_deref().map(text));
    fact("routing key", Some(text(&letter.routing_key)));
    fact(
        "made by",
        Some(match letter.made_by.as_str() {
            "settled" => text("the worker's verdict"),
            "broker" => text("the broker, by itself"),
            _ => text("nobody known: left out of plans unless asked for"),
        }),
    );
    let user = full
        .properties
        .as_ref()
        .and_then(|properties| properties.user_id.as_deref());
    fact("broker user", user.map(text));
    fact("signed by", full.recovered_key.as_deref().map(code));
    fact("digest", Some(code(&letter.message_digest)));
    fact(
        "group",
        Some(Markup(format!(
            "<a href=\"/letters?{}\"><code>{}</code></a>",
            escaped(&query_of(&[
                ("state", "open".to_owned()),
                ("group", letter.group.clone())
            ])),
            escaped(&letter.group)
        ))),
    );
    fact("failed first", Some(Markup(At(letter.first_failed_at).to_string())));
    fact("failed last", Some(Markup(At(letter.last_failed_at).to_string())));
    fact(
        "seen",
        Some(Markup(match letter.times_seen {
            1 => "once".to_owned(),
            times => format!("{times} times"),
        })),
    );
    fact("discarded", letter.discarded_at.map(|at| Markup(At(at).to_string())));
    fact("note", letter.note.as_deref().map(text));
    fact(
        "the partner was told",
        Some(told.unwrap_or_else(|| text("nothing: nobody judged it"))),
    );
    if let Some(id) = letter.allocation_id.filter(|_| full.allocation.is_none()) {
        facts.push(("allocation", Markup(format!("<code>{id}</code>, not reserved here"))));
    }
    let allocation = full.allocation.as_ref().map(|allocation| {
        vec![
            (
                "id",
                Markup(format!(
                    "<a href=\"/timeline?of={}\"><code>{}</code></a>",
                    allocation.id, allocation.id
                )),
            ),
            ("type", text(allocation.kind.as_str())),
            ("status", shown::status(allocation)),
            ("amount", shown::amount(&allocation.amount)),
            ("client", code(allocation.client_id)),
            ("connection", code(allocation.connection_id)),
            ("changed", Markup(At(allocation.updated_at).to_string())),
        ]
    });
    let mut links = Vec::new();
    let mut link = |pairs: Vec<(&'static str, String)>, said| {
        links.push((format!("/letters?{}", query_of(&pairs)), said));
    };
    let open = || ("state", "open".to_owned());
    link(vec![open(), ("group", letter.group.clone())], "All of this group");
    if let Some(nonce) = &letter.nonce {
        link(vec![open(), ("nonce", nonce.clone())], "This nonce only: plan it");
    }
    if let Some(id) = letter.allocation_id {
        links.push((format!("/timeline?of={id}"), "The allocation's life"));
    }
    let command = {
        let mut words = format!("settled dead-letters show {}", letter.id);
        if full.body.is_some() {
            words.push_str(" --body");
        }
        words
    };
    LetterPage {
        frame: ask
            .frame("letters", format!("Letter {}", short(letter.id)))
            .with(notice),
        id: letter.id,
        short: short(letter.id),
        state: Chip::of_letter(&letter.state),
        reason: letter.why.reason,
        class: letter.why.class,
        again: if letter.why.is_final {
            "final: the same bytes can never settle"
        } else {
            "not final: the same bytes may settle later"
        },
        detail: letter.why.detail.clone(),
        advice: full.advice,
        operator_advice: full.operator_advice,
        facts,
        allocation,
        body: full.body.as_ref().map(side_by_side),
        bytes: Digits::of(letter.body_bytes),
        command,
        replays: full
            .replays
            .into_iter()
            .map(|replay| ReplayLine {
                run: replay.run,
                at: MaybeAt(replay.judged_at),
                operator: replay.operator,
                why: replay.why,
                planned: Chip::of_verdict(&replay.planned),
                came: match (replay.verdict, replay.reason, replay.note) {
                    (Some(verdict), reason, _) => Markup(format!(
                        "{} {}",
                        Chip::of_verdict(&verdict),
                        escaped(&reason.unwrap_or_default())
                    )),
                    (None, _, note) => text(&note.unwrap_or(replay.state)),
                },
            })
            .collect(),
        acts: act_lines(full.acts),
        links,
    }
}

/// The body's fields beside those of the payload that was signed.
fn side_by_side(body: &Body) -> BodyShown {
    let read = |text: &str| serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
    let mut rows = Vec::new();
    if body.body_encoding == "utf-8"
        && let Some(said) = read(&body.body)
    {
        let payload = said["payload"].as_str().and_then(read).unwrap_or_default();
        let (mut ours, mut signed) = (Vec::new(), Vec::new());
        flat("", &said, &mut ours);
        flat("", &payload, &mut signed);
        let value = |side: &[(String, String)], field: &str| {
            let found = side.iter().find(|(name, _)| name == field);
            found.map(|(_, value)| value.clone())
        };
        let mut seen = BTreeSet::new();
        for (field, _) in ours.iter().chain(&signed) {
            if matches!(field.as_str(), "payload" | "signature") || !seen.insert(field.clone()) {
                continue;
            }
            let (left, right) = (value(&ours, field), value(&signed, field));
            // What may be left out of the payload is no difference.
            let differs = left.is_some() && right.is_some() && left != right;
            let chip = match (&left, &right) {
                (Some(_), None) => Chip::calm("not signed"),
                (None, Some(_)) => Chip::calm("signed only"),
                _ if differs => Chip::bad("differs"),
                _ => Chip::good("same"),
            };
            rows.push(CompareRow {
                field: field.clone(),
                body: left.unwrap_or_default(),
                payload: right.unwrap_or_default(),
                differs,
                chip,
            });
        }
    }
    BodyShown {
        encoding: body.body_encoding,
        differ: rows.iter().filter(|row| row.differs).count(),
        rows,
        lines: lines(&body.body),
    }
}

/// Every field by its path, with its value as text.
fn flat(before: &str, value: &Value, found: &mut Vec<(String, String)>) {
    /// An update has no deeper objects; what has is shown as it is.
    const DEEPEST: usize = 2;
    match value {
        Value::Object(members) if before.matches('.').count() < DEEPEST => {
            for (name, value) in members {
                let path = if before.is_empty() {
                    name.clone()
                } else {
                    format!("{before}.{name}")
                };
                flat(&path, value, found);
            }
        }
        Value::String(text) => found.push((before.to_owned(), text.clone())),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            found.push((before.to_owned(), value.to_string()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_marked() {
        let body = Body {
            body_encoding: "utf-8",
            body: r#"{"nonce": "n", "amount": {"currency": "BTC", "quantity": "1"}, "policyResult": "approved",
                      "payload": "{\"nonce\": \"n\", \"amount\": {\"quantity\": \"2\", \"currency\": \"BTC\"}}", "signature": "x"}"#
                .to_owned(),
        };
        let shown = side_by_side(&body);
        let row = |field: &str| shown.rows.iter().find(|row| row.field == field).expect(field);
        assert_eq!(shown.differ, 1);
        assert!(row("amount.quantity").differs && !row("amount.currency").differs && !row("nonce").differs);
        assert_eq!(row("policyResult").chip.word, "not signed");
        assert_eq!(shown.rows.len(), 4);
        for text in ["", "no JSON", "[]", "{\"payload\": 7}"] {
            let body = Body {
                body_encoding: "utf-8",
                body: text.to_owned(),
            };
            assert_eq!(side_by_side(&body).differ, 0, "{text}");
        }
    }
}
