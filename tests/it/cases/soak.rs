//! Faults by the hour: a seeded schedule of everything that can be done to a line (`kit::storm`), in rounds, each of which ends
//! with the books. `make soak` runs it; the same seed and round do the same again.

use std::{
    cell::Cell,
    path::Path,
    time::{Duration, Instant},
};

use crate::kit::{
    private::Private,
    storm::{Round, Shape, Tally, schedule},
    support::skip,
};

/// A round ends with an audit, which takes the longer the more there is.
const ROUND: Duration = Duration::from_secs(120);

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a whole number")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "as long as you let it: run `make soak`"]
async fn soak() {
    let mut shape = match number("SETTLED_SOAK_NODES") {
        Some(3) => Shape::CLUSTER,
        Some(1) | None => Shape::ONE,
        Some(other) => panic!("NODES is 1 or 3, not {other}"),
    };
    if let Some(workers) = number("SETTLED_SOAK_WORKERS") {
        shape.workers = workers as usize;
    }
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("SETTLED_SOAK_SEED").unwrap_or_else(|| since_1970.expect("a clock").as_secs());
    let minutes = number("SETTLED_SOAK_MINUTES").unwrap_or(2);
    let rate = number("SETTLED_SOAK_RATE").unwrap_or(100);
    let only = std::env::var("SETTLED_SOAK_ONLY").ok().filter(|only| !only.is_empty());
    let first = number("SETTLED_SOAK_ROUND").unwrap_or(1);
    println!("seed {seed}, {minutes} minutes of faults, {rate} messages a second, {shape:?}");

    let private = Private::start_with(shape.options).await;
    let private = private.unwrap_or_else(|why| panic!("{why}"));
    let primary = Cell::new("postgres");
    let mut tally = Tally::new();
    let mut left = Duration::from_secs(minutes * 60);
    let mut round = first;
    while left > Duration::ZERO {
        let long = left.min(ROUND);
        left -= long;
        let nodes = if shape.is_cluster() { 3 } else { 1 };
        tally.again = format!("make soak NODES={nodes} SEED={seed} ROUND={round} MINUTES=2");
        let seed = seed.wrapping_add(round);
        let messages = (rate * long.as_secs()) as usize;
        let begun = Instant::now();
        let prepared = Round::prepare(&private, &primary, shape, seed, messages).await;
        let steps = schedule(shape, seed, only.as_deref());
        prepared.run(steps, Some(long), &mut tally).await;
        println!(
            "round {round}, {:.0?}: all is accounted for; so far {}",
            begun.elapsed(),
            tally.line()
        );
        round += 1;
    }
    println!("\n{}", tally.table());
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("soak-{seed}.json"));
    std::fs::write(&path, tally.document(seed).to_string()).expect("a file");
    println!("every step: {}", path.display());
}

/// Half a minute of it, in the suite: the machinery works, and a fault of each kind that is quick is survived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_minute_of_faults() {
    const SEED: u64 = 13;
    let private = match Private::start().await {
        Ok(private) => private,
        Err(why) => return skip("soak::half_a_minute_of_faults", &why),
    };
    let primary = Cell::new("postgres");
    let mut tally = Tally::new();
    let round = Round::prepare(&private, &primary, Shape::ONE, SEED, 1_500).await;
    let steps = schedule(Shape::ONE, SEED, None);
    round.run(steps, Some(Duration::from_secs(30)), &mut tally).await;
    println!("{}", tally.table());
    assert!(tally.acts() > 5, "{}", tally.line());
}
