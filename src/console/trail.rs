//! What was done (audit), and what is still to be told (outbox).

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    Site,
    acts::must_be_seen,
    again::{After, Typed, or_form},
    answer::{NotDone, Notice, page, status_under},
    ask::Ask,
    fields::query_of,
    frame::Frame,
    routes::Screen,
    shown::{At, Chip, Digits},
};
use crate::{
    desk::{AuditQuestion, AuditRecord, Author, PublicationStanding, Refused, Retry, moment},
    plain::brief,
};

/// An act, as a line of a table.
pub(super) struct ActLine {
    pub(super) id: i64,
    pub(super) at: At,
    pub(super) operator: String,
    pub(super) act: String,
    pub(super) why: String,
    pub(super) filters: String,
    pub(super) outcome: String,
    pub(super) user: String,
}

pub(super) fn act_lines(acts: Vec<AuditRecord>) -> Vec<ActLine> {
    acts.into_iter()
        .map(|act| ActLine {
            id: act.id,
            at: At(act.at),
            user: act.signed().unwrap_or_else(|| "–".to_owned()),
            operator: act.operator,
            act: act.act,
            why: act.why.unwrap_or_default(),
            filters: brief(&act.filters),
            outcome: brief(&act.outcome),
        })
        .collect()
}

#[derive(Template)]
#[template(path = "audit.html")]
struct AuditPage {
    frame: Frame,
    operator: String,
    act: String,
    since: String,
    until: String,
    lines: Vec<ActLine>,
    next: Option<String>,
    command: String,
}

pub(super) async fn audit(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let field = |name: &str| ask.fields.get(name).map(str::to_owned);
    let time = |name: &str| match ask.fields.get(name) {
        None => Ok(None),
        Some(text) => moment(text.trim())
            .map(Some)
            .map_err(|why| NotDone::wrong(format!("{name}: {why}"))),
    };
    let read = || {
        let question = AuditQuestion {
            operator: field("operator"),
            act: field("act"),
            since: time("since")?,
            until: time("until")?,
        };
        Ok::<_, NotDone>((question, ask.fields.number("after")?))
    };
    let said = |name: &str| field(name).unwrap_or_default();
    // The form stays as it was filled in, whatever comes of it.
    let form = AuditPage {
        frame: ask.frame("audit", "Audit"),
        operator: said("operator"),
        act: said("act"),
        since: said("since"),
        until: said("until"),
        lines: Vec::new(),
        next: None,
        command: AuditQuestion::default().command().to_string(),
    };
    let (question, after) = match read() {
        Ok(asked) => asked,
        Err(wrong) => {
            let (status, notice) = NotDone::above(Some(wrong));
            let frame = ask.frame("audit", "Audit").with(notice);
            return Ok(page(status, &AuditPage { frame, ..form }));
        }
    };
    let limit = i64::from(site.settings.page);
    let found = match ask.desk.acts(&question, after, limit).await {
        Ok(found) => found,
        Err(refusal) => {
            let (status, notice) = NotDone::above(Some(refusal.into()));
            let frame = ask.frame("audit", "Audit").with(notice);
            return Ok(page(status, &AuditPage { frame, ..form }));
        }
    };
    let next = found.items.last().filter(|_| found.more).map(|last| {
        let mut pairs = vec![("after", last.id.to_string())];
        for name in ["operator", "act", "since", "until"] {
            pairs.extend(field(name).map(|value| (name, value)));
        }
        query_of(&pairs)
    });
    Ok(page(
        StatusCode::OK,
        &AuditPage {
            lines: act_lines(found.items),
            next,
            command: question.command().to_string(),
            ..form
        },
    ))
}

// Outbox -------------------------------------------------------------------------------------------------------------

#[derive(Template)]
#[template(path = "outbox.html")]
struct OutboxPage {
    frame: Frame,
    lines: Vec<PublicationLine>,
    /// There are more than these.
    more: bool,
    typed: Typed,
    refused: usize,
    ids: Vec<i64>,
    barred: Option<String>,
    command: String,
}

struct PublicationLine {
    id: String,
    state: Chip,
    routing_key: String,
    message: String,
    at: At,
    why: String,
    bytes: Digits,
}

pub(super) async fn outbox(site: &Site, ask: &Ask, after: Option<After>) -> Result<Response, NotDone> {
    let found = ask.desk.unpublished(i64::from(site.settings.page)).await?;
    let (found, more) = (found.items, found.more);
    let ids: Vec<i64> = found
        .iter()
        .filter(|pending| pending.state == PublicationStanding::Refused)
        .filter_map(|pending| pending.id)
        .collect();
    let status = status_under(after.as_ref().map(|after| &after.notice));
    let typed = Typed::of(ask, after.as_ref());
    let dash = || "–".to_owned();
    let lines = found.into_iter().map(|pending| PublicationLine {
        id: pending.id.map_or_else(dash, |id| id.to_string()),
        state: match pending.state {
            PublicationStanding::Waiting => Chip::busy("waiting"),
            PublicationStanding::Refused => Chip::bad("refused"),
        },
        routing_key: pending.routing_key.unwrap_or_else(dash),
        message: pending.message_id.unwrap_or_else(dash),
        at: At(pending.since),
        why: pending.why.unwrap_or_default(),
        bytes: Digits::of(pending.bytes),
    });
    let retry = Retry {
        which: Refused::Ids(ids.clone()),
        author: Author {
            operator: ask.viewer.name.clone(),
            why: "why".to_owned(),
        },
    };
    Ok(page(
        status,
        &OutboxPage {
            frame: ask.frame("outbox", "Outbox").with(after.map(|after| after.notice)),
            more,
            typed,
            lines: lines.collect(),
            refused: ids.len(),
            ids,
            barred: ask.barred(Screen::Retry),
            command: retry.command().to_string(),
        },
    ))
}

/// Publishes again exactly those that the page showed.
pub(super) async fn retry(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let done = async {
        let ids = ask
            .fields
            .all("id")
            .map(str::parse)
            .collect::<Result<Vec<i64>, _>>()
            .map_err(|_| NotDone::wrong("id: no number; nothing was done"))?;
        if must_be_seen(ask, ids.len())? == 0 {
            return Err(NotDone::wrong("none is chosen; nothing was done"));
        }
        let wish = Retry {
            which: Refused::Ids(ids),
            author: ask.fields.author(&ask.viewer.name)?,
        };
        let retried = ask.desk.retry(&wish, |_, _| {}).await?;
        let text = format!(
            "{} published, {} refused again, {} wait for a worker, {} left",
            retried.published, retried.refused, retried.waiting, retried.left
        );
        Ok(if retried.is_done() {
            Notice::good(text)
        } else {
            Notice::bad(text)
        })
    };
    let after = After::of("retry", done.await);
    let answered = outbox(site, ask, Some(after.clone())).await;
    or_form(ask, "/outbox/retry".to_owned(), &after, answered)
}
