//! Groups: what is wrong, by partner, reason and shape of the detail; how it goes, and whose turn it is.

use std::time::Duration;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;

use super::{
    Site,
    answer::{NotDone, page},
    ask::Ask,
    chart,
    frame::Frame,
    overview::who_must_act,
    shown::{At, Digits, Markup},
};
use crate::{desk::Which, domain::reason::Reason};

/// Over how long the course of a group is shown, and in how many parts.
const LAST: Duration = Duration::from_secs(24 * 3_600);
const PARTS: usize = 24;

#[derive(Template)]
#[template(path = "groups.html")]
struct GroupsPage {
    frame: Frame,
    total: i64,
    more: i64,
    groups: Vec<GroupLine>,
}

struct GroupLine {
    id: String,
    partner: String,
    reason: Reason,
    who: &'static str,
    detail: String,
    key: Option<String>,
    trend: Markup,
    first: At,
    last: At,
    messages: Digits,
}

pub(super) async fn groups(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let found = ask
        .desk
        .groups(&Which::default(), i64::from(site.settings.page))
        .await?;
    let ids: Vec<String> = found.groups.iter().map(|group| group.group.clone()).collect();
    let parts = i32::try_from(PARTS).unwrap_or(1);
    let trends = ask.desk.trend_of_groups(&ids, LAST, parts).await?;
    let lines: Vec<GroupLine> = found
        .groups
        .into_iter()
        .map(|group| {
            let mut course = vec![0; PARTS];
            for trend in trends.iter().filter(|trend| trend.group == group.group) {
                if let Some(part) = usize::try_from(trend.part).ok().and_then(|part| course.get_mut(part)) {
                    *part += trend.messages;
                }
            }
            let today: i64 = course.iter().sum();
            GroupLine {
                trend: chart::course(&course, &format!("{today} in the last 24 hours, by the hour")),
                partner: group.enterprise_id.unwrap_or_else(|| "–".to_owned()),
                who: who_must_act(group.why.reason),
                reason: group.why.reason,
                detail: group.why.detail,
                key: group.recovered_key,
                first: At(group.first_failed_at),
                last: At(group.last_failed_at),
                messages: Digits::of(group.messages),
                id: group.group,
            }
        })
        .collect();
    let shown = i64::try_from(lines.len()).unwrap_or(i64::MAX);
    Ok(page(
        StatusCode::OK,
        &GroupsPage {
            frame: ask.frame("groups", "Groups"),
            total: found.total,
            more: found.total - shown,
            groups: lines,
        },
    ))
}
