//! The lines about the broker.

use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use jiff::Timestamp;

use super::{Check, certificate, management, versions};
use crate::{
    broker::{BrokerSettings, Connection, own_exchange, own_queue, rights::Mend, server_version, topology},
    cli::Failure,
    config::Settings,
    desk::Desk,
    domain::calendar::rfc3339,
    plain::counted,
    store::{Store, registry::PartnerRecord},
};

/// How often it is looked whether the broker has said that it takes no messages.
const ALARM_LOOK: Duration = Duration::from_millis(50);

/// So many partners are looked at for a queue that is nobody's own any more: each costs the connection a channel number.
const LOOKED_AT: usize = 200;

/// Questions about partners that are under way at once.
const AT_ONCE: usize = 8;

/// Every partner. A database that does not answer has lines of its own.
async fn partners(store: Option<&Store>) -> Vec<PartnerRecord> {
    match store {
        Some(store) => store.partners().await.unwrap_or_default(),
        None => Vec::new(),
    }
}

/// What is answered about each of the first partners, in their order, a few questions at a time.
fn of_each<'p, Q: Future>(
    partners: impl IntoIterator<Item = &'p PartnerRecord>,
    question: impl Fn(String) -> Q,
) -> impl Stream<Item = Q::Output> + Unpin {
    let partners = partners.into_iter().take(LOOKED_AT);
    // Made before they are asked: a stream that makes them as it goes can not be sent to another thread.
    let questions: Vec<Q> = partners
        .map(|partner| question(partner.enterprise_id.clone()))
        .collect();
    stream::iter(questions).buffered(AT_ONCE)
}

/// The queue whose name stands in the books; a database that does not answer has lines of its own.
async fn hidden(settings: &Settings) -> Option<String> {
    let books = Store::new(settings).ok()?.books_epoch().await.ok()?;
    Some(topology::hidden(books.books))
}

/// Queues of partners that have none of their own, with messages in them: a worker that starts now does not look there.
async fn left_over(connection: &Connection, others: &[PartnerRecord]) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut looks = of_each(others, |enterprise_id: String| async move {
        let held = own_queue::held(connection, &enterprise_id).await;
        (enterprise_id, held)
    });
    while let Some((enterprise_id, held)) = looks.next().await {
        let queue = topology::own_queue(&enterprise_id);
        match held {
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
    let mut looks = of_each(bound.iter().copied(), |enterprise_id: String| async move {
        let is_there = own_exchange::is_there(connection, &enterprise_id).await;
        (enterprise_id, is_there)
    });
    while let Some((enterprise_id, is_there)) = looks.next().await {
        match is_there {
            Ok(true) => {}
            Ok(false) => without.push(enterprise_id),
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

pub(super) async fn checks(settings: &Settings, store: Option<&Store>) -> Vec<Check> {
    let broker = match BrokerSettings::from_settings(settings) {
        Err(error) => return vec![Check::bad("broker", error.message()).hint(error.hint())],
        Ok(broker) => broker,
    };
    let began = Timestamp::now();
    let opening = async {
        let opened = Connection::open(&broker, "settled doctor").await;
        (opened, Timestamp::now().duration_since(began).as_millis())
    };
    let ((opened, took), version, partners) = tokio::join!(opening, server_version(&broker), partners(store));
    let connection = match opened {
        Err(error) => return vec![Check::failed("broker", &Failure::no_broker(error))],
        Ok(connection) => connection,
    };
    let version = match version {
        Ok(version) => version,
        Err(error) => format!("a broker whose version is unknown ({error})"),
    };
    let broker_line = Check::good("broker", format!("{version}, logged in after {took} ms"));
    let mut checks = vec![broker_line.noting(versions::of_broker(&version))];
    checks.extend(certificate("broker_certificate", broker.certificate_until()));
    checks.extend(depths(&connection).await);
    checks.push(apart(&connection, &partners, &version).await);
    let (own, others): (Vec<_>, Vec<_>) = partners.into_iter().partition(|partner| partner.own_queue);
    let own: Vec<String> = own.into_iter().map(|partner| partner.enterprise_id).collect();
    checks.extend(left_over(&connection, &others).await);
    let hidden = hidden(settings).await;
    checks.extend(management::lines(settings, &own, hidden.as_deref()).await);
    let mend = Mend::of(&broker);
    // Last, because its questions end in refusals, and a broker under an alarm leaves it without an answer.
    let inspected = tokio::select! {
        inspected = topology::inspect(&connection, &own, hidden.as_deref(), &mend) => Some(inspected),
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
    // A broker under an alarm says so at a connection's first publication, and reads no more of it: who is answered after one is
    // not blocked.
    tokio::select! {
        _ = topology::look_at_each(&connection, &[topology::UPDATES]) => {}
        () = blocked(&connection) => {}
    }
    checks.push(if connection.is_blocked() {
        Check::bad("alarms", "the broker takes no messages: a memory or disk alarm is on")
            .hint("rabbitmq-diagnostics alarms says which; free memory or disk space")
    } else {
        Check::good("alarms", format!("none was seen until {}", rfc3339(Timestamp::now())))
    });
    checks.push(if connection.is_blocked() {
        unlooked("during an alarm the broker takes no question")
    } else {
        epoch(settings, store, &broker).await
    });
    // Everything is said: a connection that can not even be closed in order is cut.
    drop(connection.close().await);
    checks
}

const EPOCH: &str = "epoch";

fn unlooked(why: impl Into<String>) -> Check {
    Check::good(EPOCH, "what workers told the broker was not looked at").hint(why)
}

/// Whether the database has what workers told the broker of. What keeps it from being looked at has lines of its own.
async fn epoch(settings: &Settings, store: Option<&Store>, broker: &BrokerSettings) -> Check {
    let looked = async {
        let desk = match store {
            Some(store) => Desk::of(store.clone(), settings),
            None => Desk::open(settings)?,
        };
        desk.check_schema().await?;
        desk.books_standing(broker).await
    };
    let standing = match looked.await {
        Ok(standing) => standing,
        Err(refusal) => return unlooked(refusal.message),
    };
    match (standing.loss, standing.told_at) {
        (Some(loss), _) => {
            Check::bad(EPOCH, loss).hint("no worker starts on it: take the newest database, or see `settled recover`")
        }
        (None, Some(told_at)) => Check::good(
            EPOCH,
            format!(
                "epoch {}: the database has everything that workers told the broker of, until {told_at}",
                standing.epoch
            ),
        ),
        (None, None) => Check::good(
            EPOCH,
            format!("epoch {}: no worker told the broker of it yet", standing.epoch),
        ),
    }
}

/// Resolves once the broker says that it takes no messages; it then answers no question either.
async fn blocked(connection: &Connection) {
    while !connection.is_blocked() {
        tokio::time::sleep(ALARM_LOOK).await;
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
