//! Discard, restore, purge: asked on a page that says exactly how many, done by a form that says the same number again.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    again::{After, Typed, or_form},
    answer::{NotDone, Notice, page},
    ask::Ask,
    fields::{pairs_of, query_of},
    frame::Frame,
    routes::Screen,
    shown::At,
};
use crate::desk::{Author, Changed, Consent, Desk, ProposedPurge, Purge, Selection, StateChange, moment};

#[derive(Template)]
#[template(path = "act.html")]
struct ActPage {
    frame: Frame,
    heading: &'static str,
    about: &'static str,
    nothing: Option<String>,
    chosen: Vec<(&'static str, String)>,
    pairs: Vec<(&'static str, String)>,
    action: &'static str,
    messages: usize,
    why: String,
    button: String,
    button_mood: &'static str,
    barred: Option<String>,
    command: String,
}

/// Whoever only looks has no why yet.
fn author(ask: &Ask) -> Author {
    Author {
        operator: ask.viewer.name.clone(),
        why: ask.fields.get("why").unwrap_or("why").to_owned(),
    }
}

/// How many messages there are, if the form says the same number; and otherwise why not.
pub(super) fn must_be_seen<N>(ask: &Ask, messages: N) -> Result<N, NotDone>
where
    N: Copy + PartialEq + std::fmt::Display + std::str::FromStr,
{
    must_be_seen_as(ask, "seen", messages)
}

/// The same by another field of the form.
pub(super) fn must_be_seen_as<N>(ask: &Ask, field: &str, messages: N) -> Result<N, NotDone>
where
    N: Copy + PartialEq + std::fmt::Display + std::str::FromStr,
{
    let seen: N = must_say_seen(ask, field)?;
    if seen != messages {
        return Err(NotDone::changed(format!(
            "there are {messages} messages now, and the page said {seen}; nothing was done"
        ))
        .hint("look again, and decide again"));
    }
    Ok(messages)
}

/// How many messages the form says were seen.
pub(super) fn must_say_seen<N: std::str::FromStr>(ask: &Ask, field: &str) -> Result<N, NotDone> {
    ask.fields
        .number(field)?
        .ok_or_else(|| NotDone::wrong("the form does not say how many messages were seen; nothing was done"))
}

pub(super) async fn ask(ask: &Ask, change: StateChange, notice: Option<Notice>) -> Result<Response, NotDone> {
    let mut which = ask.fields.which()?;
    // What such an act changes is in one state: what is in another would only be counted.
    which.states.clear();
    let selection = Selection { plan: None, which };
    let pairs = pairs_of(&selection.which);
    let (messages, nothing) = if selection.which.is_given() {
        let selected = ask.desk.select(change, &selection).await?;
        let more = selected
            .more
            .then(|| "There are more than one act may take (dead_letters.plan_max): these are the oldest.".to_owned());
        (selected.messages(), more)
    } else {
        (0, Some("Choose some first: filter the letters.".to_owned()))
    };
    let (heading, about, action, word, mood, screen) = match change {
        StateChange::Discard => (
            "Discard",
            "Be done with open messages. They are kept, are not listed, planned or counted as open, and can be restored.",
            "/discard",
            "Discard",
            "danger",
            Screen::Discard,
        ),
        StateChange::Restore => (
            "Restore",
            "Open discarded messages again.",
            "/restore",
            "Restore",
            "main",
            Screen::Restore,
        ),
    };
    let status = if notice.is_some() {
        StatusCode::CONFLICT
    } else {
        StatusCode::OK
    };
    Ok(page(
        status,
        &ActPage {
            frame: ask.frame("letters", heading).with(notice),
            heading,
            about,
            nothing,
            chosen: pairs.clone(),
            pairs,
            action,
            messages,
            why: ask.fields.get("why").unwrap_or_default().to_owned(),
            button: format!("{word} {messages} messages"),
            button_mood: mood,
            barred: ask.barred(screen),
            command: change.command(&selection, &author(ask)).to_string(),
        },
    ))
}

pub(super) async fn change(ask: &Ask, change: StateChange) -> Result<Response, NotDone> {
    let mut which = ask.fields.which()?;
    which.states.clear();
    let selection = Selection { plan: None, which };
    match changed(ask, change, &selection).await {
        Ok(done) => Ok(done_page(ask, change, &done)),
        // The same page again, with why not.
        Err(not_done) => {
            let after = After::of("act", Err(not_done));
            let answered = self::ask(ask, change, Some(after.notice.clone())).await;
            or_form(ask, format!("/{}", change.as_str()), &after, answered)
        }
    }
}

/// Does it, if there are as many as the form says.
async fn changed(ask: &Ask, change: StateChange, selection: &Selection) -> Result<Changed, NotDone> {
    let author = ask.fields.author(&ask.viewer.name)?;
    let selected = ask.desk.select(change, selection).await?;
    // The number on the button is the number that was typed.
    let consent = Consent::Typed(Some(must_be_seen(ask, selected.messages())?));
    Ok(ask.desk.change(change, &selected, &author, consent).await?)
}

/// What an act came to, in words.
pub(super) fn said(change: StateChange, done: &Changed) -> Notice {
    let word = match change {
        StateChange::Discard => "discarded",
        StateChange::Restore => "restored",
    };
    let mut notice = Notice::good(format!("{word} {} messages (audit {})", done.changed, done.audit_id));
    if done.unchanged > 0 {
        notice.hint = Some(format!(
            "{} were not in the state for it, and are as they were",
            done.unchanged
        ));
    }
    notice
}

#[derive(Template)]
#[template(path = "message.html")]
struct DonePage {
    frame: Frame,
    heading: &'static str,
    sign_in: bool,
}

fn done_page(ask: &Ask, change: StateChange, done: &Changed) -> Response {
    page(
        StatusCode::OK,
        &DonePage {
            frame: ask.frame("letters", "Done").with(Some(said(change, done))),
            heading: "Done",
            sign_in: false,
        },
    )
}

// Purge --------------------------------------------------------------------------------------------------------------

#[derive(Template)]
#[template(path = "purge.html")]
struct PurgePage {
    frame: Frame,
    before: String,
    settled: bool,
    messages: Option<usize>,
    /// Plans that go with them.
    plans: usize,
    /// What others want, and takes one more.
    proposed: Vec<ProposedLine>,
    typed: Typed,
    /// The moment that was counted, as it is.
    exactly: String,
    barred: Option<String>,
    command: String,
}

/// A purge that somebody wants.
struct ProposedLine {
    operator: String,
    why: String,
    at: At,
    until: At,
    before: String,
    settled: bool,
    /// What follows the `?`.
    query: String,
}

impl ProposedLine {
    fn of(one: ProposedPurge) -> Self {
        let mut pairs = vec![("before", one.before.clone())];
        pairs.extend(one.settled.then(|| ("settled", "yes".to_owned())));
        Self {
            operator: one.voice.operator,
            why: one.voice.why,
            at: At(one.voice.at),
            until: At(one.voice.expires_at),
            before: one.before,
            settled: one.settled,
            query: query_of(&pairs),
        }
    }
}

async fn wish(ask: &Ask, desk: &Desk, author: Author) -> Result<Option<Purge>, NotDone> {
    let Some(text) = ask.fields.get("before") else {
        return Ok(None);
    };
    let before = moment(text.trim()).map_err(|why| NotDone::wrong(format!("discarded before: {why}")))?;
    // A moment, so that what is counted now is what is deleted then.
    let before = match before {
        crate::desk::Moment::Ago(ago) => {
            let now = desk.clock().await?;
            crate::desk::Moment::At(now.saturating_sub(ago).unwrap_or(jiff::Timestamp::MIN).into())
        }
        at @ crate::desk::Moment::At(_) => at,
    };
    Ok(Some(Purge {
        discarded_before: before,
        settled: ask.fields.is_on("settled"),
        author,
    }))
}

pub(super) async fn ask_purge(ask: &Ask, why_not: Option<NotDone>) -> Result<Response, NotDone> {
    let after = why_not.clone().map(|why_not| After::of("purge", Err(why_not)));
    let counted = async {
        let wish = wish(ask, &ask.desk, author(ask)).await?;
        let purgeable = match &wish {
            Some(wish) => Some(ask.desk.purgeable(wish).await?),
            None => None,
        };
        Ok::<_, NotDone>((wish, purgeable, ask.desk.proposed_purges().await?))
    };
    let (wish, purgeable, proposed, why_not) = match counted.await {
        Ok((wish, purgeable, proposed)) => (wish, purgeable, proposed, why_not),
        // Where somebody acted already, their form stands alone.
        Err(away) if after.is_some() && away.status == StatusCode::SERVICE_UNAVAILABLE => return Err(away),
        // The form stays as it was filled in, and counts nothing.
        Err(wrong) => (None, None, Vec::new(), why_not.or(Some(wrong))),
    };
    let exactly = wish.as_ref().map(|wish| match wish.discarded_before {
        crate::desk::Moment::At(at) => at.to_string(),
        crate::desk::Moment::Ago(_) => String::new(),
    });
    let (status, notice) = NotDone::above(why_not);
    Ok(page(
        status,
        &PurgePage {
            frame: ask.frame("letters", "Purge").with(notice),
            before: ask.fields.get("before").unwrap_or_default().to_owned(),
            settled: ask.fields.is_on("settled"),
            typed: Typed::of(ask, after.as_ref()),
            messages: purgeable.map(|purgeable| purgeable.messages),
            plans: purgeable.map_or(0, |purgeable| purgeable.plans),
            proposed: proposed.into_iter().map(ProposedLine::of).collect(),
            exactly: exactly.unwrap_or_default(),
            barred: ask.barred(Screen::Purge),
            command: wish.map(|wish| wish.command().to_string()).unwrap_or_default(),
        },
    ))
}

pub(super) async fn purge(ask: &Ask) -> Result<Response, NotDone> {
    match purged(ask).await {
        Ok(notice) => Ok(page(
            StatusCode::OK,
            &DonePage {
                frame: ask.frame("letters", "Done").with(Some(notice)),
                heading: "Done",
                sign_in: false,
            },
        )),
        // The same page again, with why not.
        Err(not_done) => {
            let after = After::of("purge", Err(not_done.clone()));
            or_form(ask, "/purge".to_owned(), &after, ask_purge(ask, Some(not_done)).await)
        }
    }
}

async fn purged(ask: &Ask) -> Result<Notice, NotDone> {
    let author = ask.fields.author(&ask.viewer.name)?;
    let wish = wish(ask, &ask.desk, author)
        .await?
        .ok_or_else(|| NotDone::wrong("say before when; nothing was done"))?;
    let purgeable = ask.desk.purgeable(&wish).await?;
    let consent = Consent::Typed(Some(must_be_seen(ask, purgeable.messages)?));
    let done = ask.desk.purge(&wish, purgeable, consent).await?;
    Ok(Notice::good(if done.is_proposed() {
        format!(
            "nothing is purged yet (audit {}): it takes two people, the second names the same time, as RFC 3339",
            done.audit_id
        )
    } else {
        format!(
            "purged {} messages and {} plans for ever (audit {})",
            done.purged, done.plans, done.audit_id
        )
    }))
}
