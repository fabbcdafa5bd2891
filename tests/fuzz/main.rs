//! Inputs that nobody thought of: what reads bytes of others is fed with changed ones, for as long as it is given.
//!
//! `make fuzz MINUTES=10` gives each target its share of the time; `make fuzz INPUTS=100000000` goes on until there were so many,
//! all targets in turns of the same length. A target is a function of bytes that must not panic, must take
//! no more memory than it says, and where there is a second implementation must say the same as that. It begins with its corpus:
//! the files in `tests/fuzz/corpus/NAME`, the vectors of `partner-kit`, and a few inputs that are built. What fails is made
//! smaller and written to `target/fuzz`; moved to the corpus it is tried again for ever.
//!
//! It runs on stable Rust: chance chooses the changes (proptest), and no coverage leads it. What it lacks in aim it makes up for
//! with inputs that are nearly right, words of the formats, and signatures that are made anew over what was changed.

mod corpus;
mod engine;
mod targets;

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use engine::{Search, Target};

#[global_allocator]
static MEMORY: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// Memory is counted for the whole process: one test at a time, and in each one target after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a number of inputs is asked for, each target goes on for so long before the next has its turn.
const TURN: Duration = Duration::from_secs(30);

#[test]
fn nothing_that_is_read_panics_or_takes_too_much() {
    let _alone = alone();
    let only = std::env::var("FUZZ_ONLY").unwrap_or_default();
    let all = targets::all();
    let chosen: Vec<&Target> = all.iter().filter(|target| target.name.contains(&only)).collect();
    assert!(!chosen.is_empty(), "no target is called {only:?}");
    let began = Instant::now();
    let mut searches: Vec<Search> = chosen
        .iter()
        .map(|target| engine::quietly(target, || Search::begin(target)))
        .collect();
    let tried = |searches: &[Search]| searches.iter().map(|search| search.inputs).sum::<u64>();
    let (wanted, share) = (
        engine::wanted(),
        engine::time() / u32::try_from(chosen.len()).expect("a few"),
    );
    loop {
        for search in &mut searches {
            let share = if wanted.is_some() { TURN } else { share };
            engine::quietly(search.target, || search.go_on(share));
        }
        let inputs = tried(&searches);
        if wanted.is_none_or(|wanted| inputs >= wanted) {
            break;
        }
        println!("{inputs:>12} inputs after {} s", began.elapsed().as_secs());
    }
    told(&searches, began.elapsed());
}

/// A line a target, and what all of it came to.
fn told(searches: &[Search], lasted: Duration) {
    println!(
        "\n{:12} {:>12}   {:>9}   most that one took",
        "target", "inputs", "a second"
    );
    let line = |name: &str, inputs: u64, seconds: f64, most: usize| {
        println!(
            "{name:12} {inputs:>12}   {:>9.0}   {:>7} kB",
            inputs as f64 / seconds.max(0.001),
            most / 1024
        );
    };
    for search in searches {
        line(
            search.target.name,
            search.inputs,
            search.lasted.as_secs_f64(),
            search.most,
        );
    }
    let most = searches.iter().map(|search| search.most).max().unwrap_or_default();
    line(
        "in all",
        searches.iter().map(|search| search.inputs).sum(),
        lasted.as_secs_f64(),
        most,
    );
    println!(
        "in {} s, nothing panicked, differed or took too much; the process took {} at most",
        lasted.as_secs(),
        resident()
    );
}

/// What the kernel says of this process' memory at its largest.
fn resident() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.map_or_else(|| "what is not known here".to_owned(), |text| text.trim().to_owned())
}

/// What a target found is kept in its folder, so each has one, with something to begin with.
#[test]
fn each_target_has_a_corpus() {
    let all = targets::all();
    assert!(all.len() > 8, "targets are read");
    let without: Vec<&str> = all
        .iter()
        .map(|target| target.name)
        .filter(|name| corpus::of(name).is_empty())
        .collect();
    assert!(without.is_empty(), "no file in tests/fuzz/corpus for {without:?}");
}

/// Bodies of the largest size whose values are as small as can be: no tree is made of them.
#[test]
fn the_smallest_values_take_no_more_than_their_text() {
    let _alone = alone();
    let most = 262_144;
    let keys = |length: usize, key: fn(usize) -> String| {
        let members: String = (0..length).map(|number| format!("\"{}\":0,", key(number))).collect();
        format!("{{{members}\"\":0}}")
    };
    let nested = (0..15).fold("0".to_owned(), |inner, _| {
        format!("{{\"z\":{inner},{}", &keys(1_500, |number| format!("{number:x}"))[1..])
    });
    let payload = keys(18_000, |number| format!("{number:x}"));
    for (name, body) in [
        ("an array", format!("[{}0]", "0,".repeat(131_000))),
        ("arrays", format!("[{}0]", "[],".repeat(87_000))),
        ("keys", keys(28_000, |number| format!("{number:x}"))),
        ("escaped keys", keys(20_000, |number| format!("\\t{number:x}"))),
        ("objects", nested),
        (
            "a payload",
            serde_json::json!({"payload": payload, "signature": "00"}).to_string(),
        ),
    ] {
        assert!(body.len() > most / 2 && body.len() <= most, "{name}: {}", body.len());
        assert_eq!(targets::decode(body.as_bytes()), Ok(()), "{name}");
    }
}

/// One key as long as half a body among many short ones, at places where a search takes it for the middle: keys are compared no
/// further than to where they differ.
#[test]
fn a_long_key_costs_no_more_than_its_length() {
    let short: Vec<String> = (0..12_000).map(|number| format!("\"{number}\":0")).collect();
    for (place, fill) in [
        (0, "x"),
        (6_000, "x"),
        (12_000, "x"),
        (6_000, "\\u0078"),
        (6_000, "5999"),
    ] {
        let long = format!("\"{}\":0", fill.repeat(128 * 1024 / fill.len()));
        let (before, after) = short.split_at(place);
        let body = format!("{{{}}}", [before, &[long], after].concat().join(","));
        assert!(body.len() <= 262_144, "it is read: {}", body.len());
        let began = Instant::now();
        assert_eq!(targets::decode(body.as_bytes()), Ok(()));
        // A tenth of a second where nothing else runs; comparing whole keys would take minutes.
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}

/// What a target is for is found, or it would be tried in vain.
#[test]
fn the_engine_finds_what_it_is_there_for() {
    let _alone = alone();
    for (name, check) in [
        ("panics", panics as fn(&[u8]) -> Result<(), String>),
        ("differs", differs),
        ("takes", takes),
    ] {
        let target = Target {
            name,
            words: &["\"x\""],
            memory: 4,
            seeds: || vec![b"{\"x\":1}".to_vec()],
            check,
        };
        let found = Search::begin(&target).and_then(|mut search| search.go_on(Duration::from_secs(20)));
        let found = found.expect_err(name);
        assert!(found.why.contains(name), "{name}: {}", found.why);
        assert!(found.input.len() <= 16, "{name} was made small: {:?}", found.input);
    }
}

fn panics(input: &[u8]) -> Result<(), String> {
    assert!(!input.contains(&0), "it panics");
    Ok(())
}

fn differs(input: &[u8]) -> Result<(), String> {
    if input.first() == Some(&b'{') {
        Ok(())
    } else {
        Err("it differs".to_owned())
    }
}

fn takes(input: &[u8]) -> Result<(), String> {
    if input.is_empty() {
        std::hint::black_box(Vec::<u8>::with_capacity(1 << 22));
    }
    Ok(())
}
