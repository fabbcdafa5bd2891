//! The lines about the database.

use std::{collections::BTreeMap, time::Duration};

use jiff::{SignedDuration, Timestamp};

use super::{Check, POSTGRES_MIN, certificate, versions};
use crate::{
    config::Settings,
    domain::calendar::rfc3339,
    settle::{self, Batch, Clerk, blocked::SideRoom},
    store::{
        self, Store, StoreError,
        dead_letter_space::SpaceBounds,
        held::HeldWhy,
        roles::DatabaseRole,
        vitals::{self, Vitals},
    },
    worker::{
        collector::{self, SpaceWatch},
        fill::{self, Fill},
    },
};

/// Validity of keys and deadlines of parking follow the database's clock, logs and tools this machine's.
const CLOCK_MAX: SignedDuration = SignedDuration::from_secs(2);

/// Messages of the side room that wait this long are worth a look.
const HELD_FOR_LONG: Duration = Duration::from_secs(15 * 60);

/// Where the database is asked; or why it can not be.
pub(in crate::cli) type Asked = Result<Store, Check>;

pub(super) fn store(settings: &Settings) -> Asked {
    if let Err(error) = settings.database_url() {
        return Err(Check::bad("database", error.message()).hint(error.hint()));
    }
    Store::new(settings).map_err(|sentence| {
        let hint = "check database.url, database.ca_file and database.client_certificate_file";
        Check::bad("database", sentence).hint(hint)
    })
}

pub(super) async fn checks(settings: &Settings, store: &Store) -> Vec<Check> {
    let vitals = match store.vitals().await {
        Err(error) => return vec![Check::failed("database", &error.into())],
        Ok(vitals) => vitals,
    };
    let mut checks = vec![server(&vitals)];
    checks.extend(certificate("database_certificate", store.certificate_until()));
    let grants = grants(store, &vitals).await;
    let version = match store.schema_version().await {
        Err(error) if error.is_right() => {
            let hint = grants.hint.clone().unwrap_or_default();
            checks.push(Check::bad("schema", format!("it may be there, but can not be looked at: {error}")).hint(hint));
            None
        }
        Err(error) => {
            checks.push(Check::failed("schema", &error.into()));
            return checks;
        }
        Ok(version) => {
            checks.push(schema(version));
            version
        }
    };
    // Without a schema each of these would only say so again.
    if version.is_some() || !grants.ok {
        checks.push(append_only(store, &vitals).await);
        checks.push(functions(store).await);
        checks.push(everybody(store).await);
        checks.push(grants);
        checks.push(ownership(store, &vitals).await);
    }
    // To count what waits is a walk through all of it: the rest is asked meanwhile.
    let (letters, rest) = tokio::join!(
        async {
            match version {
                Some(_) => Some(open_dead_letters(store).await),
                None => None,
            }
        },
        rest(settings, store, &vitals, version.is_some()),
    );
    let (before, after) = rest;
    checks.extend(before);
    checks.extend(letters);
    checks.extend(after);
    checks
}

/// What stands before the letters, and after them.
async fn rest(settings: &Settings, store: &Store, vitals: &Vitals, has_schema: bool) -> (Vec<Check>, Vec<Check>) {
    let mut checks = Vec::new();
    if has_schema && !vitals.read_only {
        checks.push(rehearsal(&Clerk::new(settings, store.clone())).await);
    }
    checks.push(clock(store).await);
    checks.push(limits(store).await);
    checks.push(synchronous_commit(vitals));
    checks.push(standbys(vitals));
    checks.push(fsync(vitals));
    if !has_schema {
        return (checks, Vec::new());
    }
    checks.push(keys(store, settings.registry.key_warn_before).await);
    let after = vec![
        outbox(store, settings.outbox.stuck_after).await,
        dead_letter_space(store, settings).await,
        outbox_refused(store).await,
        held(store, settings).await,
    ];
    (checks, after)
}

fn asked<T>(name: &str, answer: Result<T, StoreError>, judge: impl FnOnce(T) -> Check) -> Check {
    match answer {
        Ok(value) => judge(value),
        Err(error) => Check::failed(name, &error.into()),
    }
}

fn server(vitals: &Vitals) -> Check {
    let detail = format!("PostgreSQL {}, as user {}", vitals.version, vitals.user);
    if vitals.version_number < POSTGRES_MIN {
        return Check::bad("database", format!("{detail}: it is older than 15")).hint("upgrade the server");
    }
    if let Err(sentence) = store::check_compression(vitals.has_lz4) {
        return Check::bad("database", format!("{detail}: {sentence}")).hint("`settled migrate` changes nothing on it");
    }
    if vitals.read_only {
        return Check::bad("database", format!("{detail}: it is read-only, a standby perhaps"))
            .hint("let the URL name the primary");
    }
    Check::good("database", detail).noting(versions::of_postgres(vitals.version_number, Timestamp::now()))
}

fn schema(version: Option<i32>) -> Check {
    let hint = match version {
        Some(version) if version > store::schema_version() => "use the newer program",
        Some(_) | None => "run `settled migrate`",
    };
    match store::check_schema(version) {
        Ok(()) => Check::good(
            "schema",
            format!("version {}, as this program needs", store::schema_version()),
        ),
        Err(sentence) => Check::bad("schema", sentence).hint(hint),
    }
}

async fn append_only(store: &Store, vitals: &Vitals) -> Check {
    const NAME: &str = "append_only";
    if vitals.replication_role != "origin" {
        return Check::bad(
            NAME,
            format!(
                "session_replication_role is {}: no trigger fires",
                vitals.replication_role
            ),
        )
        .hint("set it back to origin for this role and database");
    }
    asked(NAME, store.missing_guards().await, |missing| {
        if missing.is_empty() {
            return Check::good(NAME, "ledger, settlements, receipts and audit refuse change");
        }
        Check::bad(NAME, format!("missing or switched off: {}", missing.join(", ")))
            .hint("somebody altered the schema: find out who and why, then restore the triggers")
    })
}

/// What does its owner's work is called by whom it is for.
async fn functions(store: &Store) -> Check {
    const NAME: &str = "functions";
    asked(NAME, store.open_functions().await, |open| {
        if open.is_empty() {
            return Check::good(NAME, "no function that does what its owner may is everybody's");
        }
        let revoked = open
            .iter()
            .map(|function| format!("REVOKE ALL ON FUNCTION {function} FROM PUBLIC;"));
        let lines: Vec<String> = revoked.collect();
        Check::bad(NAME, format!("everybody may call {}", open.join(", ")))
            .hint(format!("as the owner of the schema: {}", lines.join(" ")))
    })
}

/// Not a problem by itself: our functions look for nothing there. But whoever gets in with any login has less to try.
async fn everybody(store: &Store) -> Check {
    const NAME: &str = "everybody";
    asked(NAME, store.open_places().await, |open| {
        if open.is_empty() {
            return Check::good(NAME, "who has no right of their own makes nothing in this database");
        }
        let (made, revoked): (Vec<&str>, Vec<&str>) = open
            .iter()
            .map(|place| (place.what.as_str(), place.revoked.as_str()))
            .unzip();
        Check::good(NAME, format!("everybody may make {} in this database", made.join(", "))).hint(format!(
            "a warning: as the owner of the database: {} (of temporary objects `settled roles --apply` does it)",
            revoked.join(" ")
        ))
    })
}

async fn grants(store: &Store, vitals: &Vitals) -> Check {
    asked("grants", store.missing_grants().await, |missing| {
        if missing.is_empty() {
            return Check::good("grants", format!("user {} may do what the worker does", vitals.user));
        }
        Check::bad("grants", format!("user {} lacks {}", vitals.user, missing.join(", "))).hint(format!(
            "as the owner of the schema: {}",
            mending(&missing, &vitals.user)
        ))
    })
}

/// The SQL that grants what is missing: one statement a thing.
fn mending(missing: &[String], user: &str) -> String {
    let mut things: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for grant in missing {
        let Some((privilege, thing)) = grant.split_once(" on ") else {
            continue;
        };
        let thing = match thing.strip_prefix("schema ") {
            Some(schema) => format!("SCHEMA {schema}"),
            None if thing.ends_with(')') => format!("FUNCTION {thing}"),
            None => thing.to_owned(),
        };
        things.entry(thing).or_default().push(privilege);
    }
    let user = format!("\"{}\"", user.replace('"', "\"\""));
    let statements: Vec<String> = things
        .into_iter()
        .map(|(thing, privileges)| format!("GRANT {} ON {thing} TO {user};", privileges.join(", ")))
        .collect();
    statements.join(" ")
}

/// Not a problem by itself: on a developer's machine one user does everything.
async fn ownership(store: &Store, vitals: &Vitals) -> Check {
    let user = &vitals.user;
    let answer = async {
        let more = store.more_than(DatabaseRole::Worker).await?;
        Ok::<_, StoreError>((store.owns_tables().await?, store.is_superuser().await?, more))
    };
    asked("ownership", answer.await, |(owns, is_superuser, more)| {
        if owns || is_superuser {
            let what = if is_superuser { "is a superuser" } else { "owns tables" };
            return Check::good(
                "ownership",
                format!("user {user} {what}, and could switch off what refuses change"),
            )
            .hint(
                "a warning: give the worker a user of its own that owns nothing, a member of settled_worker (`settled roles`)",
            );
        }
        let check = Check::good("ownership", format!("user {user} owns no table"));
        if more.is_empty() {
            return check;
        }
        let more: Vec<String> = more.iter().map(ToString::to_string).collect();
        check.hint(format!(
            "a warning: a worker does not need what this user may do: {}",
            more.join(", ")
        ))
    })
}

async fn rehearsal(clerk: &Clerk) -> Check {
    const NAME: &str = "rehearsal";
    let rehearsed = async {
        settle::rehearse(clerk, &Batch::default(), SideRoom::Free).await?;
        collector::rehearse(clerk).await
    };
    match rehearsed.await {
        Ok(()) => Check::good(
            NAME,
            "an empty batch ran every statement of a settlement and of the collector, and was undone",
        ),
        Err(error) => Check::bad(NAME, format!("an empty batch can not be settled: {error}"))
            .hint("the lines above may say why; the worker would pause"),
    }
}

/// What is committed and not told.
async fn outbox(store: &Store, stuck_after: Duration) -> Check {
    const NAME: &str = "outbox";
    asked(NAME, store.backlog().await, |backlog| {
        let detail = format!("{} publications wait in {} rows", backlog.publications, backlog.rows);
        if backlog.rows == 0 || backlog.oldest < stuck_after {
            return Check::good(NAME, detail);
        }
        let oldest = backlog.oldest.as_secs();
        Check::bad(NAME, format!("{detail}, the oldest for {oldest} s")).hint(
            "the worker's log says why it can not publish; with no worker running, start one: its relay publishes what is left",
        )
    })
}

/// Events and dead letters that nobody heard of.
async fn outbox_refused(store: &Store) -> Check {
    const NAME: &str = "outbox_refused";
    asked(NAME, store.outbox_refused().await, |found| match found {
        None => Check::good(NAME, "the broker took everything that was ever published"),
        Some((count, oldest)) => Check::bad(
            NAME,
            format!(
                "{count} publications were refused by the broker and set aside, the oldest at {}",
                rfc3339(oldest)
            ),
        )
        .hint("`settled outbox list` says why of each; once that is mended, `settled outbox retry` has them published"),
    })
}

/// What is held is judged within moments, unless nobody works or somebody holds a lock for long.
async fn held(store: &Store, settings: &Settings) -> Check {
    const NAME: &str = "held";
    asked(NAME, store.count_held().await, |totals| {
        let room = Fill::measure(&settings.held, &totals);
        let because = |why: HeldWhy| -> u64 {
            let of = totals.iter().filter(|total| total.why == why);
            of.map(|total| total.messages).sum()
        };
        let (locked, quarantined) = (because(HeldWhy::Locked), because(HeldWhy::Quarantine));
        let detail = match room.sentence() {
            None => "no message is held to be judged later".to_owned(),
            Some(sentence) if quarantined > 0 => {
                format!("{sentence}; because of locks: {locked}, of quarantine: {quarantined}")
            }
            Some(sentence) => format!("{sentence}; because of locks: {locked}"),
        };
        if room.filled >= fill::NEAR {
            return Check::bad(NAME, detail).hint(
                "whose are they (settled_held, by why)? What is full is judged in line, and others wait for it; the settings \
                 under held are the bounds",
            );
        }
        // Who waits in quarantine waits for a person, who said so.
        let others = totals.iter().filter(|total| total.why != HeldWhy::Quarantine);
        let oldest = others.map(|total| total.oldest).max().unwrap_or_default();
        if oldest < HELD_FOR_LONG {
            return Check::good(NAME, detail);
        }
        Check::bad(NAME, detail).hint(
            "is a worker running? Locks: look for a transaction that is open for long in pg_stat_activity, and end it",
        )
    })
}

/// What the server itself gives up: where it does not, a statement that hangs keeps its locks.
async fn limits(store: &Store) -> Check {
    const NAME: &str = "limits";
    asked(NAME, store.limits().await, |limits| {
        if let Err(sentence) = vitals::check_limits(&limits) {
            return Check::bad(NAME, sentence).hint("let the URL lead past it; workers do not start so");
        }
        let each: Vec<String> = limits
            .iter()
            .map(|(name, wanted, _)| format!("{name} {wanted} ms"))
            .collect();
        Check::good(NAME, format!("kept within a transaction: {}", each.join(", ")))
    })
}

async fn clock(store: &Store) -> Check {
    // The first question may have to connect.
    let mut answer = store.clock().await.map(|_| SignedDuration::ZERO);
    if answer.is_ok() {
        let before = Timestamp::now();
        answer = store.clock().await.map(|theirs| {
            let half = Timestamp::now().duration_since(before) / 2;
            theirs.duration_since(before) - half
        });
    }
    asked("clock", answer, |ahead| {
        let milliseconds = ahead.as_millis();
        let detail = format!("the database's clock is {milliseconds} ms ahead of this machine's");
        if ahead.abs() < CLOCK_MAX {
            return Check::good("clock", detail);
        }
        Check::bad("clock", detail).hint("keep both by NTP: keys and deadlines follow the database's clock")
    })
}

fn synchronous_commit(vitals: &Vitals) -> Check {
    const NAME: &str = "synchronous_commit";
    let value = &vitals.synchronous_commit;
    match value.as_str() {
        "off" => Check::bad(
            NAME,
            "off: a crash of the server loses settlements that were acknowledged",
        )
        .hint("set it to on for this role or database"),
        "local" => Check::good(NAME, "local: a commit waits for this server's disk and for no standby"),
        _ if vitals.synchronous_standby_names.is_empty() => Check::good(
            NAME,
            format!("{value}: a commit waits for this server's disk; no standby is synchronous"),
        ),
        _ => Check::good(
            NAME,
            format!(
                "{value}: a commit waits for this server's disk and for {}",
                vitals.synchronous_standby_names
            ),
        ),
    }
}

fn standbys(vitals: &Vitals) -> Check {
    const NAME: &str = "standbys";
    let (all, synchronous) = (vitals.standbys, vitals.synchronous_standbys);
    if vitals.synchronous_standby_names.is_empty() {
        let follow = match all {
            0 => "none follows".to_owned(),
            all => format!("{all} follow, asynchronously"),
        };
        return Check::good(
            NAME,
            format!("{follow}: a failover would lose what was acknowledged last, unless the disk is brought along"),
        );
    }
    Check::good(NAME, format!("{all} follow, {synchronous} of them synchronously"))
}

fn fsync(vitals: &Vitals) -> Check {
    let off = match (vitals.fsync, vitals.full_page_writes) {
        (true, true) => return Check::good("fsync", "on, with full page writes"),
        (false, _) => "fsync",
        (true, false) => "full_page_writes",
    };
    Check::bad(
        "fsync",
        format!("{off} is off: a crash of the machine may destroy the database"),
    )
    .hint(format!("set {off} = on in postgresql.conf"))
}

async fn open_dead_letters(store: &Store) -> Check {
    const NAME: &str = "open_dead_letters";
    asked(NAME, store.measure_letters().await, |desk| {
        let open: u64 = desk.open.iter().map(|(_, count)| count).sum();
        let check = Check::good(NAME, format!("waiting for an operator: {open}"));
        match open {
            0 => check,
            _ => check.hint("`settled dead-letters groups` says whose they are and why"),
        }
    })
}

async fn dead_letter_space(store: &Store, settings: &Settings) -> Check {
    const NAME: &str = "dead_letter_space";
    let settings = &settings.dead_letters;
    asked(NAME, store.dead_letter_space(1_000).await, |space| {
        let all = SpaceBounds {
            max_rows: settings.max_rows,
            max_bytes: settings.max_bytes,
        };
        let of_one = SpaceBounds {
            max_rows: settings.max_rows_per_partner,
            max_bytes: settings.max_bytes_per_partner,
        };
        let filled = all.filled(space.rows, space.bytes);
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let sentence = format!(
            "{} dead letters of {} bytes are stored, {} of what they may",
            space.rows,
            space.bytes,
            percent(filled)
        );
        let near: Vec<String> = space
            .partners
            .iter()
            .map(|(partner, rows, bytes)| (partner, of_one.filled(*rows, *bytes)))
            .filter(|(_, filled)| *filled >= SpaceWatch::NEAR)
            .take(10)
            .map(|(partner, filled)| {
                let name = if partner.is_empty() { "unreadable ones" } else { partner };
                format!("{name} {}", percent(filled))
            })
            .collect();
        let hint = "`settled dead-letters discard` and `purge` make room (`purge --settled` takes those too that settled); \
                    dead_letters.max_rows and max_bytes are the bounds";
        if filled >= 1.0 {
            Check::bad(NAME, format!("{sentence}: none is collected any more")).hint(hint)
        } else if filled >= SpaceWatch::NEAR {
            Check::bad(NAME, sentence).hint(hint)
        } else if near.is_empty() {
            Check::good(NAME, sentence)
        } else {
            Check::bad(NAME, format!("{sentence}; of a partner's share: {}", near.join(", "))).hint(hint)
        }
    })
}

async fn keys(store: &Store, warn_before: Duration) -> Check {
    let answer = async {
        let ending = store.keys_ending(warn_before).await?;
        Ok::<_, StoreError>((store.partners().await?, store.keys(None).await?, ending))
    };
    asked("keys", answer.await, |(partners, keys, ending)| {
        let active = partners.iter().filter(|partner| partner.suspended_at.is_none());
        let has_key = |enterprise_id: &String| keys.iter().any(|key| key.valid && key.enterprise_id == *enterprise_id);
        let (with, without): (Vec<_>, Vec<_>) = active
            .map(|partner| &partner.enterprise_id)
            .partition(|enterprise_id| has_key(enterprise_id));
        if without.is_empty() {
            let note = ending.first().map(|first| {
                let more = match ending.len() {
                    1 => String::new(),
                    several => format!(", the first of {several} partners"),
                };
                format!(
                    "the last key of {} ends at {}{more}: `settled key rotate` registers the next one",
                    first.enterprise_id, first.ends_at
                )
            });
            return Check::good(
                "keys",
                format!("active partners, each with a valid key: {}", with.len()),
            )
            .noting(note);
        }
        let names: Vec<&str> = without.iter().take(10).map(|name| name.as_str()).collect();
        let more = match without.len().saturating_sub(names.len()) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        Check::bad("keys", format!("no key is valid now of {}{more}", names.join(", ")))
            .hint("`settled key add` registers one, `settled partner suspend` says that none is expected")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vitals() -> Vitals {
        Vitals {
            version: "15.8".into(),
            version_number: 150_008,
            read_only: false,
            user: "settled".into(),
            synchronous_commit: "on".into(),
            synchronous_standby_names: String::new(),
            standbys: 0,
            synchronous_standbys: 0,
            fsync: true,
            full_page_writes: true,
            replication_role: "origin".into(),
            has_lz4: true,
        }
    }

    #[test]
    fn the_server_is_judged_by_what_it_says() {
        type Break = fn(&mut Vitals);
        type Judge = fn(&Vitals) -> Check;
        let table: [(Judge, Break); 6] = [
            (server, |vitals| vitals.version_number = 140_013),
            (server, |vitals| vitals.read_only = true),
            (server, |vitals| vitals.has_lz4 = false),
            (synchronous_commit, |vitals| vitals.synchronous_commit = "off".into()),
            (fsync, |vitals| vitals.fsync = false),
            (fsync, |vitals| vitals.full_page_writes = false),
        ];
        for (index, (judge, spoil)) in table.into_iter().enumerate() {
            let mut vitals = vitals();
            assert!(judge(&vitals).ok, "{index}");
            spoil(&mut vitals);
            let check = judge(&vitals);
            assert!(!check.ok && check.hint.is_some(), "{index}: {check:?}");
        }
    }

    #[test]
    fn a_standby_is_said_to_be_waited_for_only_where_it_is() {
        for (setting, names, words) in [
            (
                "local",
                "",
                "local: a commit waits for this server's disk and for no standby",
            ),
            (
                "on",
                "",
                "on: a commit waits for this server's disk; no standby is synchronous",
            ),
            (
                "remote_apply",
                "ANY 1 (a)",
                "remote_apply: a commit waits for this server's disk and for ANY 1 (a)",
            ),
        ] {
            let vitals = Vitals {
                synchronous_commit: setting.into(),
                synchronous_standby_names: names.into(),
                ..vitals()
            };
            assert_eq!(synchronous_commit(&vitals), Check::good("synchronous_commit", words));
        }
    }
}
