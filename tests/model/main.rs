//! `domain::decide` against an independent reference (`reference`), in a world where everything comes twice, late, out of
//! order, and whoever acts may be killed between any two steps (`world`). Schedules come from a seed (`schedule`), over
//! messages that are signed once (`palette`).
//!
//! `make model` runs a million of them (`SCHEDULES=`, `SEED=`). What fails is cut down to its shortest form and printed as
//! Rust; pasted into `KEPT` it is run for ever.

mod palette;
mod reference;
mod schedule;
mod world;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use crate::{
    palette::PALETTE,
    schedule::{Dice, Op, Who, generate, literal, shrink},
    world::{Flaw, Tally, World, Wrong, stages},
};

/// In the ordinary run of the tests, unoptimised.
const SCHEDULES: u64 = 20_000;
const SEED: u64 = 0x5e77_1ed0;

/// Tells one schedule. A panic of the program is as wrong as a wrong answer.
fn tell(ops: &[Op], flaw: Option<Flaw>) -> Result<Tally, Wrong> {
    catch_unwind(AssertUnwindSafe(|| World::new(flaw).tell(ops))).unwrap_or_else(|_| Err("it panicked".to_owned()))
}

/// The first schedule of a seed that goes wrong, if one does, and what all of them did.
fn search(seed: u64, schedules: u64, flaw: Option<Flaw>) -> (Tally, Option<u64>) {
    let next = AtomicU64::new(0);
    let found = Mutex::new((Tally::default(), None::<u64>));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut mine = Tally::default();
                let mut wrong = None;
                while let number @ 0.. = next.fetch_add(1, Ordering::Relaxed)
                    && number < schedules
                {
                    match tell(&generate(&mut Dice::new(seed, number)), flaw) {
                        Ok(tally) => mine.add(&tally),
                        Err(_) => {
                            wrong = Some(number);
                            next.store(schedules, Ordering::Relaxed);
                        }
                    }
                }
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                found.0.add(&mine);
                found.1 = [found.1, wrong].into_iter().flatten().min();
            });
        }
    });
    found.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// What went wrong, in its shortest form.
fn report(seed: u64, number: u64, flaw: Option<Flaw>) -> (Vec<Op>, String) {
    let ops = shrink(&generate(&mut Dice::new(seed, number)), |ops| tell(ops, flaw).is_err());
    let wrong = tell(&ops, flaw).err().unwrap_or_default();
    let text = format!("SEED={seed} schedule {number}: {wrong}\nkeep it:\n{}", literal(&ops));
    (ops, text)
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")),
    )
}

/// Every schedule comes to what the reference says, and every rule and every place to be killed at was met.
#[test]
fn decide_is_what_the_protocol_says() {
    let (schedules, seed) = (
        variable("SCHEDULES").unwrap_or(SCHEDULES),
        variable("SEED").unwrap_or(SEED),
    );
    let letters = PALETTE.len();
    let began = Instant::now();
    let (tally, wrong) = search(seed, schedules, None);
    if let Some(number) = wrong {
        panic!("{}", report(seed, number, None).1);
    }
    println!(
        "{schedules} schedules of {letters} messages in {:.1} s, seed {seed}: {} steps, {} commits, {} killed, {} answers lost",
        began.elapsed().as_secs_f64(),
        tally.ops,
        tally.commits,
        tally.kills.values().sum::<u64>(),
        tally.lost.iter().sum::<u64>(),
    );
    for (name, count) in &tally.verdicts {
        println!("  {count:>10}  {name}");
    }
    for ((who, stage), count) in &tally.kills {
        println!("  {count:>10}  {who:?} killed: {stage}");
    }
    println!(
        "  {:>10}  commits whose answer was lost, and {} that had not committed",
        tally.lost[1], tally.lost[0]
    );
    if schedules < SCHEDULES {
        return;
    }
    let met = |name: &str| tally.verdicts.contains_key(name);
    let names = ["settled", "duplicate"]
        .into_iter()
        .chain(reference::REASONS.map(|(name, ..)| name));
    let missing: Vec<&str> = names.filter(|name| !met(name)).collect();
    assert!(
        missing.is_empty(),
        "a rule that was never met is not tested: {missing:?}"
    );
    for who in Who::ALL {
        for stage in stages(who) {
            assert!(
                tally.kills.contains_key(&(who, *stage)),
                "{who:?} was never killed: {stage}"
            );
        }
    }
}

/// Schedules that once went wrong, in their shortest form, with what was broken then (in the program: none of them so far; in
/// the harness, on purpose: a flaw). They go well, and with the flaw they go wrong as they did.
#[rustfmt::skip]
const KEPT: &[(&str, Option<Flaw>, &[Op])] = &[
    ("taken, and killed before the commit", Some(Flaw::LosesRedeliveries), &[
        Op::Send(0), Op::Step(Who::LaneA, 1), Op::Kill(Who::LaneA),
    ]),
    ("killed between the acknowledgement and the first confirm", Some(Flaw::DeletesTheOutboxRowBeforeItIsPublished), &[
        Op::Send(0), Op::Step(Who::LaneA, 1), Op::Step(Who::LaneA, 1), Op::Step(Who::LaneA, 1), Op::Kill(Who::LaneA),
    ]),
    ("two in a batch, and killed after the commit", Some(Flaw::WritesNoOutboxRow), &[
        Op::Send(1140), Op::Send(1248), Op::Step(Who::LaneB, 4), Op::Step(Who::LaneB, 1), Op::Kill(Who::LaneB), Op::Pass(1),
    ]),
    ("the commit's answer is lost, and one of the batch was parked", Some(Flaw::PublishesTheSecondJudgementOfOneCommit), &[
        Op::Send(0), Op::Send(1710), Op::Step(Who::LaneB, 4), Op::Lost(Who::LaneB, true),
    ]),
    ("a settlement told again a millisecond later", Some(Flaw::TimesEventsByTheClock), &[
        Op::Send(1027), Op::Walk(Who::LaneA, 1), Op::Pass(1), Op::Send(1119),
    ]),
    ("settled, and told again under another nonce than was signed", Some(Flaw::LoadsReceiptsByTheBodysNonceOnly), &[
        Op::Reserve(7), Op::Send(1335), Op::Step(Who::LaneB, 1), Op::Send(1367),
    ]),
    ("signed by a key that is not valid yet", Some(Flaw::LoadsKeysThatAreNotValid), &[Op::Send(1342)]),
    ("parked, judged again, and said again before its deadline", Some(Flaw::ExtendsTheDeadlineOfARepeat), &[
        Op::Send(1523), Op::Walk(Who::LaneA, 1), Op::Pass(5_000), Op::Pass(5_000), Op::Step(Who::DueB, 1),
        Op::Send(1523), Op::Walk(Who::LaneB, 1), Op::Pass(12_000),
    ]),
    ("said by two messages, the second a duplicate", Some(Flaw::ForgetsTheReceiptOfADuplicate), &[
        Op::Send(953), Op::Send(955),
    ]),
    ("claimed twice, because the first claim's lease ran out", None, &[
        Op::Send(1320), Op::Walk(Who::LaneA, 1), Op::Pass(1_000), Op::Step(Who::DueA, 1), Op::Pass(5_000),
        Op::Reserve(7), Op::Walk(Who::DueB, 1), Op::Step(Who::DueA, 1), Op::Kill(Who::DueA),
    ]),
];

#[test]
fn kept_schedules_go_well() {
    for (what, flaw, ops) in KEPT {
        assert_eq!(tell(ops, None).err(), None, "{what}");
        if let Some(flaw) = flaw {
            assert!(tell(ops, Some(*flaw)).is_err(), "{what}: it does not show {flaw:?}");
        }
    }
}

/// A harness that can not fail says nothing: whatever is broken, in the store, the broker, the walk or the reference, some
/// schedule shows it, and a short one.
#[test]
fn every_flaw_is_noticed() {
    for flaw in Flaw::ALL {
        let (_, wrong) = search(SEED, SCHEDULES, Some(flaw));
        let number = wrong.unwrap_or_else(|| panic!("{flaw:?} escaped {SCHEDULES} schedules"));
        let (ops, text) = report(SEED, number, Some(flaw));
        println!("{flaw:?}, in schedule {number}: {} steps show it", ops.len());
        assert!(ops.len() <= 12, "{flaw:?} takes {} steps to show:\n{text}", ops.len());
        assert_eq!(
            tell(&ops, None).err(),
            None,
            "without the flaw {flaw:?} the same goes well"
        );
    }
}
