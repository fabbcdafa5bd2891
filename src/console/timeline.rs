//! Timeline: one life, as branches of one tree.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    answer::{NotDone, Notice, page},
    ask::Ask,
    chart::branch,
    frame::Frame,
    shown::{self, Markup, at, escaped},
};
use crate::{
    desk::{LifeMoment, RefusalKind},
    domain::address::parse_uuid,
};

/// The branches: what there is of a life.
const LANES: [&str; 5] = ["allocation", "message", "dead letter", "money", "told"];

/// On which branch something is.
fn lane(what: &str) -> usize {
    match what {
        "reserved" | "settled" => 0,
        "received" | "judged" | "parked" | "woken" | "left" | "held" | "voided" => 1,
        "dead-lettered" | "collected" | "replayed" | "discarded" => 2,
        "transfer" => 3,
        _ => 4,
    }
}

#[derive(Template)]
#[template(path = "timeline.html")]
struct TimelinePage {
    frame: Frame,
    of: String,
    facts: Option<Vec<(&'static str, Markup)>>,
    lanes: [&'static str; 5],
    moments: Vec<MomentLine>,
    truncated: bool,
    command: Option<String>,
}

struct MomentLine {
    branch: Markup,
    lane: &'static str,
    what: &'static str,
    at: Markup,
    detail: String,
}

pub(super) async fn timeline(ask: &Ask) -> Result<Response, NotDone> {
    let of = ask.fields.get("of").unwrap_or_default().trim().to_owned();
    let mut timeline = TimelinePage {
        frame: ask.frame("timeline", "Timeline"),
        facts: None,
        lanes: LANES,
        moments: Vec::new(),
        truncated: false,
        command: None,
        of,
    };
    if timeline.of.is_empty() {
        return Ok(page(StatusCode::OK, &timeline));
    }
    let mut status = StatusCode::OK;
    match ask.desk.timeline(&timeline.of).await {
        Ok(found) => {
            timeline.moments = lines(&found.timeline);
            timeline.truncated = found.truncated;
            timeline.command = Some(format!("settled timeline {}", quoted(&timeline.of)));
        }
        Err(refusal) => {
            status = match refusal.kind {
                RefusalKind::Refused | RefusalKind::Usage => StatusCode::NOT_FOUND,
                RefusalKind::Away | RefusalKind::Right | RefusalKind::Ours => NotDone::from(refusal.clone()).status,
            };
            timeline.frame.notice = Some(Notice::from(&refusal));
        }
    }
    if status != StatusCode::SERVICE_UNAVAILABLE
        && let Some(id) = parse_uuid(&timeline.of)
        && let Some(allocation) = ask.desk.allocation(id).await?
    {
        timeline.facts = Some(vec![
            ("type", Markup(escaped(allocation.kind.as_str()))),
            ("status", shown::status(&allocation)),
            ("amount", shown::amount(&allocation.amount)),
            (
                "partner",
                Markup(format!(
                    "<a href=\"/partners/{0}\">{0}</a>",
                    escaped(&allocation.enterprise_id)
                )),
            ),
        ]);
    }
    Ok(page(status, &timeline))
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    if text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn lines(moments: &[LifeMoment]) -> Vec<MomentLine> {
    let lanes: Vec<usize> = moments.iter().map(|moment| lane(moment.what)).collect();
    let first = |lane: usize| lanes.iter().position(|other| *other == lane);
    let last = |lane: usize| lanes.iter().rposition(|other| *other == lane);
    moments
        .iter()
        .zip(&lanes)
        .enumerate()
        .map(|(row, (moment, here))| {
            let through: Vec<(bool, bool)> = (0..LANES.len())
                .map(|lane| match (first(lane), last(lane)) {
                    (Some(first), Some(last)) => (first < row && row <= last, first <= row && row < last),
                    _ => (false, false),
                })
                .collect();
            // A branch begins at whatever happened just before it.
            let from = (first(*here) == Some(row))
                .then(|| row.checked_sub(1).and_then(|before| lanes.get(before)).copied())
                .flatten();
            MomentLine {
                branch: branch(&through, *here, from.filter(|from| from != here)),
                lane: LANES.get(*here).copied().unwrap_or_default(),
                what: moment.what,
                at: at(&moment.at),
                detail: moment.detail.clone(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_to_a_message_is_on_its_branch() {
        for what in ["received", "judged", "parked", "voided"] {
            assert_eq!(LANES.get(lane(what)), Some(&"message"), "{what}");
        }
        assert_eq!(LANES.get(lane("event")), Some(&"told"));
    }

    #[test]
    fn a_word_of_a_shell_is_one_word() {
        assert_eq!(quoted("3f25-ab"), "3f25-ab");
        assert_eq!(quoted("it's; rm"), "'it'\\''s; rm'");
    }
}
