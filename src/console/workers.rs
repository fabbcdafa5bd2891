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
    traffic::{JudgedCount, Traffic, traffic},
};
use crate::http::ask::Enquiry;

/// How long a worker has to answer: less than a page waits, so that one that is silent is said to be.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(900);
/// Bytes of an answer at most.
const ANSWER_MAX: usize = 8 << 20;
/// Over how long quantiles are told.
const WINDOW: Duration = Duration::from_secs(60);
/// Looks that are kept at most.
const KEPT_MAX: usize = 200;
/// The histogram that they are told of.
const END_TO_END: &str = "settled_end_to_end_seconds_bucket";

/// A worker, as the overview shows it.
#[derive(Clone)]
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

impl Counted {
    /// Whether a worker that had counted so much may say this later: one that was started anew counts from nothing.
    fn may_become(&self, now: &Counted) -> bool {
        let count = |bound: f64| now.buckets.iter().find(|(other, _)| *other == bound);
        let grew = |(bound, before): &(f64, f64)| count(*bound).is_some_and(|(_, now)| now >= before);
        let told = |(partner, before): (&String, &JudgedCount)| {
            now.traffic.get(partner).is_some_and(|now| before.may_become(*now))
        };
        self.buckets.iter().all(grew) && self.traffic.iter().all(told)
    }
}

struct Watched {
    address: SocketAddr,
    /// What it said within the window, the oldest first.
    samples: VecDeque<(Instant, Counted)>,
}

/// What one of them is seen to do.
struct Seen {
    line: WorkerLine,
    /// What it has counted; none: it did not say.
    now: Option<Traffic>,
    /// What it had counted at the beginning of the window, and how long ago that was; none: nobody knows.
    before: Option<(Traffic, Duration)>,
}

/// What all of them are seen to do.
pub(super) struct WorkersSeen {
    pub(super) lines: Vec<WorkerLine>,
    /// In the last minute, or as much of it as was looked at.
    pub(super) lately: Traffic,
    /// How much of it that is; none: nothing can be told of it yet.
    pub(super) over: Option<Duration>,
    /// Since each was started.
    pub(super) ever: Traffic,
    /// Whether any has said what it counts.
    pub(super) counted: bool,
}

/// The workers that are watched.
pub(super) struct Workers(Vec<Watched>);

impl Workers {
    pub(super) fn new(addresses: &[SocketAddr]) -> Self {
        let watched = |address: &SocketAddr| Watched {
            address: *address,
            samples: VecDeque::new(),
        };
        Self(addresses.iter().map(watched).collect())
    }

    pub(super) async fn look(&mut self) -> WorkersSeen {
        let mut all = WorkersSeen {
            lines: Vec::new(),
            lately: Traffic::new(),
            over: None,
            ever: Traffic::new(),
            counted: false,
        };
        for seen in futures_util::future::join_all(self.0.iter_mut().map(Watched::look)).await {
            all.lines.push(seen.line);
            all.counted |= seen.now.is_some();
            for (partner, count) in seen.now.unwrap_or_default() {
                if let Some((before, _)) = &seen.before {
                    let earlier = before.get(&partner).copied().unwrap_or_default();
                    all.lately.entry(partner.clone()).or_default().add(count.since(earlier));
                }
                all.ever.entry(partner).or_default().add(count);
            }
            all.over = all.over.max(seen.before.map(|(_, over)| over));
        }
        all
    }
}

impl Watched {
    async fn look(&mut self) -> Seen {
        let address = self.address;
        let (ready, metrics) = tokio::join!(ask(address, "/readyz"), ask(address, "/metrics"));
        let (chip, why) = match ready {
            Err(why) => (Chip::bad("away"), why),
            Ok(text) => readiness(&text),
        };
        // Who does not say what it counts has not counted nothing.
        let counted = metrics.ok().map(|text| Counted {
            buckets: buckets(&text),
            traffic: traffic(&text),
        });
        let before = counted
            .as_ref()
            .and_then(|counted| self.before(Instant::now(), counted.clone()));
        let (p50, p99) = match (&before, &counted) {
            (Some((before, _)), Some(now)) => quantiles(&before.buckets, &now.buckets),
            _ => (None, None),
        };
        let said = |quantile: Option<f64>| quantile.map_or_else(|| "–".to_owned(), seconds);
        Seen {
            line: WorkerLine {
                address: address.to_string(),
                chip,
                p50: said(p50),
                p99: said(p99),
                why,
            },
            now: counted.map(|counted| counted.traffic),
            before: before.map(|(before, over)| (before.traffic, over)),
        }
    }

    /// Keeps what it says now, and answers what it said first within the window, and how long ago. None: that was never.
    fn before(&mut self, now: Instant, counted: Counted) -> Option<(Counted, Duration)> {
        while self.samples.len() >= KEPT_MAX
            || self
                .samples
                .front()
                .is_some_and(|(at, _)| now.duration_since(*at) > WINDOW)
        {
            self.samples.pop_front();
        }
        // Started anew since it was asked last: all that it counts came after that.
        if let Some((at, last)) = self.samples.back()
            && !last.may_become(&counted)
        {
            let nothing = (*at, Counted::default());
            self.samples = VecDeque::from([nothing]);
        }
        let before = self
            .samples
            .front()
            .map(|(at, counted)| (counted.clone(), now.duration_since(*at)));
        self.samples.push_back((now, counted));
        before
    }
}

/// Of what was counted in between.
fn quantiles(before: &Buckets, now: &Buckets) -> (Option<f64>, Option<f64>) {
    let new: Buckets = now
        .iter()
        .map(|(bound, count)| {
            let earlier = before.iter().find(|(other, _)| other == bound);
            (*bound, count - earlier.map_or(0.0, |(_, count)| *count))
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

    /// A worker that has counted so many messages, all of them as fast.
    fn counted(messages: u64) -> Counted {
        let text = format!(
            "settled_end_to_end_seconds_bucket{{le=\"0.1\"}} {messages}\nsettled_end_to_end_seconds_bucket{{le=\"+Inf\"}} {messages}\n\
             settled_partner_messages_total{{enterprise_id=\"acme\",verdict=\"settled\"}} {messages}\n"
        );
        Counted {
            buckets: buckets(&text),
            traffic: traffic(&text),
        }
    }

    #[test]
    fn the_last_minute_is_no_more_than_that() {
        let mut watched = Watched {
            address: "127.0.0.1:1".parse().expect("an address"),
            samples: VecDeque::new(),
        };
        let began = Instant::now();
        let mut look = |second: u64, messages: u64| {
            let before = watched.before(began + Duration::from_secs(second), counted(messages));
            before.map(|(before, over)| {
                let earlier = before.traffic.get("acme").map_or(0, |count| count.messages);
                (messages - earlier, over.as_secs())
            })
        };
        assert_eq!(look(0, 1_000_000), None, "one look alone tells nothing of a minute");
        assert_eq!(look(10, 1_000_007), Some((7, 10)));
        assert_eq!(look(50, 1_000_009), Some((9, 50)));
        assert_eq!(
            look(61, 1_000_010),
            Some((3, 51)),
            "what is older than a minute is not compared with"
        );
        assert_eq!(look(7_200, 2_000_000), None, "nobody looked for two hours");
        assert_eq!(look(7_210, 2_000_001), Some((1, 10)));
        // Started anew: what it has counted since is all of the time since it was asked last.
        assert_eq!(look(7_220, 5), Some((5, 10)));
        assert_eq!(look(7_230, 9), Some((9, 20)));
        for second in 7_231..7_900 {
            look(second, 9);
        }
        assert!(watched.samples.len() <= KEPT_MAX);
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
