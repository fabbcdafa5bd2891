//! The lines about the broker.

use std::time::Duration;

use jiff::Timestamp;

use super::{Check, management, versions};
use crate::{
    broker::{BrokerSettings, Connection, own_exchange, own_queue, rights::Mend, server_version, topology},
    cli::Failure,
    config::Settings,
    domain::calendar::rfc3339,
    plain::counted,
    store::{Store, registry::PartnerRecord},
};

/// How long a blocked connection takes to say so, after something was published on it.
const ALARM_WAIT: Duration = Duration::from_millis(200);

/// So many partners are looked at for a queue that is nobody's own any more: each costs the connection a channel number.
const LOOKED_AT: usize = 200;

async fn partners(settings: &Settings) -> Option<Vec<PartnerRecord>> {
    Store::new(settings).ok()?.partners().await.ok()
}

/// Queues of partners that have none of their own, with messages in them: a worker that starts now does not look there.
async fn left_over(connection: &Connection, others: &[PartnerRecord]) -> Vec<Check> {
    let mut checks = Vec::new();
    for PartnerRecord { enterprise_id, .. } in others.iter().take(LOOKED_AT) {
        let queue = topology::own_queue(enterprise_id);
        match own_queue::held(connection, enterprise_id).await {
            Ok(Some(held)) if held.ready > 0 => checks.push(
                Check::bad(
                    format!("queue {queue}"),
                    format!("it is nobody's own any more, and there is {} in it", counted(held.ready, "message")),
                )
                .hint(format!(
                    "`settled partner set {enterprise_id} --own-queue on`, and `off` again once a worker has settled them"
                )),
            ),
            Ok(_) => {}
            // What may not be looked at, or is away, is said elsewhere.
            Err(_) => break,
        }
    }
    checks
}

/// Whether each partner has a way in of its own. Not a problem by itself: what a message says is signed.
async fn apart(connection: &Connection, partners: &[PartnerRecord], version: &str) -> Check {
    const NAME: &str = "partners_apart";
    let (bound, free): (Vec<_>, Vec<_>) = partners.iter().partition(|partner| partner.broker_user.is_some());
    let mut without = Vec::new();
    for partner in bound.iter().take(LOOKED_AT) {
        match own_exchange::is_there(connection, &partner.enterprise_id).await {
            Ok(true) => {}
            Ok(false) => without.push(partner.enterprise_id.as_str()),
            // What may not be looked at, or is away, is said elsewhere.
            Err(_) => break,
        }
    }
    let detail = format!(
        "{} of {} partners are bound to a broker user, {} of them without an exchange of their own",
        bound.len(),
        partners.len(),
        without.len()
    );
    let line = Check::good(NAME, detail);
    if !without.is_empty() {
        return line.hint(format!("{}: `settled topology` declares it", without.join(", ")));
    }
    line.noting((!free.is_empty()).then(|| {
        format!(
            "{}; `settled topology export` says how, `settled partner set ENTERPRISE_ID --broker-user USER` binds one",
            versions::topic_permissions(version)
        )
    }))
}

pub(super) async fn checks(settings: &Settings) -> Vec<Check> {
    let broker = match BrokerSettings::from_settings(settings) {
        Err(error) => return vec![Check::bad("broker", error.message()).hint(error.hint())],
        Ok(broker) => broker,
    };
    let began = Timestamp::now();
    let connection = match Connection::open(&broker, "settled doctor").await {
        Err(error) => return vec![Check::failed("broker", &Failure::no_broker(error))],
        Ok(connection) => connection,
    };
    let took = Timestamp::now().duration_since(began).as_millis();
    let version = match server_version(&broker).await {
        Ok(version) => version,
        Err(error) => format!("a broker whose version is unknown ({error})"),
    };
    let broker_line = Check::good("broker", format!("{version}, logged in after {took} ms"));
    let mut checks = vec![broker_line.noting(versions::of_broker(&version))];
    checks.extend(depths(&connection).await);
    // A database that does not answer has lines of its own.
    let partners = partners(settings).await.unwrap_or_default();
    checks.push(apart(&connection, &partners, &version).await);
    let (own, others): (Vec<_>, Vec<_>) = partners.into_iter().partition(|partner| partner.own_queue);
    let own: Vec<String> = own.into_iter().map(|partner| partner.enterprise_id).collect();
    checks.extend(left_over(&connection, &others).await);
    checks.extend(management::lines(settings, &own).await);
    let mend = Mend::of(&broker);
    // Last, because its questions end in refusals, and a broker under an alarm leaves it without an answer.
    let inspected = tokio::select! {
        inspected = topology::inspect(&connection, &own, &mend) => Some(inspected),
        () = blocked(&connection) => None,
    };
    match inspected {
        Some(Ok(findings)) => checks.extend(findings.into_iter().map(|finding| Check {
            ok: finding.problem.is_none(),
            detail: finding.problem.unwrap_or_else(|| "as it should be".to_owned()),
            name: finding.object,
            hint: finding.hint,
        })),
        None => checks.push(
            Check::bad(
                "topology",
                "exchanges, queues and permissions can not all be looked at during an alarm",
            )
            .hint("ask again once the alarm is over"),
        ),
        Some(Err(error)) => checks.push(Check::failed("topology", &error.into())),
    }
    tokio::time::sleep(ALARM_WAIT).await;
    checks.push(if connection.is_blocked() {
        Check::bad("alarms", "the broker takes no messages: a memory or disk alarm is on")
            .hint("rabbitmq-diagnostics alarms says which; free memory or disk space")
    } else {
        Check::good("alarms", format!("none was seen until {}", rfc3339(Timestamp::now())))
    });
    // Everything is said: a connection that can not even be closed in order is cut.
    drop(connection.close().await);
    checks
}

/// Resolves once the broker says that it takes no messages; it then answers no question either.
async fn blocked(connection: &Connection) {
    while !connection.is_blocked() {
        tokio::time::sleep(ALARM_WAIT / 4).await;
    }
}

async fn depths(connection: &Connection) -> Vec<Check> {
    const LINES: [(&str, &str, &str); 3] = [
        ("updates", topology::UPDATES, "messages waiting to be settled"),
        ("dead_letters", topology::DEAD, "waiting in the queue"),
        (
            "unreadable",
            topology::UNREADABLE,
            "dead letters that nobody could read",
        ),
    ];
    let Ok(seen) = topology::look_at_each(connection, &LINES.map(|(_, queue, _)| queue)).await else {
        return Vec::new();
    };
    let lines = LINES.into_iter().zip(seen);
    lines
        .filter_map(|((name, queue, what), seen)| match seen {
            topology::Seen::Ready(0) => Some(Check::good(name, format!("{what}: 0"))),
            topology::Seen::Ready(messages) => {
                let line = Check::good(name, format!("{what}: {messages}"));
                let look = "look at the queue settlement.unreadable with the broker's own tools";
                Some(line.noting((queue == topology::UNREADABLE).then(|| look.to_owned())))
            }
            // What is missing gets lines of its own.
            topology::Seen::Missing => None,
            topology::Seen::Forbidden(why) => Some(Check::good(name, format!("{what}: not seen")).hint(why)),
        })
        .collect()
}
