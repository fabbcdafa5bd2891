//! Changes inputs by chance until the time is over, and makes small what fails.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
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

/// How many inputs it shall be in all, however long that takes: `FUZZ_INPUTS`.
pub(crate) fn wanted() -> Option<u64> {
    let wanted = std::env::var("FUZZ_INPUTS").ok().filter(|text| !text.is_empty())?;
    Some(wanted.parse().expect("FUZZ_INPUTS is a number of inputs"))
}

/// One input: it must be borne, in so much memory. What it took.
fn tried(target: &Target, input: &[u8]) -> Result<usize, String> {
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
    Ok(took)
}

/// A target that is being tried, and how far it is.
pub(crate) struct Search<'t> {
    pub(crate) target: &'t Target,
    seeds: Vec<Vec<u8>>,
    round: u64,
    pub(crate) inputs: u64,
    /// Bytes that one input took at most.
    pub(crate) most: usize,
    pub(crate) lasted: Duration,
}

impl<'t> Search<'t> {
    /// Every seed as it is.
    pub(crate) fn begin(target: &'t Target) -> Result<Self, Failing> {
        let mut seeds = (target.seeds)();
        seeds.extend(corpus::of(target.name));
        assert!(!seeds.is_empty(), "{} has something to begin with", target.name);
        // What is made once is not the input's.
        drop(tried(target, &seeds[0]));
        let mut search = Self {
            target,
            seeds: Vec::new(),
            round: 0,
            inputs: 0,
            most: 0,
            lasted: Duration::ZERO,
        };
        for input in &seeds {
            let took = tried(target, input).map_err(|why| Failing {
                input: input.clone(),
                why,
            })?;
            search.most = search.most.max(took);
            search.inputs += 1;
        }
        search.seeds = seeds;
        Ok(search)
    }

    /// Changed ones until the time is over.
    pub(crate) fn go_on(&mut self, share: Duration) -> Result<(), Failing> {
        let (began, target, seeds) = (Instant::now(), self.target, &self.seeds);
        let (count, most) = (AtomicU64::new(0), AtomicUsize::new(self.most));
        let strategy = (any::<usize>(), vec(edit(), 1..6));
        while began.elapsed() < share {
            let chance: [u8; 32] = Sha256::digest(format!("{} {} {}", seed(), target.name, self.round)).into();
            let config = Config {
                cases: ROUND,
                failure_persistence: None,
                max_shrink_iters: 20_000,
                ..Config::default()
            };
            let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &chance));
            let outcome = runner.run(&strategy, |(seed, edits)| {
                count.fetch_add(1, Ordering::Relaxed);
                let took = tried(target, &apply(seeds, target.words, seed, &edits)).map_err(TestCaseError::fail)?;
                most.fetch_max(took, Ordering::Relaxed);
                Ok(())
            });
            match outcome {
                Ok(()) => {}
                Err(TestError::Fail(why, (seed, edits))) => {
                    let input = smaller(target, apply(seeds, target.words, seed, &edits));
                    return Err(Failing {
                        why: tried(target, &input).err().unwrap_or_else(|| why.to_string()),
                        input,
                    });
                }
                Err(TestError::Abort(why)) => panic!("{}: {why}", target.name),
            }
            self.round += 1;
        }
        self.inputs += count.into_inner();
        self.most = most.into_inner();
        self.lasted += began.elapsed();
        Ok(())
    }
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

/// Does it without a word of each panic that is caught: one is told once, when it was made small. What fails ends the test.
pub(crate) fn quietly<T>(target: &Target, work: impl FnOnce() -> Result<T, Failing>) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = work();
    std::panic::set_hook(hook);
    found.unwrap_or_else(|Failing { input, why }| {
        let kept = keep(target.name, &input);
        panic!(
            "{}: {why}\nwith {:?}\nkept in {}; moved to tests/fuzz/corpus/{} it is tried again each time",
            target.name,
            String::from_utf8_lossy(&input[..input.len().min(200)]),
            kept.display(),
            target.name
        );
    })
}

fn keep(name: &str, input: &[u8]) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    std::fs::create_dir_all(&directory).expect("a directory");
    let digest = hex::encode(Sha256::digest(input));
    let file = directory.join(format!("{name}-{}", &digest[..16]));
    std::fs::write(&file, input).expect("a file");
    file
}
