//! A RabbitMQ of a test's own, for settings that the shared one can not have.

use std::{
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::{
    postgres::Home,
    support::{said, until},
};

/// A node takes its time to start on a busy machine.
const START: Duration = Duration::from_secs(180);

/// A node in a directory of the system's temporary one; both go with it.
pub(crate) struct Node {
    process: Child,
    epmd: Child,
    /// Where it takes AMQP over TLS.
    tls_port: u16,
    /// Where it takes AMQP in the clear, with a password.
    plain_port: u16,
    home: Home,
    log: PathBuf,
}

fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    free.local_addr().expect("an address").port()
}

/// The newest that is installed. Not Debian's wrapper in /usr/sbin: it insists on its own user and directories.
fn program() -> Result<PathBuf, String> {
    let mut places: Vec<PathBuf> = std::fs::read_dir("/usr/lib/rabbitmq/lib")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("sbin/rabbitmq-server")))
        .filter(|path| path.exists())
        .collect();
    places.sort();
    places.pop().ok_or_else(|| "no RabbitMQ is installed here".to_owned())
}

impl Node {
    /// Starts one whose TLS asks everybody for a certificate of an authority, which may be the login if `mechanisms` has
    /// EXTERNAL. Its user is `settled`, with the password `unused`. Err says why that can not be done here.
    pub(crate) async fn start(
        authority: &Path,
        certificate: &Path,
        key: &Path,
        mechanisms: &[&str],
    ) -> Result<Self, String> {
        let program = program()?;
        let home = Home::new()?;
        let [tls_port, plain_port, dist_port, epmd_port] = std::array::from_fn(|_| free_port());
        let place = |name: &str| home.directory.join(name);
        for (name, file) in [("ca.pem", authority), ("server.pem", certificate), ("server.key", key)] {
            std::fs::copy(file, place(name)).expect("a copy");
            home.give(&place(name), 0o600);
        }
        let directory = home.directory.display();
        let mechanisms: String = (1..)
            .zip(mechanisms)
            .map(|(number, name)| format!("auth_mechanisms.{number} = {name}\n"))
            .collect();
        let settings = format!(
            "listeners.tcp.1 = 127.0.0.1:{plain_port}\nlisteners.ssl.1 = 127.0.0.1:{tls_port}\n\
             ssl_options.cacertfile = {directory}/ca.pem\nssl_options.certfile = {directory}/server.pem\n\
             ssl_options.keyfile = {directory}/server.key\nssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = true\nssl_cert_login_from = common_name\n\
             default_user = settled\ndefault_pass = unused\ndisk_free_limit.absolute = 64MB\n{mechanisms}"
        );
        for (name, text, mode) in [
            ("rabbitmq.conf", settings.as_str(), 0o600),
            ("rabbitmq-env.conf", "", 0o600),
            ("enabled_plugins", "[rabbitmq_auth_mechanism_ssl].\n", 0o600),
            // A machine without /etc/hosts does not know localhost.
            (
                "inetrc",
                "{host, {127,0,0,1}, [\"localhost\"]}. {lookup, [file, native]}.\n",
                0o600,
            ),
            (".erlang.cookie", "ofthistestalone", 0o400),
        ] {
            std::fs::write(place(name), text).expect("a file");
            home.give(&place(name), mode);
        }
        for name in ["data", "logs"] {
            std::fs::create_dir(place(name)).expect("a directory");
            home.give(&place(name), 0o755);
        }
        let log = place("console");
        let out = std::fs::File::create(&log).expect("a log");
        let epmd = home
            .command(Path::new("epmd"))
            .args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("epmd: {error}"))?;
        let process = home
            .command(&program)
            .env("HOME", &home.directory)
            // It only makes the script become the server instead of staying as its parent.
            .env("RUNNING_UNDER_SYSTEMD", "yes")
            .env("ERL_EPMD_PORT", epmd_port.to_string())
            .env("ERL_INETRC", place("inetrc"))
            .env("ERL_CRASH_DUMP", place("logs/erl_crash.dump"))
            .env("RABBITMQ_NODENAME", format!("settled-{tls_port}@localhost"))
            .env("RABBITMQ_DIST_PORT", dist_port.to_string())
            .env("RABBITMQ_CONF_ENV_FILE", place("rabbitmq-env.conf"))
            .env("RABBITMQ_CONFIG_FILE", place("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", place("advanced.config"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", place("enabled_plugins"))
            .env("RABBITMQ_MNESIA_BASE", place("data"))
            .env("RABBITMQ_LOG_BASE", place("logs"))
            .env("RABBITMQ_PID_FILE", place("data/pid"))
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "-kernel inet_dist_use_interface {127,0,0,1}",
            )
            .stdout(out.try_clone().expect("the log"))
            .stderr(out)
            .spawn()
            .expect("the server's script runs");
        let mut node = Self {
            process,
            epmd,
            tls_port,
            plain_port,
            home,
            log,
        };
        until("the node listens", START, async || {
            if let Some(status) = node.process.try_wait().expect("a child") {
                panic!("the node ended with {status}: {}", node.said());
            }
            TcpStream::connect(("127.0.0.1", tls_port)).ok().map(drop)
        })
        .await;
        Ok(node)
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Where it is, for whom a certificate logs in; `user` is nothing, or a name and an at sign.
    pub(crate) fn url(&self, user: &str) -> String {
        format!("amqps://{user}localhost:{}/%2f?auth_mechanism=external", self.tls_port)
    }

    /// Where it is in the clear.
    pub(crate) fn plain_url(&self) -> String {
        format!("amqp://settled:unused@127.0.0.1:{}/%2f", self.plain_port)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the node said:\n{}", self.said());
        }
        for child in [&mut self.process, &mut self.epmd] {
            drop(child.kill());
            drop(child.wait());
        }
        // Its own children end with it: they read from it.
        let gone = Command::new("rm").arg("-rf").arg(&self.home.directory).output();
        if let Ok(output) = gone
            && !output.status.success()
        {
            eprintln!("{}", said(&output));
        }
    }
}
