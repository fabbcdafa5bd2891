//! What the doctor finds: each part of it is asked for by itself, once for everybody, and shown as far as it is known.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use askama::Template;
use axum::response::Response;
use futures_util::future::join_all;
use hyper::StatusCode;

use super::{
    Examined, Site,
    answer::{NotDone, page},
    ask::Ask,
    frame::Frame,
    shared::{Shared, Told},
    shown::{Chip, lasting},
};

/// What was found so lately is not looked at again.
const FRESH: Duration = Duration::from_secs(1);
/// How long a page waits for a part. One that takes longer goes on, and is there when the page is loaded again.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Template)]
#[template(path = "doctor.html")]
struct DoctorPage {
    frame: Frame,
    state: Chip,
    lines: Vec<CheckLine>,
}

struct CheckLine {
    name: String,
    chip: Chip,
    detail: String,
    hint: String,
}

impl CheckLine {
    fn of(check: &Examined) -> Self {
        Self {
            chip: if check.ok {
                Chip::good("ok")
            } else {
                Chip::bad("problem")
            },
            name: check.name.clone(),
            detail: check.detail.clone(),
            hint: check.hint.clone().unwrap_or_default(),
        }
    }

    /// A part of which nothing new is known.
    fn late(part: &str, told: &Told<Vec<Examined>>) -> Option<Self> {
        let why_not = told.why_not.as_ref()?;
        let below = match &told.answer {
            Some(_) => format!("; the lines below are of {} ago", lasting(told.age)),
            None => String::new(),
        };
        Some(Self {
            name: part.to_owned(),
            chip: Chip::warn("not known yet"),
            detail: format!("{}{below}", why_not.message),
            hint: why_not.hint.clone().unwrap_or_default(),
        })
    }
}

/// What was found of each part. One look at a time, for everybody: it asks much.
#[derive(Default)]
pub(super) struct Examinations(Mutex<BTreeMap<&'static str, Arc<Shared<Vec<Examined>>>>>);

impl Examinations {
    fn of(&self, part: &'static str) -> Arc<Shared<Vec<Examined>>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(part).or_default())
    }
}

pub(super) async fn doctor(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let asked = (site.starter.examine)().into_iter().map(|part| {
        let shared = site.examined.of(part.name);
        async move {
            let question = async move { Ok(part.look.await) };
            (part.name, shared.ask_within(FRESH, PATIENCE, question).await)
        }
    });
    let mut lines = Vec::new();
    let (mut wrong, mut late) = (0, false);
    for (part, told) in join_all(asked).await {
        let line = CheckLine::late(part, &told);
        late |= line.is_some();
        lines.extend(line);
        for check in told.answer.iter().flat_map(|found| found.iter()) {
            wrong += usize::from(!check.ok);
            lines.push(CheckLine::of(check));
        }
    }
    Ok(page(
        StatusCode::OK,
        &DoctorPage {
            frame: ask.frame("doctor", "Doctor"),
            state: match (wrong, late) {
                (0, false) => Chip::good("all well"),
                (0, true) => Chip::warn("not all is known yet"),
                (wrong, _) => Chip::bad(format!("{wrong} with a problem")),
            },
            lines,
        },
    ))
}
