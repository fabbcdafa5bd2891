//! Schedules: what happens, step by step, as a list that can be generated from a seed, cut down, printed and kept.

use std::fmt::Write;

use crate::palette::{ENDING, ENDING_EACH, HONEST, LETTERS_EACH, MAPS, NAMED, NAMED_EACH, PALETTE, RESERVATIONS};

/// Who acts. Two lanes take from the queue, two claim parked messages that are due, and the relay takes abandoned outbox
/// rows. Each has one batch in hand and does one step of the walk at a time, so that any of them may be killed, and any
/// other may act, between any two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Who {
    LaneA,
    LaneB,
    DueA,
    DueB,
    Relay,
}

impl Who {
    pub(crate) const ALL: [Who; 5] = [Who::LaneA, Who::LaneB, Who::DueA, Who::DueB, Who::Relay];
}

/// One thing that happens. What can not happen now (killing who does nothing) does nothing, so that every part of a schedule
/// is a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// A partner publishes this message.
    Send(u16),
    /// The message that waits at this place in the queue comes first.
    Overtake(u8),
    /// One step of the walk; with empty hands: takes a batch of at most so many.
    Step(Who, u8),
    /// All steps up to the end of a batch of at most so many.
    Walk(Who, u8),
    /// The next step is the commit, and its answer is lost; whether it committed is said here, and unknown to who acts.
    Lost(Who, bool),
    /// SIGKILL, and a new one in its place.
    Kill(Who),
    /// The custody system reserves.
    Reserve(u8),
    Suspend(&'static str, bool),
    Revoke(u8, bool),
    /// Binds acme to its broker user.
    Bind(bool),
    /// Whether acme's asynchronous deallocations are enabled.
    Deallocations(bool),
    /// An operator makes the nonce of this message unusable.
    Void(u16),
    /// Acme's symbols are those of this row of `MAPS` from now on.
    Map(u8),
    /// Ghost is registered.
    Register,
    /// Milliseconds go by.
    Pass(u16),
}

/// A generator of numbers (splitmix64): the same everywhere for a seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64, number: u64) -> Self {
        let mut dice = Self(seed);
        Self(dice.next() ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below a bound.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.next() & 1 == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn small(&mut self) -> u8 {
        self.below(5) as u8 + 1
    }
}

/// A schedule about few allocations, so that messages meet: said again, contradicted, overtaken, late.
pub(crate) fn generate(dice: &mut Dice) -> Vec<Op> {
    let subjects: Vec<usize> = (0..=dice.below(2)).map(|_| dice.below(RESERVATIONS.len())).collect();
    let mut sent: Vec<u16> = Vec::new();
    let mut ops = Vec::new();
    let length = 10 + dice.below(40);
    while ops.len() < length {
        let op = match dice.below(100) {
            0..30 => {
                let letter = match dice.below(12) {
                    0..3 if !sent.is_empty() => usize::from(dice.pick(&sent)),
                    0..6 => dice.pick(&subjects) * LETTERS_EACH + dice.below(HONEST),
                    6..9 => dice.pick(&subjects) * LETTERS_EACH + dice.below(LETTERS_EACH),
                    9 => ENDING + dice.pick(&subjects) * ENDING_EACH + dice.below(ENDING_EACH),
                    10 => NAMED + dice.pick(&subjects) * NAMED_EACH + dice.below(NAMED_EACH),
                    _ => dice.below(PALETTE.len()),
                };
                sent.push(letter as u16);
                Op::Send(letter as u16)
            }
            30..33 => Op::Overtake(dice.small()),
            33..47 => Op::Walk(dice.pick(&Who::ALL), dice.small()),
            47..62 => Op::Step(dice.pick(&Who::ALL), dice.small()),
            // A few steps on end by the same, and an end in the midst of them: death, or a commit that nobody hears of.
            62..72 => {
                let who = dice.pick(&Who::ALL);
                if matches!(who, Who::DueA | Who::DueB | Who::Relay) {
                    ops.push(Op::Pass(5_000));
                }
                ops.extend((0..=dice.below(5)).map(|_| Op::Step(who, dice.small())));
                Op::Kill(who)
            }
            72..76 => {
                let who = dice.pick(&Who::ALL[..4]);
                ops.push(Op::Step(who, dice.small()));
                ops.push(Op::Lost(who, dice.coin()));
                if dice.coin() {
                    Op::Kill(who)
                } else {
                    Op::Step(who, dice.small())
                }
            }
            76..80 => Op::Kill(dice.pick(&Who::ALL)),
            80..85 => {
                let number = if dice.coin() {
                    dice.pick(&subjects)
                } else {
                    dice.below(RESERVATIONS.len())
                };
                Op::Reserve(number as u8)
            }
            85..88 => Op::Suspend(dice.pick(&["acme", "beta"]), dice.coin()),
            88 => Op::Revoke(dice.pick(&[1, 2, 3, 4]), dice.coin()),
            89 => Op::Bind(dice.coin()),
            90 => Op::Deallocations(dice.coin()),
            91 => Op::Register,
            92 if !sent.is_empty() => Op::Void(dice.pick(&sent)),
            93 | 94 => Op::Map(dice.below(MAPS.len()) as u8),
            _ => Op::Pass(dice.pick(&[1, 700, 1_000, 3_000, 5_000, 12_000, 20_000])),
        };
        ops.push(op);
    }
    ops
}

/// The shortest list of steps that still fails: whole stretches go first, then single steps, then numbers become smaller.
pub(crate) fn shrink(ops: &[Op], fails: impl Fn(&[Op]) -> bool) -> Vec<Op> {
    let mut kept = ops.to_vec();
    loop {
        let before = kept.clone();
        let mut stretch = kept.len() / 2;
        while stretch > 0 {
            let mut at = 0;
            while at < kept.len() {
                let mut fewer = kept.clone();
                fewer.drain(at..(at + stretch).min(kept.len()));
                if fails(&fewer) {
                    kept = fewer;
                } else {
                    at += stretch;
                }
            }
            stretch /= 2;
        }
        for at in 0..kept.len() {
            for simpler in simpler(kept[at]) {
                let mut tried = kept.clone();
                tried[at] = simpler;
                if fails(&tried) {
                    kept = tried;
                    break;
                }
            }
        }
        if kept == before {
            return kept;
        }
    }
}

fn simpler(op: Op) -> Vec<Op> {
    match op {
        Op::Send(letter) => {
            let first = letter - letter % LETTERS_EACH as u16;
            [0, first]
                .into_iter()
                .filter(|simple| *simple < letter)
                .map(Op::Send)
                .collect()
        }
        Op::Step(who, most) if most > 1 => vec![Op::Step(who, 1)],
        Op::Walk(who, most) if most > 1 => vec![Op::Walk(who, 1)],
        Op::Pass(time) if time > 1 => vec![Op::Pass(1)],
        Op::Step(..)
        | Op::Walk(..)
        | Op::Pass(_)
        | Op::Overtake(_)
        | Op::Lost(..)
        | Op::Kill(_)
        | Op::Reserve(_)
        | Op::Suspend(..)
        | Op::Revoke(..)
        | Op::Bind(_)
        | Op::Deallocations(_)
        | Op::Void(_)
        | Op::Map(_)
        | Op::Register => Vec::new(),
    }
}

/// As Rust, to be pasted into the table of kept schedules.
pub(crate) fn literal(ops: &[Op]) -> String {
    let mut text = String::from("&[\n");
    for op in ops {
        let line = format!("{op:?}");
        let line = ["LaneA", "LaneB", "DueA", "DueB", "Relay"]
            .into_iter()
            .fold(line, |line, who| {
                line.replace(&format!("({who}"), &format!("(Who::{who}"))
            });
        writeln!(text, "    Op::{line},").expect("text");
    }
    text.push(']');
    text
}
