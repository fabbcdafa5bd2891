//! Changes inputs by chance until the time is over, and makes small what fails.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner},
};
use sha2::{Digest, Sha256};

use crate::{MEMORY, corpus};

/// Something that reads bytes of others.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Words of its format.
    pub(crate) words: &'static [&'static str],
    /// So many times the input it may take at most, and [`APART`].
    pub(crate) memory: usize,
    /// Inputs beside its corpus.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Err: it says something else than it must.
    pub(crate) check: fn(&[u8]) -> Result<(), String>,
}

/// What a target may take whatever the input: tables that are made once, and sentences.
pub(crate) const APART: usize = 512 * 1024;
/// Bytes of an input: beyond what a message may have.
const INPUT_MAX: usize = 300_000;
/// Inputs between two looks at the clock.
const ROUND: u32 = 200;

/// What failed, made small.
pub(crate) struct Failing {
    pub(crate) input: Vec<u8>,
    pub(crate) why: String,
}

/// One change of an input. Places are shares of its length, so that they mean the same when it is made smaller.
#[derive(Clone, Debug)]
enum Edit {
    Set(u16, u8),
    Flip(u16, u8),
    Insert(u16, Vec<u8>),
    Word(u16, usize),
    Delete(u16, u16),
    Repeat(u16, u16, u16),
    Cut(u16),
    /// The rest is another seed's.
    Join(u16, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (any::<u16>(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (any::<u16>(), 0_u8..8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (any::<u16>(), vec(any::<u8>(), 1..8)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (any::<u16>(), any::<usize>()).prop_map(|(at, word)| Edit::Word(at, word)),
        (any::<u16>(), 1_u16..64).prop_map(|(at, len)| Edit::Delete(at, len)),
        (any::<u16>(), 1_u16..16, prop_oneof![2_u16..40, 2_u16..20_000])
            .prop_map(|(at, len, times)| Edit::Repeat(at, len, times)),
        any::<u16>().prop_map(Edit::Cut),
        (any::<u16>(), any::<usize>()).prop_map(|(at, seed)| Edit::Join(at, seed)),
    ]
}

/// A place in an input, by its share.
fn place(input: &[u8], at: u16) -> usize {
    input.len() * usize::from(at) / usize::from(u16::MAX)
}

fn apply(seeds: &[Vec<u8>], words: &[&str], seed: usize, edits: &[Edit]) -> Vec<u8> {
    let mut input = seeds[seed % seeds.len()].clone();
    for edit in edits {
        match edit {
            Edit::Set(at, byte) => {
                let at = place(&input, *at);
                if let Some(old) = input.get_mut(at) {
                    *old = *byte;
                }
            }
            Edit::Flip(at, bit) => {
                let at = place(&input, *at);
                if let Some(old) = input.get_mut(at) {
                    *old ^= 1 << bit;
                }
            }
            Edit::Insert(at, bytes) => {
                let at = place(&input, *at);
                input.splice(at..at, bytes.iter().copied());
            }
            Edit::Word(at, word) => {
                let at = place(&input, *at);
                if !words.is_empty() {
                    input.splice(at..at, words[word % words.len()].bytes());
                }
            }
            Edit::Delete(at, len) => {
                let at = place(&input, *at);
                let end = (at + usize::from(*len)).min(input.len());
                input.drain(at..end);
            }
            Edit::Repeat(at, len, times) => {
                let at = place(&input, *at);
                let end = (at + usize::from(*len)).min(input.len());
                let piece = input[at..end].to_vec();
                let room = INPUT_MAX.saturating_sub(input.len()) / piece.len().max(1);
                input.splice(end..end, piece.repeat(usize::from(*times).min(room)));
            }
            Edit::Cut(at) => input.truncate(place(&input, *at)),
            Edit::Join(at, seed) => {
                let other = &seeds[seed % seeds.len()];
                let (mine, theirs) = (place(&input, *at), place(other, *at));
                input.truncate(mine);
                input.extend_from_slice(&other[theirs..]);
            }
        }
    }
    input.truncate(INPUT_MAX);
    input
}

/// How long all of it may take: `FUZZ_SECONDS`, some seconds where nobody says.
pub(crate) fn time() -> Duration {
    let seconds = std::env::var("FUZZ_SECONDS").ok().filter(|text| !text.is_empty());
    Duration::from_secs(seconds.map_or(9, |text| text.parse().expect("FUZZ_SECONDS is a number of seconds")))
}

/// Where chance begins: the same number, the same inputs.
fn seed() -> u64 {
    let seed = std::env::var("FUZZ_SEED").ok().filter(|text| !text.is_empty());
    seed.map_or(1, |text| text.parse().expect("FUZZ_SEED is a number"))
}

/// One input: it must be borne, in so much memory.
fn tried(target: &Target, input: &[u8]) -> Result<(), String> {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let checked = catch_unwind(AssertUnwindSafe(|| (target.check)(input)));
    let took = MEMORY.peak_usage().saturating_sub(before);
    match checked {
        Err(panic) => {
            let said = panic.downcast_ref::<String>().cloned();
            let said = said.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            return Err(format!("panic: {}", said.unwrap_or_default()));
        }
        Ok(checked) => checked?,
    }
    let most = input.len() * target.memory + APART;
    if took > most {
        return Err(format!(
            "takes {took} bytes for {} of input, at most {most}",
            input.len()
        ));
    }
    Ok(())
}

/// Every seed as it is, and then changed ones until the time is over: how many inputs that were.
pub(crate) fn search(target: &Target, share: Duration) -> Result<u64, Failing> {
    let began = Instant::now();
    let mut seeds = (target.seeds)();
    seeds.extend(corpus::of(target.name));
    assert!(!seeds.is_empty(), "{} has something to begin with", target.name);
    // What is made once is not the input's.
    drop(tried(target, &seeds[0]));
    for input in &seeds {
        tried(target, input).map_err(|why| Failing {
            input: input.clone(),
            why,
        })?;
    }
    let count = AtomicU64::new(seeds.len() as u64);
    let inputs = (any::<usize>(), vec(edit(), 1..6));
    let mut round = 0_u64;
    while began.elapsed() < share {
        let chance: [u8; 32] = Sha256::digest(format!("{} {} {round}", seed(), target.name)).into();
        let config = Config {
            cases: ROUND,
            failure_persistence: None,
            max_shrink_iters: 20_000,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &chance));
        let outcome = runner.run(&inputs, |(seed, edits)| {
            count.fetch_add(1, Ordering::Relaxed);
            tried(target, &apply(&seeds, target.words, seed, &edits)).map_err(TestCaseError::fail)
        });
        match outcome {
            Ok(()) => {}
            Err(TestError::Fail(why, (seed, edits))) => {
                let input = smaller(target, apply(&seeds, target.words, seed, &edits));
                return Err(Failing {
                    why: tried(target, &input).err().unwrap_or_else(|| why.to_string()),
                    input,
                });
            }
            Err(TestError::Abort(why)) => panic!("{}: {why}", target.name),
        }
        round += 1;
    }
    Ok(count.into_inner())
}

/// Leaves out whatever can be left out of what fails.
fn smaller(target: &Target, mut input: Vec<u8>) -> Vec<u8> {
    let mut piece = input.len().div_ceil(2);
    while piece > 0 {
        let mut at = 0;
        while at < input.len() {
            let mut less = input.clone();
            less.drain(at..(at + piece).min(input.len()));
            if tried(target, &less).is_err() {
                input = less;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    input
}

/// The same, which ends the test where something fails.
pub(crate) fn run(target: &Target, share: Duration) -> u64 {
    // A panic that is caught is told once, when it was made small.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = search(target, share);
    std::panic::set_hook(hook);
    match found {
        Ok(inputs) => inputs,
        Err(Failing { input, why }) => {
            let kept = keep(target.name, &input);
            panic!(
                "{}: {why}\nwith {:?}\nkept in {}; moved to tests/fuzz/corpus/{} it is tried again each time",
                target.name,
                String::from_utf8_lossy(&input[..input.len().min(200)]),
                kept.display(),
                target.name
            );
        }
    }
}

fn keep(name: &str, input: &[u8]) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    std::fs::create_dir_all(&directory).expect("a directory");
    let digest = hex::encode(Sha256::digest(input));
    let file = directory.join(format!("{name}-{}", &digest[..16]));
    std::fs::write(&file, input).expect("a file");
    file
}
