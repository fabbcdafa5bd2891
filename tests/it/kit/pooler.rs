//! A PgBouncer of a test's own, before the shared PostgreSQL.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use super::{
    postgres::Home,
    support::{PATIENCE, address, said, until, userinfo, with_address},
};

pub(crate) struct Pooler {
    process: Child,
    directory: PathBuf,
    address: SocketAddr,
    /// Whether it keeps prepared statements where it pools by transaction.
    pub(crate) keeps_statements: bool,
}

fn program() -> Result<PathBuf, String> {
    let given = std::env::var_os("SETTLED_TEST_PGBOUNCER").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).map(|place| place.join("pgbouncer"));
    let mut places = given.into_iter().chain(places).chain(["/usr/sbin/pgbouncer".into()]);
    places
        .find(|program| program.is_file())
        .ok_or_else(|| "no PgBouncer is installed here".to_owned())
}

/// Major and minor.
fn version(program: &Path) -> (u32, u32) {
    let output = std::process::Command::new(program).arg("--version").output();
    let text = said(&output.expect("pgbouncer runs"));
    let numbers = text.split_whitespace().find_map(|word| {
        let mut numbers = word.split('.').map_while(|number| number.parse().ok());
        Some((numbers.next()?, numbers.next()?))
    });
    numbers.unwrap_or_else(|| panic!("a version: {text}"))
}

impl Pooler {
    /// Starts one that pools by `session` or `transaction`. Err says why that can not be done here.
    pub(crate) async fn start(mode: &str, database_url: &str) -> Result<Self, String> {
        let program = program()?;
        let keeps_statements = version(&program) >= (1, 21);
        let home = Home::new()?;
        let server: SocketAddr = address(database_url).parse().expect("an address");
        let (user, password) = userinfo(database_url);
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = free.local_addr().expect("an address");
        drop(free);
        let statements = if keeps_statements {
            "max_prepared_statements = 100\n"
        } else {
            ""
        };
        let settings = format!(
            "[databases]\n* = host={} port={} user={user} password={password}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = any\npool_mode = {mode}\ndefault_pool_size = 20\n\
             max_client_conn = 100\n{statements}",
            server.ip(),
            server.port(),
            address.port(),
        );
        let file = home.directory.join("pgbouncer.ini");
        std::fs::write(&file, settings).expect("its settings");
        home.give(&file, 0o600);
        let log = std::fs::File::create(home.directory.join("log")).expect("a log");
        let process = home
            .command(&program)
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("pgbouncer starts");
        let mut pooler = Self {
            process,
            directory: home.directory,
            address,
            keeps_statements,
        };
        until("the pooler listens", PATIENCE, async || {
            if let Some(status) = pooler.process.try_wait().expect("a child") {
                let log = std::fs::read_to_string(pooler.directory.join("log")).unwrap_or_default();
                panic!("pgbouncer ended with {status}: {log}");
            }
            tokio::net::TcpStream::connect(address).await.ok().map(drop)
        })
        .await;
        Ok(pooler)
    }

    /// The same database by way of the pooler.
    pub(crate) fn url(&self, database_url: &str) -> String {
        with_address(database_url, self.address)
    }
}

impl Drop for Pooler {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
        drop(std::fs::remove_dir_all(&self.directory));
    }
}
