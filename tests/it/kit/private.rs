//! A PostgreSQL and a RabbitMQ of a test's own, which it may kill: `dev/services` in a scratch checkout.

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::process::Command;
use uuid::Uuid;

use crate::kit::support::{Services, said};

pub(crate) struct Private {
    directory: PathBuf,
    /// How many there are of each, and with what, as `dev/services` is told it.
    options: &'static [&'static str],
    pub(crate) services: Services,
}

fn dev_services(directory: &Path) -> Command {
    let mut command = Command::new(directory.join("dev/services"));
    for (name, _) in std::env::vars_os() {
        // What is in the environment is somebody else's.
        if name.to_string_lossy().starts_with("SETTLED_") {
            command.env_remove(&name);
        }
    }
    command.stdin(Stdio::null()).current_dir(directory);
    command
}

impl Private {
    /// Three nodes of the broker, and a standby of the database.
    pub(crate) const CLUSTER: &'static [&'static str] = &["--nodes", "3", "--standby"];

    /// A broker that can move messages to another one.
    pub(crate) const SHOVEL: &'static [&'static str] = &["--plugin", "rabbitmq_shovel"];

    /// A standby of the database.
    pub(crate) const STANDBY: &'static [&'static str] = &["--standby"];

    /// Starts both, or says why that cannot be done here. Nothing is installed for it.
    pub(crate) async fn start() -> Result<Self, String> {
        Self::start_with(&[]).await
    }

    /// The same as `dev/services` makes them with these options.
    pub(crate) async fn start_with(options: &'static [&'static str]) -> Result<Self, String> {
        let name = format!("private_{}", Uuid::new_v4().simple());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(directory.join("dev")).expect("a directory");
        for file in ["dev/services", "dev/system", "dev/rabbitmq.conf", "docker-compose.yml"] {
            let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
            std::fs::copy(&from, directory.join(file)).expect(file);
        }
        let output = dev_services(&directory)
            .args(options)
            .arg("up")
            .output()
            .await
            .expect("a shell");
        // From here on it is ended again, whether it came up or not.
        let mut private = Self {
            services: Services {
                database: String::new(),
                broker: String::new(),
                management: String::new(),
            },
            options,
            directory,
        };
        if !output.status.success() {
            return Err(format!("no services of its own: {}", said(&output)));
        }
        private.services = Services::of_lines(&String::from_utf8_lossy(&output.stdout));
        Ok(private)
    }

    async fn tell(&self, arguments: &[&str]) -> Output {
        dev_services(&self.directory)
            .args(self.options)
            .args(arguments)
            .output()
            .await
            .expect("a shell")
    }

    /// One of its commands, which must succeed.
    pub(crate) async fn act(&self, command: &str, names: &[&str]) {
        let output = self.tell(&[&[command], names].concat()).await;
        assert!(output.status.success(), "{command} {names:?}: {}", said(&output));
    }

    /// `dev/services` of its own, for a program that kills and restarts them.
    pub(crate) fn tool(&self) -> PathBuf {
        self.directory.join("dev/services")
    }

    /// SIGKILL to every process of it.
    pub(crate) async fn kill(&self, name: &str) {
        self.act("kill", &[name]).await;
    }

    /// Stops it if it runs, starts it, and waits until it answers.
    pub(crate) async fn restart(&self, name: &str) {
        self.act("restart", &[name]).await;
    }

    /// The broker's own tool, on this broker.
    pub(crate) async fn rabbitmqctl(&self, arguments: &[&str]) {
        let tried = self.try_rabbitmqctl(arguments).await;
        assert!(tried.is_ok(), "rabbitmqctl {arguments:?}: {tried:?}");
    }

    /// The same, where it may be refused.
    pub(crate) async fn try_rabbitmqctl(&self, arguments: &[&str]) -> Result<(), String> {
        let output = self.tell(&[&["rabbitmqctl"], arguments].concat()).await;
        output.status.success().then_some(()).ok_or_else(|| said(&output))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let mut command = std::process::Command::new(self.directory.join("dev/services"));
        command
            .args(self.options)
            .arg("forget")
            .env_remove("SETTLED_DATABASE_URL")
            .env_remove("SETTLED_BROKER_URL");
        if command.output().is_ok_and(|output| output.status.success()) {
            drop(std::fs::remove_dir_all(&self.directory));
        }
    }
}
