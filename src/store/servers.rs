//! The servers that the database's URL names: who of them is asked, and whether one that does not answer still lives.

use std::{
    fmt,
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use deadpool_postgres::{
    Connect, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
};
use futures_util::{FutureExt, future::BoxFuture};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Mutex,
    task::JoinHandle,
};
use tokio_postgres::{
    AsyncMessage, Client, Config, Connection, NoTls,
    config::{Host, TargetSessionAttrs},
    error::SqlState,
    tls::MakeTlsConnect,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{Fate, StoreError, trouble, trouble::Trouble};
use crate::{
    config::DatabaseSettings,
    race, redact,
    tls::{ClientFiles, TlsFilesError},
};

/// All servers, each with connections of its own. Mostly one of them is the primary, and the others have none.
pub(super) struct Servers {
    each: Vec<Arc<Server>>,
    /// Who gave a connection last.
    current: AtomicUsize,
    next_after: Duration,
}

/// One of them.
pub(super) struct Server {
    pool: Pool,
    dial: Dial,
    config: Config,
    /// So long a statement may take before it is asked whether the server lives, and so long that may take.
    pub(super) silence: Duration,
    /// When that was asked last, and the answer.
    looked: Mutex<Option<(Instant, bool)>>,
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pools = self.each.iter().map(|server| server.pool.status());
        f.debug_list().entries(pools).finish()
    }
}

impl Servers {
    /// Connects to nothing yet.
    pub(super) fn new(config: &Config, tls: Option<&ClientFiles>, settings: &DatabaseSettings) -> Result<Self, String> {
        let each = split(config)?
            .into_iter()
            .map(|config| Server::new(config, tls, settings).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            each,
            current: AtomicUsize::default(),
            next_after: settings.next_host_after,
        })
    }

    /// The one that was asked last, then the others in any order.
    fn order(&self) -> Vec<usize> {
        let current = self.current.load(Ordering::Relaxed);
        race::order(0..self.each.len(), |number| *number != current)
    }

    /// A connection to the first that gives one.
    pub(super) async fn connection(&self, during: &'static str) -> Result<(Object, Arc<Server>), StoreError> {
        let tries = self.order().into_iter().filter_map(|number| {
            let server = Arc::clone(self.each.get(number)?);
            Some(async move {
                let client = server.pool.get().await.map_err(|error| no_connection(during, error))?;
                self.current.store(number, Ordering::Relaxed);
                Ok((client, server))
            })
        });
        let tells_more = |error: &StoreError, before: &StoreError| {
            let rank = |error: &StoreError| match error.trouble {
                Trouble::NoAnswer => 0,
                // One that is no primary is there, and that is all.
                Trouble::ReadOnly => 1,
                Trouble::Login
                | Trouble::NoSuchDatabase
                | Trouble::TooMany
                | Trouble::Starting
                | Trouble::Stopping
                | Trouble::NoRoom
                | Trouble::Forgets
                | Trouble::Tls
                | Trouble::Right
                | Trouble::Refuses => 2,
            };
            rank(error) > rank(before)
        };
        race::first(tries, self.next_after, tells_more)
            .await
            .unwrap_or_else(|| Err(StoreError::new(during, Fate::Away, "the database URL names no host")))
    }
}

fn no_connection(during: &'static str, error: PoolError) -> StoreError {
    match error {
        PoolError::Backend(error) => {
            let mut away = StoreError::from_postgres(during, &error);
            // A refused password or a missing database is a setting of somebody's; waiting is still all we can do.
            away.fate = Fate::Away;
            away.sentence = match (error.as_db_error(), std::error::Error::source(&error)) {
                (Some(db), _) => redact::outside(&trouble::without_names(db.message())),
                (None, Some(cause)) => redact::outside(&format!("{}: {cause}", away.sentence)),
                (None, None) => away.sentence,
            };
            away
        }
        other => StoreError::new(during, Fate::Away, format!("no connection to the database: {other}")),
    }
}

impl Server {
    fn new(mut config: Config, tls: Option<&ClientFiles>, settings: &DatabaseSettings) -> Result<Self, String> {
        config.connect_timeout(settings.connect_timeout);
        let dial = Dial {
            tls: tls.cloned(),
            next_after: settings.next_host_after,
            warnings: Arc::default(),
        };
        let recycling = ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        };
        let manager = Manager::from_connect(config.clone(), dial.clone(), recycling);
        let pool = Pool::builder(manager)
            .max_size(settings.pool_size)
            .wait_timeout(Some(settings.acquire_timeout))
            .create_timeout(Some(settings.connect_timeout))
            .recycle_timeout(Some(settings.connect_timeout))
            .runtime(Runtime::Tokio1)
            .pre_recycle(Hook::sync_fn(|client, _| {
                if client.is_closed() {
                    return Err(HookError::message("the connection is closed"));
                }
                Ok(())
            }))
            .build()
            .map_err(|error| format!("the connection pool could not be made: {error}"))?;
        // A standby that became one just now answers too.
        config.target_session_attrs(TargetSessionAttrs::Any);
        Ok(Self {
            pool,
            dial,
            config,
            silence: settings.silence,
            looked: Mutex::default(),
        })
    }

    /// How often it warned of something, on any connection. What it warned of before it answered is counted by then.
    pub(super) fn warnings(&self) -> u64 {
        self.dial.warnings.load(Ordering::Relaxed)
    }

    /// Resolves once the server does not live any more.
    pub(super) async fn gone(&self) {
        while self.lives().await {
            tokio::time::sleep(self.silence).await;
        }
    }

    /// Whether it lets somebody in and answers, on a connection of its own: one statement may take as long as it likes. Asked by
    /// one at a time; the others are told the same.
    async fn lives(&self) -> bool {
        let mut looked = self.looked.lock().await;
        if let Some((when, lives)) = *looked
            && when.elapsed() < self.silence
        {
            return lives;
        }
        let asked = async {
            let (client, connection) = self.dial.dial(&self.config, TargetSessionAttrs::Any).await?;
            let answered = client.simple_query("/* store::lives */ SELECT 1").await;
            connection.abort();
            answered.map(drop)
        };
        let lives = match tokio::time::timeout(self.silence, asked).await {
            Ok(Ok(())) => true,
            // It is there to say no.
            Ok(Err(error)) => error.as_db_error().is_some(),
            Err(_) => false,
        };
        if !lives {
            // The idle ones would each have to be found out.
            self.pool.retain(|_, _| false);
        }
        *looked = Some((Instant::now(), lives));
        lives
    }
}

/// How a server is reached: at any address that its name has.
#[derive(Clone)]
struct Dial {
    tls: Option<ClientFiles>,
    next_after: Duration,
    warnings: Arc<AtomicU64>,
}

impl Dial {
    /// Connects to one that is as the URL wants it; where it does not say, and the name has several addresses, to one that is
    /// as `wanted`.
    async fn dial(
        &self,
        config: &Config,
        wanted: TargetSessionAttrs,
    ) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let addresses = match (config.get_hosts(), config.get_hostaddrs()) {
            ([Host::Tcp(name)], []) => {
                let port = config.get_ports().first().copied().unwrap_or(5432);
                // A name that has none is for the library to complain of.
                match tokio::net::lookup_host((name.as_str(), port)).await {
                    Ok(addresses) => addresses.collect::<Vec<SocketAddr>>(),
                    Err(_) => Vec::new(),
                }
            }
            _ => Vec::new(),
        };
        self.dial_any(config, addresses, wanted).await
    }

    async fn dial_any(
        &self,
        config: &Config,
        addresses: Vec<SocketAddr>,
        wanted: TargetSessionAttrs,
    ) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        if addresses.len() < 2 {
            return self.dial_one(config.clone()).await;
        }
        // One name may stand for a primary and its standbys, and name servers tell the addresses in any order.
        let dials = race::order(addresses, |_| false).into_iter().map(|address| {
            let mut config = config.clone();
            config.hostaddr(address.ip());
            if config.get_target_session_attrs() == TargetSessionAttrs::Any {
                config.target_session_attrs(wanted);
            }
            self.dial_one(config)
        });
        let tells_more = |error: &tokio_postgres::Error, before: &tokio_postgres::Error| {
            error.code().is_some() && before.code().is_none()
        };
        match race::first(dials, self.next_after, tells_more).await {
            Some(outcome) => outcome,
            None => self.dial_one(config.clone()).await,
        }
    }

    async fn dial_one(&self, config: Config) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        match &self.tls {
            None => {
                let (client, connection) = config.connect(NoTls).await?;
                Ok((client, tokio::spawn(listen(connection, Arc::clone(&self.warnings)))))
            }
            Some(tls) => {
                let (client, connection) = config.connect(Anew(tls.clone())).await?;
                Ok((client, tokio::spawn(listen(connection, Arc::clone(&self.warnings)))))
            }
        }
    }
}

/// Drives a connection, and counts what the server warns of.
async fn listen<S, T>(mut connection: Connection<S, T>, warnings: Arc<AtomicU64>)
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    // Who waits for an answer is told of an error; there is nobody else to tell.
    while let Some(Ok(said)) = poll_fn(|context| connection.poll_message(context)).await {
        if let AsyncMessage::Notice(notice) = said
            && *notice.code() == SqlState::WARNING
        {
            warnings.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Connect for Dial {
    fn connect(&self, config: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        let config = config.clone();
        async move { self.dial(&config, TargetSessionAttrs::ReadWrite).await }.boxed()
    }
}

/// TLS as the files say when a connection is made.
struct Anew(ClientFiles);

impl<S> MakeTlsConnect<S> for Anew
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = <MakeRustlsConnect as MakeTlsConnect<S>>::Stream;
    type TlsConnect = <MakeRustlsConnect as MakeTlsConnect<S>>::TlsConnect;
    type Error = TlsFilesError;

    fn make_tls_connect(&mut self, host: &str) -> Result<Self::TlsConnect, TlsFilesError> {
        let mut connector = MakeRustlsConnect::new(self.0.config()?);
        // It knows no error of its own.
        <MakeRustlsConnect as MakeTlsConnect<S>>::make_tls_connect(&mut connector, host)
            .map_err(|error| TlsFilesError(error.to_string()))
    }
}

/// One for each host, with everything else as it was. Of several servers one that writes is wanted, whatever the URL says.
fn split(config: &Config) -> Result<Vec<Config>, String> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let count = hosts.len().max(addresses.len());
    if count < 2 {
        return Ok(vec![config.clone()]);
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err("the database URL has not as many hosts as addresses (host, hostaddr)".to_owned());
    }
    if ports.len() > 1 && ports.len() != count {
        return Err("the database URL has not as many ports as hosts".to_owned());
    }
    Ok((0..count)
        .map(|number| {
            let mut one = alike(config);
            match hosts.get(number) {
                Some(Host::Tcp(name)) => {
                    one.host(name);
                }
                Some(Host::Unix(path)) => {
                    one.host_path(path);
                }
                None => {}
            }
            if let Some(address) = addresses.get(number) {
                one.hostaddr(*address);
            }
            if let Some(port) = ports.get(number).or(ports.first()) {
                one.port(*port);
            }
            if config.get_target_session_attrs() == TargetSessionAttrs::Any {
                one.target_session_attrs(TargetSessionAttrs::ReadWrite);
            }
            one
        })
        .collect())
}

/// A copy without hosts, addresses and ports: these can only be added.
fn alike(config: &Config) -> Config {
    let mut copy = Config::new();
    if let Some(user) = config.get_user() {
        copy.user(user);
    }
    if let Some(password) = config.get_password() {
        copy.password(password);
    }
    if let Some(name) = config.get_dbname() {
        copy.dbname(name);
    }
    if let Some(options) = config.get_options() {
        copy.options(options);
    }
    if let Some(name) = config.get_application_name() {
        copy.application_name(name);
    }
    if let Some(limit) = config.get_connect_timeout() {
        copy.connect_timeout(*limit);
    }
    if let Some(limit) = config.get_tcp_user_timeout() {
        copy.tcp_user_timeout(*limit);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        copy.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        copy.keepalives_retries(retries);
    }
    copy.ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding())
        .load_balance_hosts(config.get_load_balance_hosts());
    copy
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio_postgres::SimpleQueryMessage;

    use super::*;

    #[test]
    fn each_host_has_a_configuration_of_its_own() {
        let read = |text: &str| text.parse::<Config>().expect("a URL");
        let url = "postgres://u:p@a:1,b:2/db?connect_timeout=7&application_name=x&keepalives=0&sslmode=disable";
        let each = split(&read(url)).expect("split");
        let write = "&target_session_attrs=read-write";
        let rest = "db?connect_timeout=7&application_name=x&keepalives=0&sslmode=disable";
        let expected = [
            read(&format!("postgres://u:p@a:1/{rest}{write}")),
            read(&format!("postgres://u:p@b:2/{rest}{write}")),
        ];
        assert_eq!(each, expected);
        // What the URL says counts; one port may be that of all; one host stays as it is.
        let each = split(&read("host=a,b port=9 user=u target_session_attrs=read-only")).expect("split");
        let expected =
            ["a", "b"].map(|host| read(&format!("host={host} port=9 user=u target_session_attrs=read-only")));
        assert_eq!(each, expected);
        let one = read("postgres://u:p@a/db");
        assert_eq!(split(&one), Ok(vec![one]));
        assert!(split(&read("host=a,b,c port=1,2")).is_err());
    }

    /// A server that lets everybody in and, whatever it is asked, answers whether it is read-only.
    fn a_server(address: SocketAddr, read_only: &'static str) -> JoinHandle<()> {
        let message = |kind: u8, body: &[u8]| {
            let length = u32::try_from(body.len() + 4).expect("short");
            [&[kind], &length.to_be_bytes()[..], body].concat()
        };
        let ready = message(b'Z', b"I");
        let welcome = [message(b'R', &[0; 4]), ready.clone()].concat();
        let column = [
            &[0, 1][..],
            b"transaction_read_only\0",
            &[0; 6],
            &[0, 0, 0, 25, 0xff, 0xff],
            &[0xff; 4],
            &[0; 2],
        ];
        let length = u32::try_from(read_only.len()).expect("short").to_be_bytes();
        let answer = [
            message(b'T', &column.concat()),
            message(b'D', &[&[0, 1][..], &length, read_only.as_bytes()].concat()),
            message(b'C', b"SHOW\0"),
            ready,
        ]
        .concat();
        let listener = std::net::TcpListener::bind(address).expect("its address");
        listener.set_nonblocking(true).expect("for tokio");
        let listener = tokio::net::TcpListener::from_std(listener).expect("for tokio");
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (welcome, answer) = (welcome.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut said = [0; 1_024];
                    let mut next = welcome;
                    while stream
                        .read(&mut said)
                        .await
                        .is_ok_and(|count| count > 0 && said[0] != b'X')
                    {
                        if stream.write_all(&next).await.is_err() {
                            return;
                        }
                        next = answer.clone();
                    }
                });
            }
        })
    }

    /// A name that stands for several servers leads to the one that writes; to ask whether anybody lives any of them will do.
    #[tokio::test]
    async fn of_several_addresses_the_one_that_writes_is_taken() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = free.local_addr().expect("its port").port();
        drop(free);
        let [standby, primary, nobody] = [1, 2, 3].map(|last| SocketAddr::from(([127, 0, 0, last], port)));
        let _standby = a_server(standby, "on");
        let _primary = a_server(primary, "off");
        let dial = Dial {
            tls: None,
            next_after: Duration::from_secs(1),
            warnings: Arc::default(),
        };
        let read = |rest: &str| -> Config {
            let url = format!("postgres://u:p@localhost:{port}/db?sslmode=disable{rest}");
            url.parse().expect("a URL")
        };
        let whom = async |rest: &str, addresses: &[SocketAddr], wanted| {
            let (client, _) = dial.dial_any(&read(rest), addresses.to_vec(), wanted).await.ok()?;
            let rows = client
                .simple_query("SHOW transaction_read_only")
                .await
                .expect("an answer");
            rows.iter().find_map(|said| match said {
                SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
        };
        let (any, writes) = (TargetSessionAttrs::Any, TargetSessionAttrs::ReadWrite);
        let all = [standby, nobody, primary];
        for _ in 0..8 {
            assert_eq!(whom("", &all, writes).await.as_deref(), Some("off"));
            let reads = whom("&target_session_attrs=read-only", &all, writes).await;
            assert_eq!(reads.as_deref(), Some("on"));
        }
        assert_eq!(whom("", &[standby, nobody], writes).await, None);
        assert_eq!(whom("", &[standby, nobody], any).await.as_deref(), Some("on"));
        // A name with one address is that server's own, whatever it is: localhost is 127.0.0.1.
        assert_eq!(whom("", &[standby], writes).await.as_deref(), Some("on"));
    }
}
