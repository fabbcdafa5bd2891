//! What workers say of themselves, where the settings name them: whether they are ready and why not, and how long a message
//! takes from receipt to the confirmed event.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use http_body_util::Full;
use hyper::{Request, body::Bytes};
use serde_json::Value;

use super::{
    shown::Chip,
    traffic::{Traffic, traffic},
};
use crate::http::ask::Enquiry;

/// How long a worker has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of an answer at most.
const ANSWER_MAX: usize = 8 << 20;
/// Over how long quantiles are told.
const WINDOW: Duration = Duration::from_secs(60);
/// Looks that are kept at most.
const KEPT_MAX: usize = 200;
/// The histogram that they are told of.
const END_TO_END: &str = "settled_end_to_end_seconds_bucket";

/// A worker, as the overview shows it.
pub(super) struct WorkerLine {
    pub(super) address: String,
    pub(super) chip: Chip,
    pub(super) p50: String,
    pub(super) p99: String,
    pub(super) why: String,
}

/// Bounds and how many were within them, cumulative.
type Buckets = Vec<(f64, f64)>;

/// What a worker had counted at a time.
#[derive(Clone, Default)]
struct Counted {
    buckets: Buckets,
    traffic: Traffic,
}

struct Watched {
    address: SocketAddr,
    earlier: VecDeque<(Instant, Counted)>,
}

/// What all of them are seen to do.
pub(super) struct WorkersSeen {
    pub(super) lines: Vec<WorkerLine>,
    /// In the last minute, or as much of it as was looked at.
    pub(super) lately: Traffic,
    /// Since each was started.
    pub(super) ever: Traffic,
}

/// The workers that are watched.
pub(super) struct Workers(Vec<Watched>);

impl Workers {
    pub(super) fn new(addresses: &[SocketAddr]) -> Self {
        let watched = |address: &SocketAddr| Watched {
            address: *address,
            earlier: VecDeque::new(),
        };
        Self(addresses.iter().map(watched).collect())
    }

    pub(super) async fn look(&mut self) -> WorkersSeen {
        let mut seen = WorkersSeen {
            lines: Vec::new(),
            lately: Traffic::new(),
            ever: Traffic::new(),
        };
        for (line, before, now) in futures_util::future::join_all(self.0.iter_mut().map(Watched::look)).await {
            seen.lines.push(line);
            for (partner, count) in now {
                let earlier = before.get(&partner).copied().unwrap_or_default();
                seen.lately
                    .entry(partner.clone())
                    .or_default()
                    .add(count.since(earlier));
                seen.ever.entry(partner).or_default().add(count);
            }
        }
        seen
    }
}

impl Watched {
    /// With what it had counted for each partner a minute ago, and now.
    async fn look(&mut self) -> (WorkerLine, Traffic, Traffic) {
        let address = self.address;
        let (ready, metrics) = tokio::join!(ask(address, "/readyz"), ask(address, "/metrics"));
        let counted = match metrics {
            Ok(text) => Counted {
                buckets: buckets(&text),
                traffic: traffic(&text),
            },
            Err(_) => Counted::default(),
        };
        let now = counted.traffic.clone();
        let before = self.before(counted.clone());
        let (p50, p99) = quantiles(&before.buckets, counted.buckets);
        let (chip, why) = match ready {
            Err(why) => (Chip::bad("away"), why),
            Ok(text) => readiness(&text),
        };
        let said = |quantile: Option<f64>| quantile.map_or_else(|| "–".to_owned(), seconds);
        let line = WorkerLine {
            address: address.to_string(),
            chip,
            p50: said(p50),
            p99: said(p99),
            why,
        };
        (line, before.traffic, now)
    }

    /// What was counted a minute ago, or at the first look since.
    fn before(&mut self, counted: Counted) -> Counted {
        let now = Instant::now();
        while self.earlier.len() > 1
            && (self.earlier.len() >= KEPT_MAX
                || self
                    .earlier
                    .get(1)
                    .is_some_and(|(at, _)| now.duration_since(*at) > WINDOW))
        {
            self.earlier.pop_front();
        }
        let before = self.earlier.front().map(|(_, counted)| counted.clone());
        self.earlier.push_back((now, counted));
        before.unwrap_or_default()
    }
}

/// Of what was counted in between.
fn quantiles(before: &Buckets, now: Buckets) -> (Option<f64>, Option<f64>) {
    let new: Buckets = now
        .into_iter()
        .map(|(bound, count)| {
            let earlier = before.iter().find(|(other, _)| *other == bound);
            (bound, count - earlier.map_or(0.0, |(_, count)| *count))
        })
        .collect();
    (quantile(&new, 0.5), quantile(&new, 0.99))
}

/// The bounds of the histogram with their counts, of all labels together, in order.
fn buckets(metrics: &str) -> Buckets {
    let mut found: Buckets = Vec::new();
    for line in metrics.lines().filter(|line| line.starts_with(END_TO_END)) {
        let bound = line.split_once("le=\"").and_then(|(_, rest)| rest.split_once('"'));
        let count = line.rsplit_once(' ').and_then(|(_, count)| count.parse::<f64>().ok());
        let (Some((bound, _)), Some(count)) = (bound, count) else {
            continue;
        };
        let bound = if bound == "+Inf" {
            f64::INFINITY
        } else {
            bound.parse().unwrap_or(f64::INFINITY)
        };
        match found.iter_mut().find(|(other, _)| *other == bound) {
            Some((_, sum)) => *sum += count,
            None => found.push((bound, count)),
        }
    }
    found.sort_by(|left, right| left.0.total_cmp(&right.0));
    found
}

/// The bound below which such a part is; none where nothing was counted.
fn quantile(buckets: &Buckets, part: f64) -> Option<f64> {
    let total = buckets.last().map(|(_, count)| *count).filter(|total| *total > 0.0)?;
    buckets
        .iter()
        .find(|(_, count)| *count >= total * part)
        .map(|(bound, _)| *bound)
}

fn seconds(bound: f64) -> String {
    if bound.is_infinite() {
        "longer".to_owned()
    } else if bound < 1.0 {
        format!("≤ {} ms", (bound * 1000.0).round())
    } else {
        format!("≤ {bound} s")
    }
}

fn readiness(text: &str) -> (Chip, String) {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    let reasons: Vec<&str> = answer["reasons"]
        .as_array()
        .map(|reasons| reasons.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let others = ["collector", "held"]
        .into_iter()
        .filter_map(|name| answer[name].as_str());
    let why = reasons.iter().copied().chain(others).collect::<Vec<_>>().join("; ");
    if answer["ready"] == true {
        return (Chip::good("ready"), why);
    }
    if answer["paused"].is_string() {
        return (Chip::bad("paused"), why);
    }
    (Chip::bad("not ready"), why)
}

/// A worker's answer, whatever its status.
async fn ask(address: SocketAddr, path: &str) -> Result<String, String> {
    let request = Request::get(path)
        .body(Full::new(Bytes::new()))
        .map_err(|error| error.to_string())?;
    let enquiry = Enquiry {
        host: &address.ip().to_string(),
        port: address.port(),
        tls: None,
        most: ANSWER_MAX,
        within: ANSWER_TIMEOUT,
    };
    let answer = enquiry.ask(request).await?;
    Ok(String::from_utf8_lossy(answer.body()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_read_off_a_histogram() {
        let text = "# TYPE settled_end_to_end_seconds histogram\n\
                    settled_end_to_end_seconds_bucket{le=\"0.01\"} 50\n\
                    settled_end_to_end_seconds_bucket{le=\"0.1\"} 98\n\
                    settled_end_to_end_seconds_bucket{le=\"1\"} 99\n\
                    settled_end_to_end_seconds_bucket{le=\"+Inf\"} 100\n\
                    settled_end_to_end_seconds_sum 7\n";
        let found = buckets(text);
        assert_eq!(found.len(), 4);
        assert_eq!((quantile(&found, 0.5), quantile(&found, 0.99)), (Some(0.01), Some(1.0)));
        assert_eq!(quantile(&Vec::new(), 0.5), None);
        assert_eq!(
            (seconds(0.01), seconds(2.5), seconds(f64::INFINITY)),
            ("≤ 10 ms".to_owned(), "≤ 2.5 s".to_owned(), "longer".to_owned())
        );
    }

    #[test]
    fn a_pause_is_said_with_its_reasons() {
        let (chip, why) = readiness(r#"{"ready": false, "paused": "x", "reasons": ["the database is away"]}"#);
        assert_eq!((chip.word.as_str(), why.as_str()), ("paused", "the database is away"));
        let (chip, why) = readiness(r#"{"ready": true, "paused": null, "reasons": [], "held": "12 messages"}"#);
        assert_eq!((chip.word.as_str(), why.as_str()), ("ready", "12 messages"));
        assert_eq!(readiness("no JSON").0.word, "not ready");
    }
}
