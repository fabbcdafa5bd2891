//! `settled probe`: whether the program that runs here is well, for health checks where there is nothing else to ask with.

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{Context, Exit, Failure, output::Mood};
use crate::http::probe::{Probed, asked_at, probe};

#[derive(Args)]
#[command(after_help = "\
Exit code 0: it is well; 1: it is not, or nobody answers within 3 s. In a Dockerfile:
    HEALTHCHECK CMD [\"settled\", \"probe\"]")]
pub(super) struct Probe {
    /// Ask /livez, whether the program runs at all; without it /readyz, whether it can do its work
    #[arg(long)]
    live: bool,
    /// Ask where `settled api` is watched (api.watch_listen) in place of the worker (http.listen)
    #[arg(long)]
    api: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    url: String,
    ok: bool,
    /// None: nobody answers.
    status: Option<u16>,
    /// Why it is not well.
    reasons: Vec<String>,
}

pub(super) async fn run(context: &Context, wish: &Probe) -> Result<Exit, Failure> {
    let (setting, listen) = if wish.api {
        ("api.watch_listen", context.settings.api.watch_listen)
    } else {
        ("http.listen", Some(context.settings.http.listen))
    };
    let at = listen
        .map(asked_at)
        .filter(|at| at.port() != 0)
        .ok_or_else(|| Failure::usage(format!("{setting} names no port that could be asked")))?;
    let path = if wish.live { "/livez" } else { "/readyz" };
    let answer = answer(format!("http://{at}{path}"), probe(at, path).await);
    context.out.say(&answer, |out| {
        let said = answer
            .status
            .map_or_else(|| "no answer".to_owned(), |status| status.to_string());
        let (mood, word) = if answer.ok {
            (Mood::Good, "ok")
        } else {
            (Mood::Bad, "fails")
        };
        out.line(format!("{} {}: {said}", out.coloured(mood, word), answer.url))?;
        answer
            .reasons
            .iter()
            .try_for_each(|reason| out.line(format!("  {reason}")))
    })?;
    Ok(if answer.ok { Exit::Done } else { Exit::Failed })
}

fn answer(url: String, probed: Result<Probed, String>) -> Answer {
    let (status, reasons) = match probed {
        Ok(probed) => (Some(probed.status), reasons(&probed.body)),
        Err(why) => (None, vec![why]),
    };
    Answer {
        url,
        ok: status == Some(200),
        status,
        reasons,
    }
}

/// Those that /readyz gives; /livez gives none.
fn reasons(body: &str) -> Vec<String> {
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let reasons = body.get("reasons").and_then(Value::as_array);
    let texts = reasons.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}
