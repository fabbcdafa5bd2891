//! Settings, from wherever they come.

use std::path::Path;

use super::{layers::leaves, *};

fn environment(pairs: &[(&str, &str)]) -> std::vec::IntoIter<(String, String)> {
    let pairs: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    pairs.into_iter()
}

fn load(file: Option<&Path>, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Settings, ConfigError> {
    Settings::load(Sources {
        file: file.map(Path::to_owned),
        environment: environment(variables),
        flags: environment(flags).collect(),
    })
}

fn refused(file: Option<&Path>, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> (String, String) {
    let error = load(file, variables, flags).expect_err("should be refused");
    (error.message().to_owned(), error.hint().to_owned())
}

/// A file of its own that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("settled-config-{}.toml", uuid::Uuid::new_v4()));
        std::fs::write(&path, text).expect("the temporary directory is writable");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).ok();
    }
}

#[test]
fn the_defaults() {
    let settings = load(None, &[], &[]).expect("the defaults are right");
    let Settings {
        allow_plaintext,
        database,
        broker,
        worker,
        park,
        held,
        outbox,
        retry,
        events,
        http,
        api,
        registry,
        dead_letters,
        console,
        log,
        traces,
    } = &settings;
    assert!(!registry.key_proof_required);
    assert!(!allow_plaintext && database.url.is_empty() && broker.url.is_empty());
    assert!(broker.management_url.is_empty());
    assert_eq!(
        (
            database.pool_size,
            database.ca_file.as_deref(),
            broker.ca_file.as_deref()
        ),
        (6, None, None)
    );
    assert_eq!((worker.lanes, worker.prefetch, worker.batch_max), (2, 1000, 256));
    assert_eq!((worker.batch_max_bytes, worker.culprits_per_minute), (4_194_304, 3));
    assert_eq!((worker.own_queues_max, outbox.strikes), (16, 5));
    assert_eq!(worker.partner_rate, 0);
    assert_eq!((held.max_messages, held.max_messages_per_partner), (1_000_000, 500_000));
    assert_eq!((held.max_bytes, held.max_bytes_per_partner), (1 << 30, 1 << 29));
    assert_eq!(held.share, 0.2);
    assert_eq!((park.max_bytes, park.max_bytes_per_partner), (1 << 30, 1 << 27));
    assert_eq!((park.max_per_partner, retry.transient_attempts), (10_000, 8));
    assert_eq!((retry.multiplier, retry.jitter), (2.0, 0.3));
    assert_eq!((events.source.as_str(), http.partner_labels_max), ("/settled", 50));
    assert_eq!(events.remember_max, 1_000_000);
    assert_eq!((events.format, events.batch_max_bytes), (EventFormat::Single, 262_144));
    assert_eq!((http.connections_max, http.connections_per_address_max), (512, 128));
    assert_eq!(http.scrapes_max, 4);
    assert_eq!(http.listen, SocketAddr::from(([127, 0, 0, 1], 9464)));
    assert!(dead_letters.collect);
    assert_eq!((dead_letters.batch_max, dead_letters.confirm_above), (100, 100));
    assert_eq!(
        (dead_letters.max_rows, dead_letters.max_bytes),
        (10_000_000, 50_000_000_000)
    );
    let a_partner = (dead_letters.max_rows_per_partner, dead_letters.max_bytes_per_partner);
    assert_eq!(a_partner, (2_000_000, 10_000_000_000));
    assert_eq!(dead_letters.recheck_interval, Duration::from_secs(5));
    assert!(broker.trusted_users.is_empty() && broker.api_users.is_empty());
    assert!(api.certificate_file.is_none() && api.key_file.is_none() && api.watch_listen.is_none());
    assert!(api.listen.ip().is_loopback() && api.listen.port() == 9465);
    assert_eq!((api.body_max, api.rate_per_token, api.page_max), (262_144, 50, 500));
    assert_eq!(
        (api.updates_max, api.share_max, api.page_max_bytes),
        (192, 64, 1_048_576)
    );
    assert_eq!(
        (
            api.rate_of_strangers,
            api.rate_of_strangers_per_address,
            api.refusals_max
        ),
        (20, 5, 10_000)
    );
    assert_eq!(
        (api.connections_max, api.connections_per_address_max, api.requests_max),
        (512, 128, 256)
    );
    assert_eq!(dead_letters.linger, Duration::from_millis(250));
    assert_eq!((dead_letters.plan_max, dead_letters.due_max), (100_000, 1_000));
    assert_eq!(dead_letters.verdict_deadline, Duration::from_secs(60));
    assert_eq!(dead_letters.driver_lease, Duration::from_secs(15));
    assert_eq!((dead_letters.approve_above, dead_letters.approve_amounts.len()), (0, 0));
    assert_eq!(dead_letters.approval_lasts, Duration::from_secs(3_600));
    assert!(console.listen.ip().is_loopback() && console.proxy_secret_file.is_none() && !console.read_only);
    assert_eq!(
        (console.readers.len(), console.operators.len(), console.approvers.len()),
        (1, 0, 0)
    );
    assert_eq!((console.link_role, console.page), (LinkRole::Approver, 50));
    assert!(!console.in_worker && console.oidc_issuer.is_empty() && console.proxy_ca_file.is_none());
    assert_eq!(
        (console.link_lasts, console.session_idle, console.session_lasts),
        (
            Duration::from_secs(600),
            Duration::from_secs(1_800),
            Duration::from_secs(28_800)
        )
    );
    assert_eq!(
        (console.link_file.as_deref(), console.ended_for),
        (None, Duration::from_secs(3_600))
    );
    assert_eq!(
        (
            console.rate_of_strangers,
            console.rate_of_all_strangers,
            console.strangers_max
        ),
        (20, 500, 64)
    );
    assert_eq!((log.format, log.level), (LogFormat::Auto, LogLevel::Info));
    assert_eq!(
        (traces.links_max, traces.states_max, traces.queue_max, traces.export_max),
        (128, 8_192, 2_048, 512)
    );
    assert!(traces.ca_file.is_none());
    assert!(
        worker.name.ends_with(&format!("-{}", std::process::id())),
        "{}",
        worker.name
    );
    let durations = [
        (database.connect_timeout, 5_000),
        (database.next_host_after, 500),
        (database.silence, 1_500),
        (database.statement_timeout, 10_000),
        (database.lock_timeout, 5_000),
        (database.idle_in_transaction_timeout, 30_000),
        (database.client_deadline, 15_000),
        (database.acquire_timeout, 5_000),
        (broker.management_interval, 10_000),
        (broker.heartbeat, 2_000),
        (broker.next_host_after, 500),
        (broker.connect_timeout, 10_000),
        (broker.publish_deadline, 15_000),
        (broker.replies_connect, 250),
        (broker.replies_rest, 1_000),
        (dead_letters.other_way_wait, 10_000),
        (dead_letters.other_way_poll, 100),
        (worker.drain_deadline, 20_000),
        (worker.pause_release, 60_000),
        (worker.consumer_missing_after, 10_000),
        (worker.own_queue_poll, 1_000),
        (worker.lock_patience, 500),
        (held.others_within, 60_000),
        (registry.key_challenge_lasts, 86_400_000),
        (registry.key_warn_before, 604_800_000),
        (registry.key_use_interval, 60_000),
        (held.poll, 250),
        (held.lease, 30_000),
        (held.first_retry, 250),
        (held.max_interval, 5_000),
        (park.deadline, 900_000),
        (park.first_retry, 500),
        (park.max_interval, 60_000),
        (park.poll, 250),
        (park.lease, 30_000),
        (outbox.lease, 5_000),
        (outbox.relay_interval, 1_000),
        (outbox.idle_delete, 100),
        (outbox.stuck_after, 60_000),
        (outbox.retry_deadline, 30_000),
        (retry.initial, 50),
        (retry.max, 1_000),
        (events.remember, 2_592_000_000),
        (api.wait, 10_000),
        (api.body_timeout, 10_000),
        (api.head_timeout, 5_000),
        (api.idle_timeout, 30_000),
        (api.answer_timeout, 30_000),
        (api.token_lifetime, 7_776_000_000),
        (http.head_timeout, 5_000),
        (http.idle_timeout, 15_000),
        (http.answer_timeout, 30_000),
        (traces.export_interval, 5_000),
        (traces.export_timeout, 10_000),
        (traces.flush_deadline, 2_000),
    ];
    for (at, (duration, millis)) in durations.into_iter().enumerate() {
        assert_eq!(duration, Duration::from_millis(millis), "duration {at}");
    }
}

#[test]
fn every_default_has_a_comment() {
    let lines: Vec<&str> = DEFAULTS.lines().collect();
    let mut settings = 0;
    for pair in lines.windows(2) {
        if pair[1].contains(" = ") && !pair[1].starts_with('#') {
            settings += 1;
            assert!(
                pair[0].starts_with("# ") && pair[0].len() > 12,
                "no comment above: {}",
                pair[1]
            );
        }
    }
    let mut known = Vec::new();
    leaves(&DEFAULTS.parse().expect("TOML"), &mut Vec::new(), &mut known);
    assert_eq!(settings, known.len());
}

#[test]
fn flags_beat_environment_beats_file_beats_defaults() {
    let file = Scratch::new("[worker]\nlanes = 3\n[park]\ndeadline = \"1m\"\n");
    let variable = ("SETTLED_WORKER__LANES", "4");
    let flag = ("worker.lanes", "5");
    let table: [(bool, bool, bool, usize); 8] = [
        (false, false, false, 2),
        (true, false, false, 3),
        (false, true, false, 4),
        (true, true, false, 4),
        (false, false, true, 5),
        (true, false, true, 5),
        (false, true, true, 5),
        (true, true, true, 5),
    ];
    for (in_file, in_environment, on_line, lanes) in table {
        let settings = load(
            in_file.then_some(file.0.as_path()),
            if in_environment {
                std::slice::from_ref(&variable)
            } else {
                &[]
            },
            if on_line { std::slice::from_ref(&flag) } else { &[] },
        )
        .expect("right");
        assert_eq!(settings.worker.lanes, lanes, "{in_file} {in_environment} {on_line}");
        assert_eq!(settings.database.pool_size, lanes + 4);
        assert_eq!(
            settings.park.deadline,
            Duration::from_secs(if in_file { 60 } else { 900 })
        );
    }
}

#[test]
fn values_from_text_take_the_type_of_the_default() {
    let settings = load(
        None,
        &[
            ("SETTLED_ALLOW_PLAINTEXT", "true"),
            ("SETTLED_PARK__DEADLINE", "2s"),
            ("SETTLED_DEAD_LETTERS__COLLECT", "false"),
            ("SETTLED_HTTP__LISTEN", "127.0.0.1:0"),
            ("SETTLED_WORKER__NAME", "007"),
            ("SETTLED_EVENTS__SOURCE", "true"),
            ("SETTLED_RETRY__MULTIPLIER", "3"),
            ("SETTLED_DATABASE__POOL_SIZE", "9"),
            ("SETTLED_LOG__LEVEL", "debug"),
        ],
        &[("database.ca_file", "/etc/ca.pem"), ("park.max_interval", "1h 30m")],
    )
    .expect("right");
    assert!(settings.allow_plaintext && !settings.dead_letters.collect);
    assert_eq!(settings.park.deadline, Duration::from_secs(2));
    assert_eq!(settings.park.max_interval, Duration::from_secs(5_400));
    assert_eq!(settings.http.listen.port(), 0);
    assert_eq!(
        (settings.worker.name.as_str(), settings.events.source.as_str()),
        ("007", "true")
    );
    assert_eq!((settings.retry.multiplier, settings.database.pool_size), (3.0, 9));
    assert_eq!(settings.log.level, LogLevel::Debug);
    assert_eq!(settings.database.ca_file.as_deref(), Some(Path::new("/etc/ca.pem")));
}

#[test]
fn variables_that_are_not_settings_are_left_alone() {
    let settings = load(
        None,
        &[
            ("SETTLED_TEST_SEED", "7"),
            ("SETTLED_FAULT", "before-ack"),
            ("SETTLED_WORKER", "x"),
            ("PATH", "/bin"),
            ("WORKER__LANES", "9"),
        ],
        &[],
    );
    assert_eq!(settings.expect("right").worker.lanes, 2);
}

#[test]
fn unknown_keys_are_named_with_place_and_neighbour() {
    let file = Scratch::new("# first\n[worker]\nlanes = 2\n\n[park]\n  dedline = \"1m\"\n");
    let place = file.0.display().to_string();
    let (message, hint) = refused(Some(&file.0), &[], &[]);
    assert_eq!(message, format!("unknown setting `park.dedline` ({place}, line 6)"));
    assert!(hint.starts_with("the nearest known one is `park.deadline`;"), "{hint}");

    for (name, key, nearest) in [
        ("SETTLED_WORKER__LANE", "worker.lane", "SETTLED_WORKER__LANES"),
        ("SETTLED_WORKR__LANES", "workr.lanes", "SETTLED_WORKER__LANES"),
        // Other sections have one of this name too.
        (
            "SETTLED_WORKR__BATCH_MAX",
            "workr.batch_max",
            "SETTLED_WORKER__BATCH_MAX",
        ),
        ("SETTLED_APY__LISTEN", "apy.listen", "SETTLED_API__LISTEN"),
        ("SETTLED_WORKER__LANES__X", "worker.lanes.x", "SETTLED_WORKER__LANES"),
        ("SETTLED_BROKER__ULR", "broker.ulr", "SETTLED_BROKER_URL"),
        ("SETTLED_Worker__Lanes", "worker.lanes", "SETTLED_WORKER__LANES"),
        ("SETTLED___", "..", "SETTLED_"),
    ] {
        let (message, hint) = refused(None, &[(name, "3")], &[]);
        assert!(message.starts_with("unknown setting `"), "{message}");
        assert!(
            message.ends_with(&format!("(environment variable {name})")),
            "{message}"
        );
        if key != ".." {
            assert!(message.contains(&format!("`{key}`")), "{message}");
        }
        assert!(hint.contains(nearest), "{hint}");
    }

    let (message, hint) = refused(None, &[], &[("drain_deadline", "1s")]);
    assert_eq!(message, "unknown setting `drain_deadline` (command line)");
    assert!(hint.contains("`worker.drain_deadline`"), "{hint}");

    for (text, line, key) in [
        ("[workr]\n", 1, "workr"),
        ("\n\nworker = { lanes = 2, lames = 3 }\n", 3, "worker.lames"),
        ("worker.lane = 1\n", 1, "worker.lane"),
        ("[worker.lanes]\nx = 1\n", 2, "worker.lanes.x"),
    ] {
        let file = Scratch::new(text);
        let (message, _) = refused(Some(&file.0), &[], &[]);
        assert_eq!(
            message,
            format!("unknown setting `{key}` ({}, line {line})", file.0.display())
        );
    }
    let file = Scratch::new("worker = 3\n");
    assert!(refused(Some(&file.0), &[], &[]).0.starts_with("`worker` is a section"));
}

#[test]
fn wrong_values_are_named_with_place() {
    for (key, text, expected) in [
        ("park.deadline", "15", "`park.deadline` = \"15\": not a duration"),
        ("park.deadline", "15 parsecs", "not a duration"),
        ("park.deadline", "-5s", "not a duration"),
        ("park.deadline", "", "not a duration"),
        ("park.deadline", "0s", "must be from 100ms to 720h"),
        ("park.deadline", "721h", "must be from 100ms to 720h"),
        ("park.deadline", "99999999999999999999h", "not a duration"),
        ("park.poll", "10.5ms", "whole milliseconds"),
        ("broker.heartbeat", "1500ms", "whole seconds"),
        ("worker.lanes", "0", "`worker.lanes` = 0: must be from 1 to 16"),
        ("worker.lanes", "17", "must be from 1 to 16"),
        ("worker.lanes", "-1", "must be from 1 to 16"),
        (
            "worker.lanes",
            "two",
            "`worker.lanes` must be a whole number, not \"two\"",
        ),
        ("worker.lanes", "2.0", "must be a whole number"),
        ("worker.lanes", "99999999999999999999", "must be a whole number"),
        ("worker.prefetch", "2001", "must be from 1 to 2000"),
        ("worker.batch_max", "2001", "must be from 1 to 2000"),
        ("worker.batch_max_bytes", "1023", "must be from 1024 to 268435456"),
        ("allow_plaintext", "yes", "must be true or false"),
        ("retry.jitter", "0.95", "must be from 0.0 to 0.9"),
        ("retry.jitter", "nan", "must be from 0.0 to 0.9"),
        ("retry.multiplier", "0.5", "must be from 1.0 to 10.0"),
        ("retry.multiplier", "fast", "must be a number"),
        ("http.listen", "localhost", "must be an IP address and a port"),
        ("events.source", "", "must be 1 to 255 bytes long"),
        ("events.source", "a b", "no white space"),
        ("events.format", "batch", "unknown variant `batch`"),
        ("events.format", "Batched", "unknown variant `Batched`"),
        ("events.batch_max_bytes", "1023", "must be from 1024 to 16777216"),
        ("log.format", "xml", "unknown variant `xml`"),
        ("worker", "3", "`worker` is a section, not a setting"),
        (
            "database.url",
            "mysql://u:hunter2@h/d",
            "`database.url` must begin with postgres://",
        ),
        (
            "broker.url",
            "http://u:hunter2@h",
            "`broker.url` must begin with amqp://",
        ),
        (
            "database.pool_size",
            "2",
            "leaves no connection beside those of 2 lanes",
        ),
        (
            "retry.initial",
            "6s",
            "`retry.initial` (6s, command line) is longer than `retry.max` (1s, default)",
        ),
        (
            "park.first_retry",
            "61s",
            "is longer than `park.max_interval` (1m, default)",
        ),
        (
            "database.client_deadline",
            "9s",
            "`database.statement_timeout` (10s, default) is longer than",
        ),
    ] {
        let (message, hint) = refused(None, &[], &[(key, text)]);
        assert!(message.contains(expected), "{key}={text}: {message}");
        assert!(message.contains("command line"), "{message}");
        assert!(
            !message.contains('\n') && !hint.is_empty() && !message.contains("hunter2"),
            "{message}"
        );
    }
    for (text, expected) in [
        (
            "[park]\ndeadline = 15\n",
            "must be a duration with its unit, such as \"15m\", not a value of type integer",
        ),
        (
            "[worker]\nlanes = \"2\"\n",
            "`worker.lanes` must be a whole number, not a value of type string",
        ),
        ("[worker]\nlanes = [2]\n", "not a value of type array"),
        ("[worker]\nlanes = 20\n", "`worker.lanes` = 20: must be from 1 to 16"),
    ] {
        let file = Scratch::new(text);
        let (message, _) = refused(Some(&file.0), &[], &[]);
        assert!(message.contains(expected), "{message}");
        assert!(
            message.ends_with(&format!("({}, line 2)", file.0.display())),
            "{message}"
        );
    }
}

#[test]
fn a_broken_file_is_said_without_its_content() {
    let file = Scratch::new("[database]\nurl = \"postgres://u:hunter2@h\n");
    let (message, _) = refused(Some(&file.0), &[], &[]);
    assert!(message.contains(", line 2: "), "{message}");
    assert!(!message.contains("hunter2") && !message.contains('\n'), "{message}");
    let (message, _) = refused(Some(Path::new("/nowhere/settled.toml")), &[], &[]);
    assert!(
        message.starts_with("cannot read the settings file /nowhere/settled.toml"),
        "{message}"
    );
    let twice = Scratch::new("[worker]\nlanes = 1\nlanes = 2\n");
    assert!(refused(Some(&twice.0), &[], &[]).0.contains(", line 3: "));
}

#[test]
fn the_urls_have_names_of_their_own() {
    let settings = load(
        None,
        &[
            ("SETTLED_DATABASE_URL", "postgres://db/x"),
            ("SETTLED_BROKER__URL", "amqp://mq"),
        ],
        &[],
    )
    .expect("right");
    assert_eq!(settings.database_url().expect("given").expose(), "postgres://db/x");
    assert_eq!(settings.broker_url().expect("given").expose(), "amqp://mq");

    let file = Scratch::new("  postgres://u:hunter2@db/x \n");
    let path = file.0.display().to_string();
    let settings = load(None, &[("SETTLED_DATABASE_URL_FILE", &path)], &[]).expect("right");
    assert_eq!(settings.database.url.expose(), "postgres://u:hunter2@db/x");
    let missing = settings.broker_url().expect_err("nobody said");
    assert_eq!(missing.message(), "no broker is configured");
    assert!(missing.hint().contains("SETTLED_BROKER_URL "), "{}", missing.hint());

    let both = [
        ("SETTLED_DATABASE_URL", "postgres://db/x"),
        ("SETTLED_DATABASE_URL_FILE", path.as_str()),
    ];
    assert_eq!(
        refused(None, &both, &[]).0,
        "SETTLED_DATABASE_URL and SETTLED_DATABASE_URL_FILE both set database.url"
    );
    // Empty means that nothing was said.
    let settings = load(None, &[("SETTLED_DATABASE_URL", ""), both[1]], &[]).expect("right");
    assert!(!settings.database.url.is_empty());
    let (message, _) = refused(None, &[("SETTLED_BROKER_URL_FILE", "/nowhere/url")], &[]);
    assert!(
        message.starts_with("cannot read the file /nowhere/url that SETTLED_BROKER_URL_FILE names"),
        "{message}"
    );
    let empty = Scratch::new(" \n");
    let (message, _) = refused(
        None,
        &[("SETTLED_BROKER_URL_FILE", &empty.0.display().to_string())],
        &[],
    );
    assert!(message.ends_with("is empty"), "{message}");
    // A flag still wins, and a DSN of pairs is fine.
    let settings = load(
        None,
        &both[..1],
        &[("database.url", "host=db dbname=x password=hunter2")],
    )
    .expect("right");
    assert_eq!(settings.database.url.expose(), "host=db dbname=x password=hunter2");
    assert!(!format!("{settings:?}").contains("hunter2"));
}

/// A URL or connection string where it does not belong, or written wrong: no word of it is repeated.
#[test]
fn what_may_be_a_secret_is_not_repeated() {
    for secret in [
        "postgres://u:hunter2@h/d",
        "amqp://u:hunter2@h/v",
        "mysql://u:hunter2@h",
        "host=h user=u password=hunter2",
        "host = h password = 'hunter2'",
        "u:hunter2@h",
        "PASSWORD=hunter2",
    ] {
        let variables: &[&[(&str, &str)]] = &[
            &[("SETTLED_DATABASE_URL_FILE", secret)],
            &[("SETTLED_BROKER_URL_FILE", secret)],
            &[("SETTLED_BROKER_URL", secret), ("SETTLED_WORKER__LANES", secret)],
            &[("SETTLED_WORKER__LANES", secret)],
            &[("SETTLED_PARK__DEADLINE", secret)],
            &[("SETTLED_RETRY__JITTER", secret)],
            &[("SETTLED_ALLOW_PLAINTEXT", secret)],
            &[("SETTLED_HTTP__LISTEN", secret)],
            &[("SETTLED_LOG__LEVEL", secret)],
            &[("SETTLED_EVENTS__FORMAT", secret)],
        ];
        for variables in variables {
            let (message, hint) = refused(None, variables, &[]);
            assert!(
                !format!("{message}{hint}").contains("unter2"),
                "{variables:?}: {message}"
            );
        }
        for flag in ["worker.lanes", "databse.url", "database", secret] {
            let (message, hint) = refused(None, &[], &[(flag, secret)]);
            assert!(
                !format!("{message}{hint}").contains("unter2"),
                "{flag}: {message} {hint}"
            );
        }
        let (message, hint) = refused(Some(Path::new(secret)), &[], &[]);
        assert!(!format!("{message}{hint}").contains("unter2"), "{message}");
        for text in [
            secret.to_owned(),
            format!("[database]\nurl = {secret}"),
            format!("[worker]\nlanes = \"{secret}\""),
        ] {
            let file = Scratch::new(&text);
            let (message, hint) = refused(Some(&file.0), &[], &[]);
            assert!(!format!("{message}{hint}").contains("unter2"), "{text}: {message}");
        }
    }
}

#[test]
fn passwords_are_never_shown() {
    let table = [
        ("postgres://u:hunter2@h:5432/d", "postgres://u:***@h:5432/d"),
        ("postgres://u@h/d?sslmode=require", "postgres://u@h/d?sslmode=require"),
        (
            "postgres://h/d?user=u&password=hunter2",
            "postgres://h/d?user=u&password=***",
        ),
        (
            "postgres://h/d?p%61ssword=hunter2&sslmode=x",
            "postgres://h/d?p%61ssword=***&sslmode=x",
        ),
        ("postgres://u:hun@ter2@h/d", "postgres://u:***@h/d"),
        ("postgres://u:hun/ter2@h/d", "postgres://***"),
        ("postgres://h/d?password=hunter2@x", "postgres://***"),
        ("postgres://h:5/d?password=ab@hunter2", "postgres://***"),
        (
            "amqps://u:hunter2@h:5671/%2f?heartbeat=10",
            "amqps://u:***@h:5671/%2f?heartbeat=10",
        ),
        ("amqp://h", "amqp://h"),
        ("amqp://u:hunter2@a:5672,b/v", "amqp://u:***@a:5672,b/v"),
        (
            "amqp://u:hunter2@a/v, amqps://u:hun,ter2@b/v",
            "amqp://u:***@a/v,amqps://u:***@b/v",
        ),
        ("amqp://u:hun,amqp://ter2@h/v", "amqp://***,amqp://***"),
        (
            "host=h user=u password=hunter2 dbname=d",
            "host=h user=u password=*** dbname=d",
        ),
        (
            "host=h password='hun ter2\\' host=hunter2' dbname=d",
            "host=h password=*** dbname=d",
        ),
        ("password = hunter2 host = h", "password=*** host=h"),
        ("password=hunter2\\ host=hunter2 host=h", "password=*** host=h"),
        ("password='hunter2", "password=***"),
        ("hunter2", "***"),
        ("", ""),
    ];
    for (secret, shown) in table {
        let secret = Secret::new(secret);
        assert_eq!(secret.redacted(), shown);
        assert_eq!(format!("{secret:?}"), format!("{shown:?}"));
        assert!(!format!("{secret:#?}").contains("hunter2"));
    }
}

#[test]
fn a_variable_that_is_nearly_one_of_ours_is_refused() {
    for (name, meant) in [
        ("SETTLED_DATABSE_URL", "SETTLED_DATABASE_URL"),
        ("SETTLED_BROKER_ULR", "SETTLED_BROKER_URL"),
        ("SETTLED_BROKER_URL_FIEL", "SETTLED_BROKER_URL_FILE"),
        ("SETTLED_WORKER_LANES", "SETTLED_WORKER__LANES"),
        ("SETTLED_LOG_LEVEL", "SETTLED_LOG__LEVEL"),
        ("SETTLED_DEAD_LETTERS_COLLECT", "SETTLED_DEAD_LETTERS__COLLECT"),
        ("SETTLED_ALLOW_PLAIN_TEXT", "SETTLED_ALLOW_PLAINTEXT"),
        ("SETTLED_worker_lanes", "SETTLED_WORKER__LANES"),
    ] {
        let (message, hint) = refused(None, &[(name, "amqp://u:hunter2@h")], &[]);
        assert!(message.contains(name) && !message.contains("hunter2"), "{message}");
        assert!(hint.starts_with(&format!("did you mean {meant}?")), "{name}: {hint}");
    }
    // What scripts, tests and the compose file use, and what is far from everything.
    for name in [
        "SETTLED_AMQP_PORT",
        "SETTLED_BROKER_PASSWORD",
        "SETTLED_FAULT",
        "SETTLED_FAULTS_JOBS",
        "SETTLED_HTTP_PORT",
        "SETTLED_MANAGEMENT_PORT",
        "SETTLED_POSTGRES_PASSWORD",
        "SETTLED_TEST_KEEP",
        "SETTLED_TEST_SEED",
        "SETTLED_W",
        "SETTLED_WORKER",
        "SETTLED_IMAGE",
    ] {
        assert!(load(None, &[(name, "x")], &[]).is_ok(), "{name}");
    }
}

#[test]
fn every_setting_is_told_with_its_origin_and_without_a_password() {
    let file = Scratch::new("[worker]\nlanes = 3\n[park]\ndeadline = \"1m\"\n");
    let (settings, told) = Settings::told(Sources {
        file: Some(file.0.clone()),
        environment: environment(&[
            ("SETTLED_DATABASE_URL", "host=h password=hunter2 user=u"),
            ("SETTLED_BROKER__URL", "amqp://u:hunter2@h/v"),
            ("SETTLED_PARK__DEADLINE", "2s"),
            ("SETTLED_BROKER__TRUSTED_USERS", "a@b,c"),
        ]),
        flags: vec![
            ("log.level".to_owned(), "debug".to_owned()),
            // In the wrong place.
            ("broker.ca_file".to_owned(), "postgres://u:hunter2@h/d".to_owned()),
        ],
    })
    .expect("right");
    let mut known = Vec::new();
    leaves(&DEFAULTS.parse().expect("TOML"), &mut Vec::new(), &mut known);
    let names: Vec<&String> = told.iter().map(|told| &told.setting).collect();
    assert_eq!(names, known.iter().collect::<Vec<_>>());
    let of = |setting: &str| told.iter().find(|told| told.setting == setting).expect(setting);
    let variable = |name: &str| Origin::Variable { name: name.to_owned() };
    let table = [
        ("worker.batch_max", serde_json::json!(256), Origin::Default),
        (
            "worker.lanes",
            3.into(),
            Origin::File {
                name: file.0.clone(),
                line: 2,
            },
        ),
        ("park.deadline", "2s".into(), variable("SETTLED_PARK__DEADLINE")),
        (
            "database.url",
            "host=h password=*** user=u".into(),
            variable("SETTLED_DATABASE_URL"),
        ),
        ("broker.url", "amqp://u:***@h/v".into(), variable("SETTLED_BROKER__URL")),
        (
            "broker.trusted_users",
            serde_json::json!(["a@b", "c"]),
            variable("SETTLED_BROKER__TRUSTED_USERS"),
        ),
        ("log.level", "debug".into(), Origin::Flag),
        ("database.pool_size", 7.into(), Origin::Default),
        ("worker.name", settings.worker.name.clone().into(), Origin::Default),
    ];
    for (setting, value, from) in table {
        assert_eq!((&of(setting).value, &of(setting).from), (&value, &from), "{setting}");
    }
    assert_eq!(of("database.pool_size").derived, Some("worker.lanes + 4"));
    assert!(!serde_json::to_string(&told).expect("JSON").contains("hunter2"));
}

#[test]
fn amounts_addresses_and_headers_are_read_or_refused() {
    let list = |setting: &str, text: &str| load(None, &[], &[(setting, text)]);
    let settings = list("dead_letters.approve_amounts", "BTC=100000000,eth:x=0").expect("amounts");
    assert_eq!(
        settings.dead_letters.approve_amounts,
        [
            ("BTC".to_owned(), "100000000".to_owned()),
            ("eth:x".to_owned(), "0".to_owned())
        ]
    );
    let settings = list("console.workers", "127.0.0.1:9464").expect("addresses");
    assert_eq!(settings.console.workers, [SocketAddr::from(([127, 0, 0, 1], 9464))]);
    for (setting, wrong) in [
        ("dead_letters.approve_amounts", "BTC"),
        ("dead_letters.approve_amounts", "BTC=1.5"),
        ("dead_letters.approve_amounts", "BTC=-1"),
        ("dead_letters.approve_amounts", "=1"),
        ("console.workers", "localhost"),
        ("console.proxy_user_header", "X-User"),
        ("console.proxy_user_header", ""),
        ("console.link_role", "owner"),
    ] {
        let error = list(setting, wrong).expect_err(wrong);
        assert!(error.message().contains(setting), "{wrong}: {}", error.message());
    }
}
