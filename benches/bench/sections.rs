//! The sections of a run: what is measured against what, how often, and what is made of it.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::ValueEnum;
use serde_json::json;

use crate::{
    Arguments, Fallible, Section,
    contestant::{self, Contestant},
    drain::{self, Drain, Order},
    figures::{Figure, middle, plain, spread},
    floor::{self, Floor},
    latency::{self, Latency, Schedule},
    place::{Copy, Services, own},
    progress::Progress,
    receiver::Receiver,
    report::{PERCENTILES, Report},
    traffic::{History, Mix, Spread, Traffic, World},
};

/// How much of everything.
struct Size {
    /// Messages of a drain: the worker's, and those of who takes one at a time.
    batched: usize,
    single: usize,
    /// Of one contestant's latency at one rate.
    latency: Duration,
}

pub(crate) struct Run<'a> {
    services: &'a Services,
    logs: &'a Path,
    report: &'a mut Report,
    arguments: &'a Arguments,
    size: Size,
}

/// What takes a turn in every round.
struct Turn<'a> {
    name: String,
    order: Order<'a>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        services: &'a Services,
        logs: &'a Path,
        report: &'a mut Report,
        arguments: &'a Arguments,
    ) -> Self {
        let brief = arguments.quick || arguments.guard.is_some();
        let size = Size {
            batched: if brief { 40_000 } else { 80_000 },
            single: if brief { 5_000 } else { 9_000 },
            latency: Duration::from_secs(if brief { 8 } else { 15 }),
        };
        Self {
            services,
            logs,
            report,
            arguments,
            size,
        }
    }

    /// As many as were asked for, or this many; three where it must be quick.
    fn rounds(&self, usual: usize) -> usize {
        let brief = self.arguments.quick || self.arguments.guard.is_some();
        self.arguments.rounds.unwrap_or(if brief { 3 } else { usual })
    }

    fn sections(&self) -> Vec<Section> {
        if self.arguments.guard.is_some() {
            vec![Section::Drain]
        } else if !self.arguments.only.is_empty() {
            self.arguments.only.clone()
        } else if self.arguments.quick {
            vec![Section::Drain, Section::Latency, Section::Rejects]
        } else {
            Section::value_variants().to_vec()
        }
    }

    fn wants(&self, section: Section) -> bool {
        self.sections().contains(&section)
    }

    pub(crate) async fn all(&mut self) -> Fallible<ExitCode> {
        let names: Vec<String> = self
            .sections()
            .iter()
            .map(|section| format!("{section:?}").to_lowercase())
            .collect();
        println!(
            "bench: {}; about {} minutes on a quiet machine of two cores",
            names.join(", "),
            self.minutes().ceil()
        );
        for name in &self.arguments.peers {
            contestant::install(name).await?;
        }
        let world = self
            .world("spread", self.size.batched, Spread::Wide, History::None)
            .await?;
        if self.wants(Section::Drain) {
            self.drain(&world).await?;
        }
        if let Some(times) = self.arguments.guard {
            return self.guard(times);
        }
        if self.wants(Section::Latency) {
            self.latency(&world).await?;
        }
        if self.wants(Section::Rejects) || self.wants(Section::Duplicates) || self.wants(Section::Hot) {
            self.shapes(&world).await?;
        }
        if self.wants(Section::Workers) {
            self.workers(&world).await?;
        }
        if self.wants(Section::Batched) {
            self.batched(&world).await?;
        }
        if self.wants(Section::Traces) {
            self.traces(&world).await?;
        }
        if self.wants(Section::Memory) {
            self.memory(&world).await?;
        }
        world.forget(self.services).await?;
        if self.wants(Section::Age) {
            self.age().await?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Roughly: preparing and checking a turn takes as long as measuring it.
    fn minutes(&self) -> f64 {
        let (batched, single) = (self.size.batched as f64 / 5_000.0, self.size.single as f64 / 900.0);
        let latency = self.size.latency.as_secs_f64() + 6.0;
        let quick = self.arguments.quick;
        let peers = self.arguments.peers.len() as f64;
        let baseline = f64::from(self.arguments.baseline.is_some());
        let seconds = |section: &Section| match section {
            Section::Drain => self.rounds(5) as f64 * ((2.0 + baseline) * batched + (1.0 + peers) * single),
            Section::Latency => self.rounds(3) as f64 * latency * if quick { 2.0 } else { 6.0 },
            Section::Rejects => self.rounds(5) as f64 * batched * if quick { 1.0 } else { 1.5 },
            Section::Duplicates | Section::Hot => self.rounds(5) as f64 * batched * 0.5,
            Section::Workers => self.rounds(3) as f64 * 3.0 * batched,
            Section::Batched => self.rounds(5) as f64 * (2.0 * batched + single),
            Section::Traces => self.rounds(5) as f64 * 2.0 * batched,
            Section::Memory => self.arguments.backlog as f64 / 6_000.0,
            Section::Age => self.arguments.history as f64 * 36.0 + self.rounds(3) as f64 * 90.0,
        };
        self.sections().iter().map(seconds).sum::<f64>() / 60.0
    }

    /// The builds of the worker that are measured; each makes a template of its own.
    fn programs(&self) -> Vec<PathBuf> {
        let mut programs = vec![own().to_owned()];
        programs.extend(self.arguments.baseline.clone());
        programs
    }

    async fn world(&self, name: &str, reservations: usize, spread: Spread, history: History) -> Fallible<World> {
        eprintln!("bench: {name}: {reservations} reservations");
        World::build(
            self.services,
            name,
            &self.programs(),
            reservations,
            spread,
            history,
            Copy::Pages,
        )
        .await
    }

    /// Every turn once a round, one after the other, so that what disturbs the machine for a while disturbs all of them.
    async fn interleave(&self, section: &str, rounds: usize, turns: &[Turn<'_>]) -> Fallible<Vec<Vec<Drain>>> {
        self.interleave_with(section, rounds, turns, async || Ok(())).await
    }

    /// The same with something else at the end of every round.
    async fn interleave_with(
        &self,
        section: &str,
        rounds: usize,
        turns: &[Turn<'_>],
        mut last: impl AsyncFnMut() -> Fallible<()>,
    ) -> Fallible<Vec<Vec<Drain>>> {
        let progress = Progress::new(rounds * turns.len());
        let mut drains: Vec<Vec<Drain>> = vec![Vec::new(); turns.len()];
        for round in 1..=rounds {
            for (turn, drains) in turns.iter().zip(&mut drains) {
                progress.says(&format!("{section}, round {round}: {}", turn.name));
                let drain = drain::measure(self.services, self.logs, &turn.order).await?;
                progress.says(&format!(
                    "{section}, round {round}: {} {}/s, CPU {} us a message",
                    turn.name,
                    plain(drain.rate),
                    plain(drain.cpu())
                ));
                drains.push(drain);
                progress.step();
            }
            last().await?;
        }
        Ok(drains)
    }

    /// The worker beside everybody else.
    async fn drain(&mut self, world: &World) -> Fallible<()> {
        let mut contestants = vec![Contestant::Settled, Contestant::PerMessage];
        contestants.extend(self.arguments.baseline.clone().map(Contestant::Other));
        contestants.extend(self.arguments.peers.iter().cloned().map(Contestant::Peer));
        let traffic = world.sign(self.size.batched, Mix::USUAL);
        self.report.note(format!(
            "A message's body has {} bytes on average.",
            traffic.body_bytes()
        ));
        let mut floors = Vec::new();
        let messages = self.size.batched / 2;
        let services = self.services;
        let guards = self.arguments.guard.is_some();
        let measure_floor = async || {
            if !guards {
                floors.push(floor::measure(services, world, &traffic, messages).await?);
            }
            Ok(())
        };
        let drains = self
            .compete("drain", world, &traffic, &contestants, measure_floor)
            .await?;
        let own = &drains[0];
        self.tell_floor(&floors, own);
        // How much of the per-message worker's database time a settlement still needs.
        let postgres = |drains: &[Drain]| drains.iter().map(|drain| drain.postgres).collect::<Vec<_>>();
        let ratio = Figure::ratio(&postgres(&drains[1]), &postgres(own));
        self.report.set(
            "cpu_us.postgres_ratio_per_message",
            json!(ratio.map(|ratio| ratio.median)),
        );
        let figure = |get: fn(&Drain) -> f64| Figure::of(own.iter().map(get)).map(|figure| figure.median);
        let some = |get: fn(&Drain) -> Option<f64>| Figure::of(own.iter().filter_map(get)).map(|figure| figure.median);
        self.report.set("drain.rate", json!(figure(|drain| drain.rate)));
        self.report.set("cpu_us.worker", json!(figure(|drain| drain.worker)));
        self.report.set("cpu_us.broker", json!(figure(|drain| drain.broker)));
        self.report
            .set("cpu_us.postgres", json!(figure(|drain| drain.postgres)));
        self.report.set("wal_bytes", json!(figure(|drain| drain.wal)));
        self.report
            .set("round_trips_per_batch", json!(some(|drain| drain.round_trips)));
        for (contestant, drains) in contestants.iter().zip(&drains).skip(1) {
            let ratio = Figure::ratio(&rates(own), &rates(drains));
            let key = format!("drain.ratio_{}", key(contestant));
            self.report.set(&key, json!(ratio.map(|ratio| ratio.median)));
        }
        Ok(())
    }

    /// Drains of several contestants, told as a table; the ratios are the first one's.
    async fn compete(
        &mut self,
        section: &str,
        world: &World,
        traffic: &Traffic,
        contestants: &[Contestant],
        last: impl AsyncFnMut() -> Fallible<()>,
    ) -> Fallible<Vec<Vec<Drain>>> {
        let turns: Vec<Turn<'_>> = contestants
            .iter()
            .map(|contestant| {
                // So that each is at work for some seconds.
                let messages = match contestant {
                    Contestant::Settled
                    | Contestant::Other(_)
                    | Contestant::Batched
                    | Contestant::OtherBatched(_)
                    | Contestant::Traced(_) => self.size.batched,
                    Contestant::PerMessage | Contestant::Peer(_) => self.size.single,
                };
                Turn {
                    name: contestant.to_string(),
                    order: Order::new(contestant, world, traffic, messages),
                }
            })
            .collect();
        let drains = self.interleave_with(section, self.rounds(5), &turns, last).await?;
        let own = rates(&drains[0]);
        let mut rows = Vec::new();
        for (contestant, drains) in contestants.iter().zip(&drains) {
            let figure = |get: fn(&Drain) -> f64| Figure::of(drains.iter().map(get));
            let some = |get: fn(&Drain) -> Option<f64>| Figure::of(drains.iter().filter_map(get));
            let ratio = Figure::ratio(&own, &rates(drains));
            self.report
                .rate(&format!("{section}: {contestant}"), figure(|drain| drain.rate));
            rows.push(vec![
                contestant.to_string(),
                spread(figure(|drain| drain.rate)),
                spread(ratio),
                middle(figure(|drain| drain.worker)),
                middle(figure(|drain| drain.broker)),
                middle(figure(|drain| drain.postgres)),
                spread(figure(Drain::cpu)),
                middle(figure(|drain| drain.wal)),
                middle(some(|drain| drain.batch)),
                middle(some(|drain| drain.round_trips)),
            ]);
            self.report.set(
                &format!("{section}.contestants.{}", key(contestant)),
                json!({
                    "rate": figure(|drain| drain.rate),
                    "seconds": figure(|drain| drain.seconds),
                    "ratio": ratio,
                    "cpu_us": {
                        "worker": figure(|drain| drain.worker),
                        "broker": figure(|drain| drain.broker),
                        "postgres": figure(|drain| drain.postgres),
                        "all": figure(Drain::cpu),
                    },
                    "wal_bytes": figure(|drain| drain.wal),
                    "messages_per_batch": some(|drain| drain.batch),
                    "round_trips_per_batch": some(|drain| drain.round_trips),
                    "rss_mb": figure(|drain| drain.resident as f64 / 1e6),
                }),
            );
        }
        self.report.table(
            section,
            &[
                "",
                "messages/s",
                "the first is faster by",
                "CPU us: worker",
                "broker",
                "PostgreSQL",
                "all",
                "WAL bytes",
                "messages a batch",
                "round trips a batch",
            ],
            rows,
        );
        Ok(drains)
    }

    /// What each part costs by itself, and how near the worker comes to their sum.
    fn tell_floor(&mut self, floors: &[Floor], own: &[Drain]) {
        type Part = (&'static str, &'static str, fn(&Floor) -> f64);
        const PARTS: [Part; 8] = [
            ("signature", "signature: recover and compare, one core", |floor| {
                floor.signature
            }),
            (
                "intake_client",
                "message in, acknowledged 256 at a time: client",
                |floor| floor.intake_client,
            ),
            ("intake_broker", "broker", |floor| floor.intake_broker),
            ("event_client", "event out, confirmed: client", |floor| {
                floor.event_client
            }),
            ("event_broker", "broker", |floor| floor.event_broker),
            (
                "rows_client",
                "rows, 256 a transaction on two connections: client",
                |floor| floor.rows_client,
            ),
            ("rows_postgres", "PostgreSQL", |floor| floor.rows_postgres),
            ("sum", "sum", Floor::sum),
        ];
        if floors.is_empty() {
            return;
        }
        let mut rows = Vec::new();
        for (key, name, get) in PARTS {
            let figure = Figure::of(floors.iter().map(get));
            self.report.set(&format!("floor.{key}_us"), json!(figure));
            rows.push(vec![name.to_owned(), spread(figure)]);
        }
        self.report.table("floor", &["", "CPU us a message"], rows);
        let limits: Vec<f64> = floors.iter().map(Floor::rate).collect();
        let share = Figure::ratio(&rates(own), &limits);
        let beyond = own
            .iter()
            .zip(floors)
            .map(|(drain, floor)| drain.worker / floor.signature - 1.0);
        let beyond = Figure::of(beyond);
        self.report
            .set("cpu_us.beyond_signature", json!(beyond.map(|beyond| beyond.median)));
        let limit = Figure::of(limits);
        self.report.set("floor.rate", json!(limit));
        self.report
            .set("drain.floor_share", json!(share.map(|share| share.median)));
        self.report.note(format!(
            "The floor is {} messages/s; the worker reaches {} of it. Its CPU beyond the signature is {} of the \
             signature's.",
            spread(limit),
            spread(share),
            spread(beyond),
        ));
    }

    /// For CI: slower than this is a mistake, whatever the machine.
    fn guard(&mut self, times: f64) -> Fallible<ExitCode> {
        let ratio = self
            .report
            .get("drain.ratio_per_message")
            .ok_or("the drain came to no ratio")?;
        let fine = ratio >= times;
        let word = if fine { "at least" } else { "NOT" };
        self.report.note(format!(
            "The worker drains {} times as fast as the per-message worker: {word} {times} times.",
            plain(ratio)
        ));
        Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// Other traffic against a clean stream. A part of it has to do with less of everything, or it takes too long.
    async fn shapes(&mut self, world: &World) -> Fallible<()> {
        let messages = self.size.batched / 2;
        let mut wanted = vec![("clean", Mix::CLEAN, Spread::Wide)];
        if self.wants(Section::Rejects) {
            wanted.push(("rejects10", Mix::rejects(10), Spread::Wide));
            if !self.arguments.quick {
                wanted.push(("rejects50", Mix::rejects(50), Spread::Wide));
            }
        }
        if self.wants(Section::Duplicates) {
            wanted.push(("duplicates", Mix::TWICE, Spread::Wide));
        }
        if self.wants(Section::Hot) {
            wanted.push(("hot", Mix::CLEAN, Spread::Hot));
        }
        let hot = match self.wants(Section::Hot) {
            true => Some(self.world("hot", messages, Spread::Hot, History::None).await?),
            false => None,
        };
        let of = |spread: Spread| match spread {
            Spread::Wide => world,
            Spread::Hot => hot.as_ref().unwrap_or(world),
        };
        let traffics: Vec<Traffic> = wanted
            .iter()
            .map(|(_, mix, spread)| of(*spread).sign(messages, *mix))
            .collect();
        let turns: Vec<Turn<'_>> = wanted
            .iter()
            .zip(&traffics)
            .map(|((name, _, spread), traffic)| Turn {
                name: (*name).to_owned(),
                order: Order::new(&Contestant::Settled, of(*spread), traffic, messages),
            })
            .collect();
        let drains = self.interleave("shapes", self.rounds(5), &turns).await?;
        self.tell_ratios("traffic", &turns, &drains);
        if let Some(hot) = hot {
            hot.forget(self.services).await?;
        }
        Ok(())
    }

    /// How each turn compares with the first.
    fn tell_ratios(&mut self, title: &str, turns: &[Turn<'_>], drains: &[Vec<Drain>]) {
        let first = rates(&drains[0]);
        let mut rows = Vec::new();
        for (turn, drains) in turns.iter().zip(drains) {
            let figure = |get: fn(&Drain) -> f64| Figure::of(drains.iter().map(get));
            let ratio = Figure::ratio(&rates(drains), &first);
            self.report.rate(&turn.name, figure(|drain| drain.rate));
            rows.push(vec![
                turn.name.clone(),
                spread(figure(|drain| drain.rate)),
                spread(ratio),
                middle(figure(|drain| drain.worker)),
                middle(figure(|drain| drain.broker)),
                middle(figure(|drain| drain.postgres)),
                middle(figure(|drain| drain.wal)),
            ]);
            self.report.set(
                &turn.name,
                json!({
                    "rate": figure(|drain| drain.rate),
                    "ratio": ratio.map(|ratio| ratio.median),
                    "ratio_spread": ratio,
                    "cpu_us": {
                        "worker": figure(|drain| drain.worker),
                        "broker": figure(|drain| drain.broker),
                        "postgres": figure(|drain| drain.postgres),
                    },
                    "wal_bytes": figure(|drain| drain.wal),
                }),
            );
        }
        let header = [
            "",
            "messages/s",
            "of the first",
            "CPU us: worker",
            "broker",
            "PostgreSQL",
            "WAL bytes",
        ];
        self.report.table(title, &header, rows);
    }

    async fn workers(&mut self, world: &World) -> Fallible<()> {
        let traffic = world.sign(self.size.batched, Mix::USUAL);
        let turns: Vec<Turn<'_>> = (1..=3)
            .map(|processes| Turn {
                name: format!("workers{processes}"),
                order: Order {
                    processes,
                    ..Order::new(&Contestant::Settled, world, &traffic, self.size.batched)
                },
            })
            .collect();
        let drains = self.interleave("workers", self.rounds(3), &turns).await?;
        self.tell_ratios("worker processes", &turns, &drains);
        Ok(())
    }

    /// One message of the broker for several events, beside one for each.
    async fn batched(&mut self, world: &World) -> Fallible<()> {
        let mut contestants = vec![Contestant::Batched, Contestant::Settled, Contestant::PerMessage];
        contestants.extend(self.arguments.baseline.clone().map(Contestant::OtherBatched));
        let traffic = world.sign(self.size.batched, Mix::USUAL);
        let drains = self
            .compete("batched", world, &traffic, &contestants, async || Ok(()))
            .await?;
        for (contestant, drains_of) in contestants.iter().zip(&drains).skip(1) {
            let ratio = Figure::ratio(&rates(&drains[0]), &rates(drains_of));
            let key = format!("batched.ratio_{}", key(contestant));
            self.report.set(&key, json!(ratio.map(|ratio| ratio.median)));
        }
        Ok(())
    }

    /// The worker with traces, as many as a busy one is told to make, beside one without.
    async fn traces(&mut self, world: &World) -> Fallible<()> {
        let receiver = Receiver::open().await?;
        let contestants = [Contestant::Traced(receiver.address), Contestant::Settled];
        let traffic = world.sign(self.size.batched, Mix::USUAL);
        let drains = self
            .compete("traces", world, &traffic, &contestants, async || Ok(()))
            .await?;
        if receiver.bytes() == 0 {
            return Err("no trace was exported: there is nothing to compare".into());
        }
        let ratio = Figure::ratio(&rates(&drains[0]), &rates(&drains[1]));
        self.report
            .set("traces.ratio_off", json!(ratio.map(|ratio| ratio.median)));
        self.report.note(format!(
            "{} bytes of traces were exported.",
            plain(receiver.bytes() as f64)
        ));
        Ok(())
    }

    async fn memory(&mut self, world: &World) -> Fallible<()> {
        let traffic = world.sign(self.size.batched / 2, Mix::USUAL);
        let progress = Progress::new(1);
        let backlog = self.arguments.backlog;
        progress.says(&format!("memory: {backlog} messages are made to wait"));
        // Drained until so many are done; twice as many as were signed, so that copies are among them.
        let order = Order::new(&Contestant::Settled, world, &traffic, usize::MAX);
        let order = Order {
            messages: 2 * traffic.messages.len(),
            ..order
        };
        let bytes = drain::backlog(self.services, self.logs, &order, backlog).await?;
        drop(progress);
        let megabytes = bytes as f64 / 1e6;
        self.report.set("rss_peak_mb", json!(megabytes));
        self.report.note(format!(
            "With {} messages waiting the worker had at most {} MB resident.",
            plain(backlog as f64),
            plain(megabytes)
        ));
        Ok(())
    }

    /// A database with a past against one without. Both are copied file by file, so that both meet the cost of a fresh
    /// checkpoint.
    async fn age(&mut self) -> Fallible<()> {
        let messages = self.size.batched;
        let millions = self.arguments.history;
        eprintln!("bench: age: {millions} million receipts and as many entries are made, which takes minutes");
        let began = std::time::Instant::now();
        let build = async |name: &str, history| {
            let own = [own().to_owned()];
            World::build(self.services, name, &own, messages, Spread::Wide, history, Copy::Files).await
        };
        let old = build("old", History::Rows(millions * 1_000_000)).await?;
        let young = build("young", History::None).await?;
        let built = began.elapsed().as_secs_f64();
        // Drawn from the same seed, both have the same partners and reservations.
        let traffic = young.sign(messages, Mix::USUAL);
        let turns = [(0, &young), (millions, &old)].map(|(millions, world)| Turn {
            name: format!("age{millions}m"),
            order: Order::new(&Contestant::Settled, world, &traffic, messages),
        });
        let drains = self.interleave("age", self.rounds(3), &turns).await?;
        self.tell_ratios("history", &turns, &drains);
        self.report.set("age_made_in_seconds", json!(built));
        old.forget(self.services).await?;
        young.forget(self.services).await
    }

    async fn latency(&mut self, world: &World) -> Fallible<()> {
        let traffic = world.sign(self.size.batched, Mix::USUAL);
        let capacity = self.report.get("drain.rate").map(|rate| 0.7 * rate);
        let mut rates = vec![100.0];
        if !self.arguments.quick {
            rates.extend([1_000.0, 4_000.0]);
            rates.extend(capacity);
        }
        let mut all = vec![Contestant::Settled, Contestant::PerMessage];
        all.extend(self.arguments.baseline.clone().map(Contestant::Other));
        for rate in rates {
            // Beyond what a message at a time can do there is nothing to compare with.
            let contestants = if rate <= 1_000.0 { &all[..] } else { &all[..1] };
            let key = match capacity {
                Some(capacity) if capacity == rate => "capacity70".to_owned(),
                _ => format!("{rate:.0}"),
            };
            let schedule = Schedule::within(rate, self.size.latency, traffic.messages.len());
            let rounds = self.rounds(3);
            let progress = Progress::new(rounds * contestants.len());
            let mut latencies: Vec<Vec<Latency>> = vec![Vec::new(); contestants.len()];
            for round in 1..=rounds {
                for (contestant, latencies) in contestants.iter().zip(&mut latencies) {
                    progress.says(&format!("latency at {rate:.0}/s, round {round}: {contestant}"));
                    let measured =
                        latency::measure(self.services, self.logs, contestant, world, &traffic, &schedule).await?;
                    latencies.push(measured);
                    progress.step();
                }
            }
            drop(progress);
            self.tell_latency(&key, rate, contestants, &latencies);
        }
        Ok(())
    }

    fn tell_latency(&mut self, key_of_rate: &str, rate: f64, contestants: &[Contestant], latencies: &[Vec<Latency>]) {
        let values = |latencies: &[Latency], per_mille: usize| -> Vec<f64> {
            latencies.iter().map(|latency| latency.per_mille(per_mille)).collect()
        };
        let mut rows = Vec::new();
        for (contestant, latencies) in contestants.iter().zip(latencies) {
            let name = key(contestant);
            let at = PERCENTILES.map(|(_, per_mille)| Figure::of(values(latencies, per_mille)));
            let mut row = vec![contestant.to_string()];
            row.extend(at.map(spread));
            row.push(middle(Figure::of(latencies.iter().map(|latency| latency.worker))));
            row.push(middle(Figure::of(latencies.iter().map(|latency| latency.harness))));
            rows.push(row);
            for ((percentile, _), figure) in PERCENTILES.iter().zip(at) {
                // A dot would be taken for a level of its own.
                let percentile = percentile.replace('.', "_");
                let key = format!("latency.{key_of_rate}.contestants.{name}.{percentile}_ms");
                self.report.set(&key, json!(figure));
            }
            self.report.latency(
                format!("{contestant}, {}/s", plain(rate)),
                at.iter().flatten().map(|figure| figure.median).collect(),
            );
        }
        self.report.set(&format!("latency.{key_of_rate}.rate"), json!(rate));
        let own = &latencies[0];
        for (name, per_mille) in [("p50", 500), ("p99", 990)] {
            let median = Figure::of(values(own, per_mille)).map(|figure| figure.median);
            self.report
                .set(&format!("latency.{key_of_rate}.{name}_ms"), json!(median));
            let ratio = latencies
                .get(1)
                .and_then(|others| Figure::ratio(&values(own, per_mille), &values(others, per_mille)));
            let key = format!("latency.{key_of_rate}.ratio_{name}");
            self.report.set(&key, json!(ratio.map(|ratio| ratio.median)));
        }
        let mut header = vec![""];
        header.extend(PERCENTILES.map(|(name, _)| name));
        header.extend(["CPU us: worker", "harness"]);
        self.report
            .table(&format!("latency at {} messages/s, in ms", plain(rate)), &header, rows);
    }
}

fn rates(drains: &[Drain]) -> Vec<f64> {
    drains.iter().map(|drain| drain.rate).collect()
}

/// A contestant's name in the summary.
fn key(contestant: &Contestant) -> String {
    match contestant {
        Contestant::Settled => "settled".to_owned(),
        Contestant::Other(_) => "baseline".to_owned(),
        Contestant::OtherBatched(_) => "baseline_batched".to_owned(),
        Contestant::Batched => "batched".to_owned(),
        Contestant::Traced(_) => "traced".to_owned(),
        Contestant::PerMessage => "per_message".to_owned(),
        Contestant::Peer(name) => name.clone(),
    }
}
