//! Where and when a run was made: a figure without it says nothing.

use std::{fs, num::NonZero, process::Command};

use serde_json::json;

use crate::{Fallible, place::Services, report::Report};

pub(crate) async fn describe(services: &Services, report: &mut Report) -> Fallible<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let line = |file: &str, begin: &str| {
        let text = fs::read_to_string(file).ok()?;
        let rest = text.lines().find_map(|line| line.strip_prefix(begin))?;
        Some(rest.trim_start_matches([':', ' ', '\t']).to_owned())
    };
    let model = line("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned());
    let memory = line("/proc/meminfo", "MemTotal").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(text)
    };
    let commit = said("git", &["describe", "--always", "--dirty", "--abbrev=12"]);
    let rustc = said("rustc", &["--version"]);
    let date = jiff::Timestamp::now().strftime("%F %H:%M UTC").to_string();
    let sql =
        "SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit'),
                      current_setting('shared_buffers'), current_setting('max_wal_size')";
    let row = services.admin.query_one(sql, &[]).await?;
    let setting = |index: usize| row.get::<_, String>(index);
    let broker = services.manage("GET", "/api/overview", None).await?["rabbitmq_version"].clone();
    report.set(
        "machine",
        json!({
            "cores": cores, "cpu": model, "memory": memory, "kernel": kernel, "rustc": rustc,
            "postgresql": {
                "version": setting(0), "fsync": setting(1), "synchronous_commit": setting(2),
                "shared_buffers": setting(3), "max_wal_size": setting(4),
            },
            "rabbitmq": broker,
        }),
    );
    report.set("commit", json!(commit));
    report.set("date", json!(date));
    report.note(format!(
        "{date}, commit {}. {cores} cores of {model}, {memory}, Linux {kernel}; PostgreSQL {} with fsync {} and \
         synchronous_commit {}, RabbitMQ {}; all of it on this machine, loopback, no TLS.",
        commit.as_deref().unwrap_or("unknown"),
        setting(0),
        setting(1),
        setting(2),
        broker.as_str().unwrap_or("unknown"),
    ));
    Ok(())
}
