//! A PostgreSQL of a test's own, for settings that the shared one can not have.

use std::{
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use uuid::Uuid;

use super::support::{PATIENCE, said, until};

/// A server in a directory of the system's temporary one; both go with it.
pub(crate) struct Server {
    process: Child,
    pub(crate) port: u16,
    pub(crate) directory: PathBuf,
    home: Home,
}

/// A directory that the server's user can reach, and that user, if it must be another than we are.
pub(super) struct Home {
    pub(super) directory: PathBuf,
    pub(super) user: Option<(u32, u32)>,
}

impl Home {
    pub(super) fn new() -> Result<Self, String> {
        let directory = std::env::temp_dir().join(format!("settled-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&directory).expect("a directory");
        let ask = |arguments: &[&str]| -> Option<u32> {
            let output = Command::new("id").args(arguments).output().ok()?;
            String::from_utf8_lossy(&output.stdout).trim().parse().ok()
        };
        let user = match ask(&["-u"]) {
            Some(0) => {
                // The server refuses to run as root.
                let found = ["postgres", "nobody"]
                    .iter()
                    .find_map(|name| Some((ask(&["-u", name])?, ask(&["-g", name])?)));
                Some(found.ok_or("we are root, and there is no user postgres or nobody")?)
            }
            _ => None,
        };
        let home = Self { directory, user };
        home.give(&home.directory, 0o755);
        Ok(home)
    }

    /// Hands a file over to the server's user.
    pub(super) fn give(&self, path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("its mode");
        if let Some((user, group)) = self.user {
            std::os::unix::fs::chown(path, Some(user), Some(group)).expect("its owner");
        }
    }

    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.directory)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("LC_ALL", "C.UTF-8")
            .stdin(Stdio::null());
        if let Some((user, group)) = self.user {
            command.uid(user).gid(group);
        }
        command
    }
}

/// The newest programs that are installed.
fn programs() -> Result<PathBuf, String> {
    let mut places: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    places.sort();
    places.reverse();
    places.push("/usr/local/pgsql/bin".into());
    places.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let is_whole = |place: &PathBuf| ["initdb", "postgres"].iter().all(|name| place.join(name).exists());
    let found = places.into_iter().find(is_whole);
    found.ok_or_else(|| "no PostgreSQL is installed here".to_owned())
}

impl Server {
    /// Starts one that takes everybody who comes by the lines of `pg_hba.conf`. Err says why that can not be done here.
    pub(crate) async fn start(settings: &str, access: &str, files: &[&Path]) -> Result<Self, String> {
        let programs = programs()?;
        let home = Home::new()?;
        let data = home.directory.join("data");
        let made = home
            .command(&programs.join("initdb"))
            .args([
                "--no-sync",
                "--no-instructions",
                "-U",
                "settled",
                "-E",
                "UTF8",
                "--locale=C",
                "--auth=reject",
                "-D",
            ])
            .arg(&data)
            .output()
            .expect("initdb runs");
        assert!(made.status.success(), "initdb: {}", said(&made));
        for file in files {
            let copy = data.join(file.file_name().expect("a name"));
            std::fs::copy(file, &copy).expect("a copy");
            home.give(&copy, 0o600);
        }
        std::fs::write(data.join("pg_hba.conf"), access).expect("pg_hba.conf");
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("an address").port();
        drop(free);
        let own = format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = ''\nshared_buffers = 16MB\n\
             max_connections = 50\n{settings}\n"
        );
        std::fs::write(data.join("postgresql.auto.conf"), own).expect("its settings");
        let log = std::fs::File::create(home.directory.join("log")).expect("a log");
        let process = home
            .command(&programs.join("postgres"))
            .arg("-D")
            .arg(&data)
            .stdout(log.try_clone().expect("the log"))
            .stderr(log)
            .spawn()
            .expect("postgres starts");
        let mut server = Self {
            process,
            port,
            directory: home.directory.clone(),
            home,
        };
        until("the server listens", PATIENCE, async || {
            if let Some(status) = server.process.try_wait().expect("a child") {
                panic!("postgres ended with {status}: {}", server.log());
            }
            server.log().contains("ready to accept connections").then_some(())
        })
        .await;
        Ok(server)
    }

    /// Puts a file in the place of one that it was started with, and has it read its settings anew.
    pub(crate) fn renew(&self, name: &str, with: &Path) {
        let (beside, old) = (self.directory.join("beside"), self.directory.join("data").join(name));
        std::fs::copy(with, &beside).expect("a copy");
        self.home.give(&beside, 0o600);
        std::fs::rename(&beside, &old).expect("in its place");
        self.tell("HUP");
    }

    fn tell(&self, signal: &str) -> bool {
        let id = self.process.id();
        let told = Command::new("sh")
            .args(["-c", &format!("kill -{signal} {id}")])
            .status();
        told.is_ok_and(|status| status.success())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// Where a database of it is; the user needs no password.
    pub(crate) fn url(&self, host: &str, rest: &str) -> String {
        format!("postgres://settled:unused@{host}:{}/{rest}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the server said:\n{}", self.log());
        }
        // QUIT ends it at once, and its children with it.
        if self.tell("QUIT") {
            drop(self.process.wait());
        }
        drop(std::fs::remove_dir_all(&self.directory));
    }
}
