//! What processes cost, from /proc: CPU time of a process with everything it started, and its memory at most.

use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

use crate::{Fallible, place::Services};

/// Clock ticks a second in /proc: USER_HZ, which is 100 on every architecture we build for. So a figure is good to 10 ms
/// and a process, and what is measured has to last for seconds.
const TICKS: u64 = 100;
const MICROS_A_TICK: u64 = 1_000_000 / TICKS;

/// The services are at rest where they take less than a tenth of a core for so long.
const REST: Duration = Duration::from_millis(500);
const REST_AT_MOST: Duration = Duration::from_secs(10);

/// Whose CPU is told apart.
pub(crate) struct Accounts {
    pub(crate) workers: Vec<u32>,
    broker: u32,
    postgres: u32,
}

/// CPU time used so far, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    pub(crate) worker: u64,
    pub(crate) broker: u64,
    pub(crate) postgres: u64,
    /// The harness itself: publisher, subscriber, or what polls.
    pub(crate) harness: u64,
}

impl Cpu {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            worker: self.worker.saturating_sub(before.worker),
            broker: self.broker.saturating_sub(before.broker),
            postgres: self.postgres.saturating_sub(before.postgres),
            harness: self.harness.saturating_sub(before.harness),
        }
    }
}

/// One process's line in /proc.
struct Process {
    parent: u32,
    name: String,
    /// Its own time, and that of children that ended and were waited for.
    ticks: u64,
}

fn processes() -> Fallible<HashMap<u32, Process>> {
    let mut found = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may have ended since it was listed.
        if let Some(process) = fs::read_to_string(format!("/proc/{id}/stat"))
            .ok()
            .as_deref()
            .and_then(parse)
        {
            found.insert(id, process);
        }
    }
    Ok(found)
}

/// `pid (name) state ppid ...`: the name may hold spaces and parentheses, so fields are counted from its last one.
fn parse(stat: &str) -> Option<Process> {
    let (before, after) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after.split_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some(Process {
        parent: u32::try_from(number(1)?).ok()?,
        name: before.split_once('(')?.1.to_owned(),
        // utime, stime, cutime, cstime: fields 14 to 17 of proc(5).
        ticks: number(11)? + number(12)? + number(13)? + number(14)?,
    })
}

/// The time of a process and of everything below it.
fn tree(processes: &HashMap<u32, Process>, root: u32) -> u64 {
    let mut ticks = 0;
    let mut left = vec![root];
    while let Some(id) = left.pop() {
        ticks += processes.get(&id).map_or(0, |process| process.ticks);
        left.extend(
            processes
                .iter()
                .filter(|(_, process)| process.parent == id)
                .map(|(child, _)| *child),
        );
    }
    ticks * MICROS_A_TICK
}

impl Accounts {
    /// Finds the services' processes on this machine, in a container or not.
    pub(crate) async fn open(services: &Services) -> Fallible<Self> {
        let nodes = services.manage("GET", "/api/nodes", None).await?;
        let broker = nodes[0]["os_pid"]
            .as_str()
            .ok_or("the broker does not say its process")?;
        let row = services.admin.query_one("SELECT pg_backend_pid()", &[]).await?;
        let backend: i32 = row.get(0);
        let backend = here(&backend.to_string(), "postgres")?;
        let postgres = processes()?
            .get(&backend)
            .map(|process| process.parent)
            .ok_or("the database's process is gone")?;
        Ok(Self {
            workers: Vec::new(),
            broker: here(broker, "beam.smp")?,
            postgres,
        })
    }

    /// Waits until the services are through with what is left of what went before: queues and databases that were deleted,
    /// messages that the broker moves from its log to where they wait. Whoever comes next would pay for it. Not for ever,
    /// since they are never wholly at rest.
    pub(crate) async fn rest(&self) -> Fallible<()> {
        let deadline = Instant::now() + REST_AT_MOST;
        let mut before = self.read()?;
        while Instant::now() < deadline {
            tokio::time::sleep(REST).await;
            let now = self.read()?;
            let busy = now.since(before);
            if Duration::from_micros(busy.broker + busy.postgres) < REST / 10 {
                break;
            }
            before = now;
        }
        Ok(())
    }

    pub(crate) fn read(&self) -> Fallible<Cpu> {
        let processes = processes()?;
        Ok(Cpu {
            worker: self.workers.iter().map(|id| tree(&processes, *id)).sum(),
            broker: tree(&processes, self.broker),
            postgres: tree(&processes, self.postgres),
            // Contestants are below the harness: only its own time counts.
            harness: own()?,
        })
    }
}

/// The harness's own CPU time, without its children's.
pub(crate) fn own() -> Fallible<u64> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(')').ok_or("/proc/self/stat is not what it was")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Ok(ticks.sum::<Result<u64, _>>()? * MICROS_A_TICK)
}

/// The CPU time of the calling thread in nanoseconds, where the kernel tells.
pub(crate) fn own_thread() -> Fallible<u64> {
    let text = fs::read_to_string("/proc/thread-self/schedstat")?;
    Ok(text.split_whitespace().next().ok_or("schedstat is empty")?.parse()?)
}

/// The process that calls itself `id` in its own namespace: in a container it has another number here.
fn here(id: &str, name: &str) -> Fallible<u32> {
    let named = processes()?.into_iter().filter(|(_, process)| process.name == name);
    for (pid, _) in named {
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
            continue;
        };
        let inner = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))
            .and_then(|ids| ids.split_whitespace().last());
        if inner == Some(id) {
            return Ok(pid);
        }
    }
    Err(format!("{name} with the process id {id} does not run on this machine: its CPU time can not be read").into())
}

/// The most memory a process ever had resident, in bytes.
pub(crate) fn resident_at_most(id: u32) -> Fallible<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next())
        .ok_or("no VmHWM in /proc")?;
    Ok(kilobytes.parse::<u64>()? * 1024)
}
