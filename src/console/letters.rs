//! Letters: a list by filters, in pages, frozen until somebody asks to see what came since; and what is done with all of it.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use jiff::Timestamp;
use uuid::Uuid;

use super::{
    Site,
    answer::{NotDone, Notice, page},
    ask::Ask,
    export,
    fields::{pairs_of, query_of},
    frame::Frame,
    routes::Screen,
    shown::{At, Chip, Digits, short},
};
use crate::{
    desk::{DeadLetter, Moment, Plan, Plannable, Which},
    domain::{
        dead_letter::{MadeBy, State},
        reason::Reason,
    },
};

/// New ones that are counted at most.
const ARRIVED_MOST: i64 = 1_000;

struct Choice {
    value: String,
    label: String,
    on: bool,
}

#[derive(Template)]
#[template(path = "letters.html")]
struct LettersPage {
    frame: Frame,
    states: Vec<Choice>,
    reasons: Vec<Choice>,
    finals: Vec<Choice>,
    makers: Vec<Choice>,
    partner: String,
    nonce: String,
    allocation: String,
    group: String,
    since: String,
    until: String,
    /// None: what was asked for can not be.
    listed: Option<Listed>,
}

/// What a question found, and what may be done with all of it.
struct Listed {
    lines: Vec<LetterLine>,
    arrived: i64,
    arrived_most: i64,
    /// The same question of this moment.
    fresh: String,
    first: Option<String>,
    next: Option<String>,
    count: i64,
    /// There are more than these.
    more: bool,
    plannable: i64,
    planned_states: String,
    frozen: Vec<(&'static str, String)>,
    act_query: String,
    plan_barred: Option<String>,
    export_barred: Option<String>,
    purge_barred: Option<String>,
    plan_command: String,
    export_command: String,
    recipient: String,
}

struct LetterLine {
    id: Uuid,
    short: String,
    at: At,
    partner: String,
    reason: Reason,
    detail: String,
    nonce: String,
    state: Chip,
    seen: Digits,
}

/// Text that a line of a table has room for.
fn head(text: &str) -> String {
    const MOST: usize = 200;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    let mut head: String = text.chars().take(MOST).collect();
    head.push('…');
    head
}

/// A list as it is asked for.
struct Asked {
    which: Which,
    /// After this one, in the order of arrival, and of those that had come by then.
    after: i64,
    upto: Option<i64>,
    at: Option<Timestamp>,
}

impl Asked {
    fn read(ask: &Ask) -> Result<Self, NotDone> {
        let time = |text: &str| {
            text.parse::<Timestamp>()
                .map_err(|_| NotDone::wrong(format!("at: {text:?} is no time")))
        };
        Ok(Self {
            which: ask.fields.which()?,
            after: ask.fields.number("after")?.unwrap_or_default(),
            upto: ask.fields.number("upto")?,
            at: ask.fields.get("at").map(time).transpose()?,
        })
    }
}

pub(super) async fn letters(site: &Site, ask: &Ask, why_not: Option<NotDone>) -> Result<Response, NotDone> {
    // The form stays as it was filled in, and lists nothing.
    let form_alone = |which: &Which, why_not: NotDone| page(why_not.status, &form(ask, which, Some(why_not.notice)));
    let asked = match Asked::read(ask) {
        Ok(asked) => asked,
        Err(wrong) => return Ok(form_alone(&Which::default(), wrong)),
    };
    let which = asked.which.clone();
    match list(site, ask, asked, why_not.clone()).await {
        Err(away) if away.status == StatusCode::SERVICE_UNAVAILABLE => {
            let notice = why_not.map_or(away.notice, |why_not| why_not.notice);
            let status = away.status;
            Ok(form_alone(&which, NotDone { status, notice }))
        }
        listed => listed,
    }
}

/// How many a page and its question have: by what is on the page where that is all of them.
async fn counted(ask: &Ask, frozen: &Which, at: Timestamp, all: Option<&[DeadLetter]>) -> Result<Plannable, NotDone> {
    let Some(letters) = all else {
        return Ok(ask.desk.count_plannable(frozen).await?);
    };
    // Where no states are named the page shows what is due too, and a plan takes what is open.
    let is_of_then = |letter: &&DeadLetter| {
        (!frozen.states.is_empty() || letter.state == State::Open.as_str())
            && match frozen.until {
                Some(Moment::At(until)) if until == at.into() => letter.last_failed_at < at,
                _ => true,
            }
    };
    let is_planned = |letter: &&DeadLetter| frozen.made_by.is_some() || letter.made_by != MadeBy::Unknown.as_str();
    let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    Ok(Plannable {
        messages: number(letters.iter().filter(is_of_then).count()),
        more: false,
        planned: number(letters.iter().filter(is_of_then).filter(is_planned).count()).min(ask.desk.plan_max()),
    })
}

async fn list(site: &Site, ask: &Ask, asked: Asked, why_not: Option<NotDone>) -> Result<Response, NotDone> {
    let Asked { which, after, .. } = asked;
    let (newest, now) = tokio::try_join!(ask.desk.newest_letter(), ask.desk.clock())?;
    // A page is of the moment when its question was asked first: what came since is counted, and not mixed in.
    let upto = asked.upto.unwrap_or(newest);
    let asked_at = asked.at.unwrap_or(now);
    let limit = i64::from(site.settings.page);
    let mut found = ask.desk.letters(&which, after, limit).await?;
    let frozen = frozen(&which, asked_at);
    let all = (after == 0 && !found.more).then_some(found.items.as_slice());
    let arrived = async { Ok(ask.desk.letters_after(&which, upto, ARRIVED_MOST).await?) };
    let (arrived, counted) = tokio::try_join!(arrived, counted(ask, &frozen, asked_at, all))?;
    let before = found.items.len();
    found.items.retain(|letter| letter.cursor <= upto);
    let more = found.more && found.items.len() == before;
    let pairs = pairs_of(&which);
    let place = |after: Option<i64>| {
        let mut pairs = pairs.clone();
        pairs.push(("upto", upto.to_string()));
        pairs.push(("at", asked_at.to_string()));
        pairs.extend(after.map(|after| ("after", after.to_string())));
        query_of(&pairs)
    };
    let next = found.items.last().filter(|_| more).map(|last| place(Some(last.cursor)));
    let lines = found.items.into_iter().map(|letter| LetterLine {
        short: short(letter.id),
        id: letter.id,
        at: At(letter.last_failed_at),
        partner: letter.enterprise_id.unwrap_or_else(|| "–".to_owned()),
        reason: letter.why.reason,
        detail: head(&letter.why.detail),
        nonce: letter.nonce.map_or_else(|| "–".to_owned(), |nonce| head(&nonce)),
        state: Chip::of_letter(&letter.state),
        seen: Digits::of(letter.times_seen),
    });
    let wish = Plan {
        which: frozen.clone(),
        limit: None,
        seen: None,
        operator: ask.viewer.name.clone(),
    };
    let (status, notice) = NotDone::above(why_not);
    let listed = Listed {
        lines: lines.collect(),
        arrived,
        arrived_most: ARRIVED_MOST,
        fresh: query_of(&pairs),
        first: (after > 0).then(|| place(None)),
        next,
        count: counted.messages,
        more: counted.more,
        plannable: counted.planned,
        planned_states: if which.states.is_empty() {
            "open".to_owned()
        } else if which.states.len() == State::ALL.len() {
            "in any state".to_owned()
        } else {
            let states: Vec<&str> = which.states.iter().map(|state| state.as_str()).collect();
            states.join(" or ")
        },
        act_query: query_of(&pairs_of(&frozen)),
        frozen: pairs_of(&frozen),
        plan_barred: ask.barred(Screen::MakePlan),
        export_barred: ask.barred(Screen::Export),
        purge_barred: ask.barred(Screen::AskPurge),
        plan_command: wish.command().to_string(),
        export_command: export::exported(ask, frozen).command().to_string(),
        recipient: export::public_keys(ask).collect::<Vec<_>>().join(" "),
    };
    Ok(page(
        status,
        &LettersPage {
            listed: Some(listed),
            ..form(ask, &which, notice)
        },
    ))
}

/// The filters, as they are filled in.
fn form(ask: &Ask, which: &Which, notice: Option<Notice>) -> LettersPage {
    let field = |name: &str| ask.fields.get(name).unwrap_or_default().to_owned();
    let choices = |name: &str, all: Vec<(&str, &str)>| -> Vec<Choice> {
        let on = ask.fields.get(name).unwrap_or_default();
        all.into_iter()
            .map(|(value, label)| Choice {
                value: value.to_owned(),
                label: label.to_owned(),
                on: on == value,
            })
            .collect()
    };
    LettersPage {
        frame: ask.frame("letters", "Letters").with(notice),
        states: states(which),
        reasons: Reason::ALL
            .into_iter()
            .map(|reason| Choice {
                value: reason.to_string(),
                label: reason.to_string(),
                on: which.reasons.first() == Some(&reason),
            })
            .collect(),
        finals: choices(
            "final",
            vec![
                ("", "either"),
                ("no", "no: may settle later"),
                ("yes", "yes: never settles"),
            ],
        ),
        makers: choices(
            "made_by",
            std::iter::once(("", "anybody"))
                .chain(MadeBy::ALL.into_iter().map(|maker| (maker.as_str(), maker.as_str())))
                .collect(),
        ),
        partner: field("partner"),
        nonce: field("nonce"),
        allocation: field("allocation"),
        group: field("group"),
        since: field("since"),
        until: field("until"),
        listed: None,
    }
}

/// The question as it was asked at a moment: what fails later is none of it.
fn frozen(which: &Which, at: Timestamp) -> Which {
    Which {
        until: Some(which.until.unwrap_or(Moment::At(at.into()))),
        ..which.clone()
    }
}

fn states(which: &Which) -> Vec<Choice> {
    let one = match which.states.as_slice() {
        [] => "",
        [one] => one.as_str(),
        several if several.len() == State::ALL.len() => "all",
        _ => "",
    };
    [("", "waiting (open, due)")]
        .into_iter()
        .chain(State::ALL.into_iter().map(|state| (state.as_str(), state.as_str())))
        .chain([("all", "all")])
        .map(|(value, label)| Choice {
            value: value.to_owned(),
            label: label.to_owned(),
            on: value == one,
        })
        .collect()
}

/// Messages with their bodies, one a line. Who exported what stands in the audit before the first byte leaves.
pub(super) async fn export(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    match export::begin(ask).await {
        Ok(response) => Ok(response),
        Err(not_done) => letters(site, ask, Some(not_done)).await,
    }
}
