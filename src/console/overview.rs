//! The overview: how things stand, at three in the morning.

use std::time::Duration;

use askama::{Template, filters::HtmlSafe};
use axum::response::Response;
use hyper::StatusCode;

use super::{
    Site,
    answer::{NotDone, Notice, page},
    ask::Ask,
    chart,
    frame::Frame,
    looks::{Look, Looks},
    shared::Told,
    shown::{Chip, Digits, Markup, fit, lasting},
    workers::{WorkerLine, WorkersSeen},
};
use crate::{
    desk::{MinuteOfBatches, QueueStanding, Standing},
    domain::reason::{Reason, Turn},
};

/// One number, large.
struct Tile {
    mood: &'static str,
    label: &'static str,
    value: Markup,
    note: String,
    path: Option<&'static str>,
}

struct ReasonLine {
    reason: Reason,
    who: &'static str,
    messages: Digits,
}

struct PartnerLine {
    id: String,
    chip: Chip,
    /// Judged in the last minute, and how many of a hundred were refused: where workers are watched.
    judged: String,
    rejected: String,
    open: Digits,
    parked: Digits,
}

/// Everything that is seen anew.
#[derive(Template)]
#[template(path = "standing.html")]
struct Fragment {
    aways: Vec<Away>,
    tiles: Vec<Tile>,
    chart: Option<Markup>,
    /// Whether the settings name workers.
    watched: bool,
    workers: Vec<WorkerLine>,
    /// Of how much time the workers' numbers are; none: of none yet.
    over: Option<String>,
    reasons: Vec<ReasonLine>,
    partners: Vec<PartnerLine>,
    more_partners: usize,
}

// It is a template itself: what stands in it is escaped.
impl HtmlSafe for Fragment {}

#[derive(Template)]
#[template(path = "overview.html")]
struct Overview {
    frame: Frame,
    seen: Fragment,
}

/// One that does not answer.
struct Away {
    notice: Notice,
    /// How old what stands here of it is; none: nothing does.
    age: Option<String>,
}

/// What is said of one that does not answer.
fn away<T>(who: &str, told: &Told<T>) -> Option<Away> {
    let mut notice = Notice::from(told.why_not.as_ref()?);
    notice.text = format!("{who}: {}", notice.text);
    Some(Away {
        notice,
        age: told.answer.as_ref().map(|_| lasting(told.age)),
    })
}

impl Fragment {
    /// What is away is said; what is not is shown.
    fn of(look: &Look) -> Self {
        let aways = [
            away("the database", &look.standing),
            away("the broker", &look.queues),
            away("the workers", &look.workers),
        ];
        let mut fragment = Fragment {
            aways: aways.into_iter().flatten().collect(),
            tiles: Vec::new(),
            chart: None,
            watched: look.watched,
            workers: Vec::new(),
            over: None,
            reasons: Vec::new(),
            partners: Vec::new(),
            more_partners: 0,
        };
        let standing = look.standing.answer.as_deref();
        let queues = look.queues.answer.as_deref().map(Vec::as_slice);
        fragment.tiles.extend(queue_tiles(queues.unwrap_or_default(), standing));
        let workers = look.workers.answer.as_deref();
        if let Some(workers) = workers {
            fragment.workers.clone_from(&workers.lines);
            fragment.over = workers.over.map(lasting);
        }
        if let Some(standing) = standing {
            fragment.add(standing, workers);
        }
        fragment
    }
}

/// The part of the page that is seen anew.
pub(super) async fn fragment(looks: &Looks) -> String {
    fit(&Fragment::of(&looks.look().await).render().unwrap_or_default())
}

pub(super) async fn overview(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let overview = Overview {
        frame: ask.frame("overview", "Overview"),
        seen: Fragment::of(&site.live.looks.look().await),
    };
    Ok(page(StatusCode::OK, &overview))
}

fn tile(mood: &'static str, label: &'static str, value: impl ToString, note: impl Into<String>) -> Tile {
    Tile {
        mood,
        label,
        value: Markup(Digits::of(value).to_string()),
        note: note.into(),
        path: None,
    }
}

/// What waits at the broker: the common queue with partners' own, dead letters, and what nobody can read.
fn queue_tiles(queues: &[QueueStanding], standing: Option<&Standing>) -> Vec<Tile> {
    if queues.is_empty() {
        return Vec::new();
    }
    let sum = |of: &dyn Fn(&str) -> bool| -> (u64, Option<String>) {
        let mut sum = 0;
        let mut unseen = None;
        for queue in queues.iter().filter(|queue| of(&queue.queue)) {
            match &queue.messages {
                Ok(messages) => sum += u64::from(*messages),
                Err(why) => unseen = Some(format!("{}: {why}", queue.queue)),
            }
        }
        (sum, unseen)
    };
    let (waiting, unseen) = sum(&|name| name.starts_with("settlement.updates"));
    let note = |unseen: Option<String>, said: &str| unseen.unwrap_or_else(|| said.to_owned());
    let (dead, dead_unseen) = sum(&|name| name == "settlement.dead");
    let (unreadable, unreadable_unseen) = sum(&|name| name == "settlement.unreadable");
    let mut tiles = vec![
        tile(
            if waiting > 0 { "busy" } else { "good" },
            "in the queue",
            waiting,
            note(unseen, &how_long(waiting, standing)),
        ),
        tile(
            if dead > 0 { "busy" } else { "good" },
            "dead, not collected",
            dead,
            note(dead_unseen, "wait in settlement.dead"),
        ),
    ];
    if unreadable > 0 || unreadable_unseen.is_some() {
        tiles.push(tile(
            "bad",
            "unreadable",
            unreadable,
            note(unreadable_unseen, "look at settlement.unreadable"),
        ));
    }
    tiles
}

/// Over how long the rate is told.
const SECONDS: i64 = 300;

/// How long what waits at the broker will wait yet. For how long it has, no broker says.
fn how_long(waiting: u64, standing: Option<&Standing>) -> String {
    const UNSAID: &str = "wait to be settled; since when, the broker does not say";
    let received = standing.map_or(0, |standing| rate(standing).1);
    let seconds = u64::try_from(SECONDS)
        .unwrap_or_default()
        .saturating_mul(waiting)
        .checked_div(u64::try_from(received).unwrap_or_default());
    match (waiting, seconds) {
        (0, _) => "nothing waits to be settled".to_owned(),
        (_, Some(seconds)) => format!(
            "{UNSAID}. As fast as in the last minutes it takes {}",
            lasting(Duration::from_secs(seconds.max(1)))
        ),
        (_, None) => UNSAID.to_owned(),
    }
}

/// Messages a second, over the whole minutes of the last five.
fn rate(standing: &Standing) -> (String, i64) {
    let this_minute = standing.at.as_second().div_euclid(60);
    let recent = |minute: &&MinuteOfBatches| (1..=5).contains(&(this_minute - minute.at.as_second().div_euclid(60)));
    let received: i64 = standing
        .minutes
        .iter()
        .filter(recent)
        .map(|minute| minute.received)
        .sum();
    let tenths = received * 10 / SECONDS;
    (format!("{}.{}", tenths / 10, tenths % 10), received)
}

impl Fragment {
    fn add(&mut self, standing: &Standing, workers: Option<&WorkersSeen>) {
        let (rate, received) = rate(standing);
        self.tiles.push(Tile {
            mood: "calm",
            label: "a second",
            value: Markup(format!("<span class=\"num\">{rate}</span>")),
            note: format!("{received} in five minutes"),
            path: None,
        });
        let open: u64 = standing.open.iter().map(|(_, messages)| messages).sum();
        let oldest = standing.oldest_open.map(lasting);
        self.tiles.push(Tile {
            path: Some("/groups"),
            ..tile(
                if open > 0 { "warn" } else { "good" },
                "open letters",
                open,
                oldest.map_or_else(
                    || "nothing waits for anybody".to_owned(),
                    |ago| format!("the oldest for {ago}"),
                ),
            )
        });
        self.tiles.push(tile(
            if standing.parked > 0 { "busy" } else { "good" },
            "parked",
            standing.parked,
            "wait for their reservation",
        ));
        if standing.held > 0 {
            let oldest = standing.oldest_held.map(lasting).unwrap_or_default();
            let note = format!("of a partner in quarantine, or in the way of others; the oldest for {oldest}");
            self.tiles.push(Tile {
                path: Some("/partners"),
                ..tile("warn", "held", standing.held, note)
            });
        }
        let outbox = &standing.outbox;
        let late = outbox.rows > 0 && outbox.oldest >= Duration::from_secs(10);
        self.tiles.push(Tile {
            path: Some("/outbox"),
            ..tile(
                match (outbox.refused, late) {
                    (0, false) => "good",
                    (0, true) => "warn",
                    _ => "bad",
                },
                "to be told",
                outbox.publications,
                match (outbox.refused, outbox.rows) {
                    (0, 0) => "everything is published".to_owned(),
                    (0, _) => format!("the oldest for {}", lasting(outbox.oldest)),
                    (refused, _) => format!("and {refused} refused by the broker"),
                },
            )
        });
        let of = |state: &str| {
            let found = standing.runs.iter().find(|(other, _)| other == state);
            found.map_or(0, |(_, runs)| *runs)
        };
        let (running, stopped) = (of("running"), of("stopped") + of("cancelled"));
        self.tiles.push(Tile {
            path: Some("/runs"),
            ..tile(
                if running > 0 { "busy" } else { "calm" },
                "replays running",
                running,
                format!("{stopped} stopped or cancelled"),
            )
        });
        let none = || "–".to_owned();
        self.chart = chart::minutes(standing.at, &standing.minutes);
        self.reasons = standing
            .open
            .iter()
            .map(|(reason, messages)| ReasonLine {
                who: who_must_act(*reason),
                messages: Digits::of(messages),
                reason: *reason,
            })
            .collect();
        self.more_partners = standing.more_partners;
        self.partners = standing
            .partners
            .iter()
            .map(|line| {
                let id = &line.partner.enterprise_id;
                let lately = workers.and_then(|workers| workers.lately.get(id));
                PartnerLine {
                    chip: super::partners::state(&line.partner),
                    judged: lately.map_or_else(none, |count| count.messages.to_string()),
                    rejected: lately.and_then(|count| count.rejected_percent()).unwrap_or_else(none),
                    id: id.clone(),
                    open: Digits::of(line.open),
                    parked: Digits::of(line.parked),
                }
            })
            .collect();
    }
}

/// Whose turn it is with what was refused for a reason.
pub(super) fn who_must_act(reason: Reason) -> &'static str {
    match reason.turn() {
        Turn::Partner => "the partner",
        Turn::Operator => "you",
        Turn::Custody => "custody",
        Turn::PartnerOrOperator => "the partner, or you",
    }
}
