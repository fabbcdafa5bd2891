//! Partners: who may speak, with which keys, for which connections; and refusing one's updates, or taking them again.

use std::collections::BTreeMap;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use uuid::Uuid;

use super::{
    Site,
    again::{After, Typed, or_form},
    answer::{NotDone, Notice, page, status_under},
    ask::Ask,
    fields::query_of,
    frame::Frame,
    routes::Screen,
    shown::{At, Chip, Digits, Markup, MaybeAt, at, escaped},
};
use crate::{
    desk::{Author, By, PartnerAct, PartnerRecord, PartnerSeen, RefusalKind, Registered, Which},
    domain::reason::Reason,
};

/// Connections that a page shows.
const CONNECTIONS_MAX: i64 = 50;

#[derive(Template)]
#[template(path = "partners.html")]
struct PartnersPage {
    frame: Frame,
    lines: Vec<PartnerListLine>,
    next: Option<String>,
    /// Whether it begins elsewhere than here.
    first: bool,
}

struct PartnerListLine {
    id: String,
    name: String,
    state: Chip,
    later: String,
    queue: &'static str,
    user: String,
    seen: Markup,
    at: At,
}

pub(super) fn state(partner: &PartnerRecord) -> Chip {
    match (partner.quarantined_at, partner.suspended_at) {
        (Some(_), Some(_)) => Chip::warn("suspended, in quarantine"),
        (Some(_), None) => Chip::warn("in quarantine"),
        (None, Some(_)) => Chip::warn("suspended"),
        (None, None) => Chip::good("active"),
    }
}

fn later(partner: &PartnerRecord) -> String {
    let kinds = [
        (partner.async_allocations, "allocations"),
        (partner.async_deallocations, "deallocations"),
    ];
    let said: Vec<&str> = kinds.into_iter().filter(|(on, _)| *on).map(|(_, kind)| kind).collect();
    if said.is_empty() {
        return "nothing".to_owned();
    }
    said.join(", ")
}

fn queue(partner: &PartnerRecord) -> &'static str {
    if partner.own_queue { "its own" } else { "the common one" }
}

/// When something of it came last, and how one knows that it was its own.
fn last_seen(seen: &PartnerSeen) -> Markup {
    let ways = [
        (seen.signed_at, "signed by a key of its own"),
        (seen.held_at, "held, and not judged yet"),
        (seen.refused_at, "refused, whoever sent it"),
    ];
    // Of two at once, the one that says more.
    let last = ways.into_iter().rev().filter_map(|(at, how)| Some((at?, how)));
    match last.max_by_key(|(at, _)| *at) {
        None => Markup("<span class=\"dim\">nothing came yet</span>".to_owned()),
        Some((at, how)) => Markup(format!("{} <span class=\"dim\">{how}</span>", At(at))),
    }
}

pub(super) async fn partners(ask: &Ask) -> Result<Response, NotDone> {
    let after = ask.fields.get("after");
    let found = ask.desk.partners_page(after).await?;
    let ids: Vec<String> = found
        .items
        .iter()
        .map(|partner| partner.enterprise_id.clone())
        .collect();
    let seen = ask.desk.partners_seen(&ids).await?;
    let next = found.items.last().filter(|_| found.more);
    let next = next.map(|last| query_of(&[("after", last.enterprise_id.clone())]));
    let lines = found.items.into_iter().map(|partner| PartnerListLine {
        seen: last_seen(&seen.get(&partner.enterprise_id).copied().unwrap_or_default()),
        state: state(&partner),
        later: later(&partner),
        queue: queue(&partner),
        at: At(partner.created_at),
        user: partner.broker_user.unwrap_or_else(|| "any".to_owned()),
        name: partner.name,
        id: partner.enterprise_id,
    });
    Ok(page(
        StatusCode::OK,
        &PartnersPage {
            frame: ask.frame("partners", "Partners"),
            lines: lines.collect(),
            first: after.is_some(),
            next,
        },
    ))
}

#[derive(Template)]
#[template(path = "partner.html")]
struct PartnerPage {
    frame: Frame,
    id: String,
    state: Chip,
    facts: Vec<(&'static str, Markup)>,
    letters: Vec<ReasonCount>,
    keys: Vec<KeyLine>,
    symbols: Vec<SymbolLine>,
    connections: Vec<ConnectionLine>,
    /// Where its connections go on.
    next: Option<String>,
    /// Whether they begin elsewhere than here.
    first: bool,
    balances: Vec<(String, Digits, Digits)>,
    forms: Vec<PartnerForm>,
    typed: Typed,
}

/// What may be done to it.
struct PartnerForm {
    key: &'static str,
    word: &'static str,
    about: &'static str,
    mood: &'static str,
    barred: Option<String>,
    command: String,
}

struct ReasonCount {
    reason: Reason,
    first: Markup,
    last: Markup,
    messages: Digits,
}

struct KeyLine {
    key: String,
    state: Chip,
    from: Markup,
    until: Markup,
    used: MaybeAt,
    revoked: MaybeAt,
}

struct SymbolLine {
    symbol: String,
    currency: String,
    at: At,
}

struct ConnectionLine {
    id: Uuid,
    client: Uuid,
    partners_client: String,
    partners_connection: String,
    at: At,
}

pub(super) async fn partner(site: &Site, ask: &Ask, after: Option<After>) -> Result<Response, NotDone> {
    let id = ask.part.as_str();
    let record = ask.desk.partner(id).await.map_err(|refusal| NotDone {
        status: match refusal.kind {
            RefusalKind::Refused => StatusCode::NOT_FOUND,
            _ => NotDone::from(refusal.clone()).status,
        },
        ..NotDone::from(refusal)
    })?;
    let which = Which {
        partner: Some(record.enterprise_id.clone()),
        ..Which::default()
    };
    let connection_after = ask.fields.connection_after()?;
    // Each by itself, at once.
    let (stats, keys, symbols, connections, balances, seen, judged) = tokio::join!(
        ask.desk.stats(&which),
        ask.desk.keys(Some(id)),
        ask.desk.symbols(Some(id), false),
        ask.desk.connections_of(id, connection_after, CONNECTIONS_MAX),
        ask.desk.partner_balances(id, None, 1),
        ask.desk.partners_seen(std::slice::from_ref(&record.enterprise_id)),
        judged(site, id),
    );
    let (letters, keys, symbols, connections) = (stats?.reasons, keys?, symbols?, connections?);
    let next = connections.items.last().filter(|_| connections.more);
    let next = next.map(|last| query_of(&[("connections_after", last.connection_id.to_string())]));
    let mut sums = BTreeMap::<String, (String, String)>::new();
    for balance in balances?.all {
        sums.insert(balance.currency, (balance.held, balance.allocated));
    }
    let status = status_under(after.as_ref().map(|after| &after.notice));
    let typed = Typed::of(ask, after.as_ref());
    let seen = seen?.get(id).copied().unwrap_or_default();
    let forms = forms(ask, &record);
    let text = |text: &str| Markup(escaped(text));
    let facts = vec![
        ("name", text(&record.name)),
        ("settles later", text(&later(&record))),
        ("queue", text(queue(&record))),
        ("broker user", text(record.broker_user.as_deref().unwrap_or("any"))),
        ("suspended", Markup(MaybeAt(record.suspended_at).to_string())),
        ("in quarantine", Markup(MaybeAt(record.quarantined_at).to_string())),
        ("because", text(record.quarantine_reason.as_deref().unwrap_or("–"))),
        ("last seen", last_seen(&seen)),
        ("judged", text(&judged)),
        ("registered", Markup(At(record.created_at).to_string())),
    ];
    Ok(page(
        status,
        &PartnerPage {
            frame: ask
                .frame("partners", record.enterprise_id.clone())
                .with(after.map(|after| after.notice)),
            state: state(&record),
            typed,
            facts,
            letters: letters
                .into_iter()
                .map(|line| ReasonCount {
                    reason: line.reason,
                    first: at(&line.first_failed_at),
                    last: at(&line.last_failed_at),
                    messages: Digits::of(line.messages),
                })
                .collect(),
            keys: keys
                .into_iter()
                .map(|key| KeyLine {
                    state: match (key.valid, key.revoked_at) {
                        (true, _) => Chip::good("valid"),
                        (false, Some(_)) => Chip::bad("revoked"),
                        (false, None) => Chip::calm("not valid now"),
                    },
                    from: at(&key.valid_from.to_string()),
                    until: key
                        .valid_until
                        .map_or_else(|| Markup("–".to_owned()), |until| at(&until.to_string())),
                    used: MaybeAt(key.last_used_at),
                    revoked: MaybeAt(key.revoked_at),
                    key: key.public_key,
                })
                .collect(),
            symbols: symbols
                .into_iter()
                .map(|line| SymbolLine {
                    at: At(line.since),
                    symbol: line.symbol,
                    currency: line.currency,
                })
                .collect(),
            connections: connections
                .items
                .into_iter()
                .map(|line| ConnectionLine {
                    id: line.connection_id,
                    client: line.client_id,
                    at: At(line.created_at),
                    partners_client: line.partners_client_id,
                    partners_connection: line.partners_connection_id,
                })
                .collect(),
            next,
            first: connection_after.is_some(),
            balances: sums
                .into_iter()
                .map(|(currency, (held, allocated))| (currency, Digits::of(held), Digits::of(allocated)))
                .collect(),
            forms,
            id: record.enterprise_id,
        },
    ))
}

/// What the workers that are watched have judged of it since they were started.
async fn judged(site: &Site, id: &str) -> String {
    if site.settings.workers.is_empty() {
        return "nobody knows: no worker is watched (console.workers)".to_owned();
    }
    let told = site.live.looks.workers().await;
    let Some(workers) = told.answer.filter(|workers| workers.counted) else {
        return "nobody knows: no worker says what it counts".to_owned();
    };
    let Some(count) = workers.ever.get(id) else {
        return "nothing that workers count by its name, since they were started".to_owned();
    };
    let rejected = count.rejected_percent().unwrap_or_else(|| "0.0 %".to_owned());
    format!(
        "{} since the workers were started, {} of them refused ({rejected})",
        count.messages, count.rejected
    )
}

/// What is done to a partner as it is.
fn forms(ask: &Ask, record: &PartnerRecord) -> Vec<PartnerForm> {
    let author = Author {
        operator: ask.viewer.name.clone(),
        why: "why".to_owned(),
    };
    let form = |act: PartnerAct, screen, word, mood, about| PartnerForm {
        key: act.as_str(),
        word,
        about,
        mood,
        barred: ask.barred(screen),
        command: act.command(&record.enterprise_id, &author).to_string(),
    };
    let mut forms = Vec::new();
    if record.suspended_at.is_some() || record.quarantined_at.is_some() {
        forms.push(form(
            PartnerAct::Resume,
            Screen::ResumePartner,
            "Resume",
            "main",
            "Its updates are taken again, from the worker's next batch on; what was held is judged then, oldest first. What was \
             refused meanwhile can be replayed.",
        ));
    }
    if record.quarantined_at.is_none() {
        forms.push(form(
            PartnerAct::Quarantine,
            Screen::Quarantine,
            "Quarantine",
            "danger",
            "Its updates are held from the worker's next batch on, instead of being judged, until somebody resumes it.",
        ));
    }
    if record.suspended_at.is_none() {
        forms.push(form(
            PartnerAct::Suspend,
            Screen::Suspend,
            "Suspend",
            "danger",
            "Its updates are refused from the worker's next batch on (partner_inactive), and can be replayed later.",
        ));
    }
    forms
}

pub(super) async fn act(site: &Site, ask: &Ask, act: PartnerAct) -> Result<Response, NotDone> {
    let word = match act {
        PartnerAct::Suspend => "suspended",
        PartnerAct::Quarantine => "in quarantine",
        PartnerAct::Resume => "resumed",
    };
    let done = async {
        let author = ask.fields.author(&ask.viewer.name)?;
        let by = By {
            operator: &author.operator,
            why: Some(&author.why),
        };
        Ok(match ask.desk.act_on_partner(&ask.part, act, by).await? {
            Registered::Updated(record) => Notice::good(format!("{} is {word}", record.enterprise_id)),
            _ => Notice::good(format!("{} was so already; nothing was changed", ask.part)),
        })
    };
    let after = After::of(act.as_str(), done.await);
    let answered = partner(site, ask, Some(after.clone())).await;
    or_form(
        ask,
        format!("/partners/{}/{}", ask.part, act.as_str()),
        &after,
        answered,
    )
}
