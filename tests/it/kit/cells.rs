//! Two cells, a database and a vhost each: a partner with a past in the one, and its move to the other.

use std::{
    collections::BTreeSet,
    process::{Output, Stdio},
};

use tokio_postgres::Client;

use super::{
    amqp::Message,
    auditor::{self, Deposit, Expect, Gone, Reservation, Sent},
    command::{Answer, ask, ask_in, move_funds},
    contract,
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, Worker, count, until},
};

/// A cell.
pub(crate) async fn another_cell(test: &str) -> Place {
    let cell = Place::new(test).await;
    give_own_books(&cell).await;
    cell
}

/// All databases are copies of one template, and the id of its books is made once: from now on this one has another, and the
/// broker the queue that is named by it.
pub(crate) async fn give_own_books(cell: &Place) {
    cell.tamper("UPDATE settled.epochs SET books = gen_random_uuid()").await;
    ask(cell, &["topology"]).await.document(0);
}

/// Two cells.
pub(crate) async fn cells(test: &str) -> (Place, Place) {
    (
        Place::new(&format!("{test}_a")).await,
        another_cell(&format!("{test}_b")).await,
    )
}

/// `settled partner move` of acme from one cell to another; perhaps with a fault at a point, `NAME:kill` or `NAME:error`.
pub(crate) async fn run_move(from: &Place, to: &Place, flags: &[&str], fault: Option<&str>) -> Output {
    let arguments = [&["partner", "move", "--enterprise-id", "acme", "--json"], flags].concat();
    let mut command = from.command(&arguments);
    command
        .env("SETTLED_TARGET_DATABASE_URL", &to.database_url)
        .stdin(Stdio::null());
    if let Some(fault) = fault {
        let (point, act) = fault.split_once(':').expect("a point and an act");
        command.env("SETTLED_FAULT", format!("{point}:1:{act}"));
    }
    let ended = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = ended.expect("it ends").expect("settled runs");
    if output.status.code().is_some() {
        contract::answered(&arguments, &output);
    }
    output
}

pub(crate) const APPLY: [&str; 3] = ["--apply", "--reason", "cell a is full"];
pub(crate) const CANCEL: [&str; 3] = ["--cancel", "--reason", "not today"];

pub(crate) async fn moves(from: &Place, to: &Place, flags: &[&str]) -> Answer {
    Answer::of(&run_move(from, to, flags, None).await)
}

/// Whether a cell judges acme's messages.
pub(crate) async fn judges(db: &Client) -> bool {
    count(db, "partners WHERE enterprise_id = 'acme' AND moving IS NULL").await == 1
}

/// Whether acme's money stands in a cell's books.
pub(crate) async fn has_money(db: &Client) -> bool {
    count(
        db,
        "funds AS f JOIN settled.connections AS c ON c.connection_id = f.owner
         WHERE f.holder = 'connection' AND c.enterprise_id = 'acme' AND f.held + f.allocated > 0",
    )
    .await
        > 0
}

pub(crate) async fn settlements(db: &Client) -> i64 {
    count(db, "settlements").await
}

pub(crate) async fn check_books(place: &Place) {
    let checked = ask(place, &["ledger", "check", "--signatures"]).await.document(0);
    assert_eq!(checked["ok"], true, "{checked}");
    let compared = ask(place, &["reconcile", "--since", "1h"]).await.document(0);
    assert_eq!(compared["ok"], true, "{compared}");
}

/// What a story has from now on, where a partner took its messages along: those that had an effect before it left stay, and all the
/// others are the other cell's to account for.
pub(crate) async fn divide(a: &Place, b: &Place, partner: &Partner) {
    let db = a.db().await;
    let sql = "SELECT message_digest FROM settled.receipts WHERE enterprise_id = $1 AND verdict <> 'parked'";
    let judged: BTreeSet<Vec<u8>> = db
        .query(sql, &[&partner.enterprise])
        .await
        .expect(sql)
        .iter()
        .map(|row| row.get(0))
        .collect();
    let sql = "SELECT left_from, connection_id, currency, quantity::text FROM settled.moved_funds";
    let left = db.query(sql, &[]).await.expect(sql);
    let mut here = a.story();
    let mut there = b.story();
    for row in &left {
        let kind = if row.get::<_, &str>(0) == "held" {
            "held"
        } else {
            "allocated"
        };
        let (currency, quantity): (String, String) = (row.get(2), row.get(3));
        here.gone.push(Gone {
            kind,
            owner: row.get(1),
            currency: currency.clone(),
            quantity: quantity.clone(),
        });
        there.deposits.push(Deposit {
            client: partner.client,
            currency,
            quantity,
        });
    }
    let theirs = |sent: &Sent| sent.routing_key.starts_with(&format!("{}.", partner.enterprise));
    let stays = |sent: &Sent| !theirs(sent) || judged.contains(auditor::sha256(&sent.body).as_slice());
    let said = here
        .sent
        .iter()
        .filter(|sent| theirs(sent) && !matches!(sent.expect, Expect::Refused(_)));
    let said: Vec<Sent> = said.cloned().collect();
    let gone: Vec<Sent> = here.sent.iter().filter(|sent| !stays(sent)).cloned().collect();
    here.sent.retain(stays);
    here.taken_along.extend(gone);
    there.sent.extend(said);
    let reserved: Vec<Reservation> = here
        .reservations
        .iter()
        .filter(|one| one.connection == partner.connection)
        .cloned()
        .collect();
    there.reservations.extend(reserved);
    let keys: Vec<_> = here
        .keys
        .iter()
        .filter(|(whose, _)| *whose == partner.enterprise)
        .cloned()
        .collect();
    there.keys.extend(keys);
}

/// What subscribers of the one cell heard of a partner, the other's books account for too.
pub(crate) fn share_events(a: &Place, b: &Place, enterprise: &str) {
    let events = a.events.seen().into_iter();
    let of_theirs = events.filter(|seen| {
        // A refusal is where its dead letter is, which stays.
        seen.routing_key.ends_with(&format!(".{enterprise}")) && !seen.routing_key.starts_with("update.rejected")
    });
    b.events.recall(of_theirs.collect());
}

/// Acme in the one cell with a past of every kind, beta beside it, and gamma in the other.
pub(crate) struct Past {
    pub(crate) a: Place,
    pub(crate) b: Place,
    pub(crate) acme: Partner,
    pub(crate) beta: Partner,
    pub(crate) workers: [Worker; 2],
    /// Reserved with acme, and not told of yet.
    pub(crate) open: Vec<Reservation>,
    /// Told of by acme, and not reserved: it waits.
    pub(crate) late: Reservation,
    /// What acme said that settled.
    pub(crate) settled: Vec<Message>,
}

pub(crate) async fn past(test: &str) -> Past {
    let (a, b) = cells(test).await;
    let (acme, beta, gamma) = (Partner::new("acme"), Partner::new("beta"), Partner::new("gamma"));
    for partner in [&acme, &beta] {
        a.register(partner).await;
        a.deposit(partner, "BTC", "1000").await;
    }
    b.register(&gamma).await;
    b.deposit(&gamma, "BTC", "1000").await;
    let workers = [a.ready_worker(&COLLECTS).await, b.ready_worker(&COLLECTS).await];
    // A symbol that is over, one that counts, and a key that was revoked.
    for symbol in ["XBT", "XXBT"] {
        ask(
            &a,
            &[
                "currency",
                "map",
                "--enterprise-id",
                "acme",
                "--symbol",
                symbol,
                "--currency",
                "BTC",
            ],
        )
        .await
        .document(0);
    }
    ask(
        &a,
        &[
            "currency",
            "unmap",
            "--enterprise-id",
            "acme",
            "--symbol",
            "XXBT",
            "--reason",
            "renamed",
        ],
    )
    .await
    .document(0);
    let old = Partner::new("acme").public_key();
    for act in [["key", "add"], ["key", "revoke"]] {
        let flags = ["--enterprise-id", "acme", "--public-key", &old];
        ask(&a, &[&act[..], &flags].concat()).await.document(0);
    }
    let first: Vec<_> = (0..10)
        .map(|number| acme.allocation("BTC", &(number + 1).to_string()))
        .collect();
    a.reserve(&first).await;
    let theirs = beta.allocation("BTC", "5");
    let other = gamma.allocation("BTC", "7");
    a.reserve(std::slice::from_ref(&theirs)).await;
    b.reserve(std::slice::from_ref(&other)).await;
    let settled: Vec<Message> = first
        .iter()
        .enumerate()
        .map(|(number, one)| {
            if number % 3 == 0 {
                acme.released(one)
            } else {
                acme.cleared(one)
            }
        })
        .collect();
    let late = acme.allocation("BTC", "9");
    let refused = acme
        .draft(&first[0], "cleared")
        .set("policyResult", "rejected")
        .message(Expect::Refused("policy_contradiction"));
    a.publish(&settled).await;
    a.publish(&[acme.cleared(&late), refused, beta.cleared(&theirs)]).await;
    b.publish(&[gamma.cleared(&other)]).await;
    let (of_a, of_b) = (a.db().await, b.db().await);
    until("the past is over", PATIENCE, async || {
        (settlements(&of_a).await == 11
            && settlements(&of_b).await == 1
            && count(&of_a, "parked").await == 1
            && count(&of_a, "dead_letters").await == 1
            && count(&of_a, "outbox").await == 0)
            .then_some(())
    })
    .await;
    let deallocated = acme.deallocation("BTC", "2");
    let open: Vec<Reservation> = (0..14)
        .map(|_| acme.allocation("BTC", "3"))
        .chain([deallocated])
        .collect();
    a.reserve(&open).await;
    Past {
        a,
        b,
        acme,
        beta,
        workers,
        open,
        late,
        settled,
    }
}

/// Funds of the client that stay in the old cell go to the new one.
pub(crate) async fn follow(a: &Place, b: &Place, partner: &Partner, quantity: &str) {
    let client = partner.client.to_string();
    let moved = move_funds(a, "withdraw", &client, ("BTC", quantity), "to cell b").await;
    moved.document(0);
    a.story().gone.push(Gone {
        kind: "available",
        owner: partner.client,
        currency: "BTC".to_owned(),
        quantity: quantity.to_owned(),
    });
    b.deposit(partner, "BTC", quantity).await;
}

pub(crate) async fn across(a: &Place, b: &Place, flags: &[&str]) -> Answer {
    let variables = [
        ("SETTLED_DATABASE_URL", a.database_url.as_str()),
        ("SETTLED_BROKER_URL", a.broker_url.as_str()),
        ("SETTLED_TARGET_DATABASE_URL", b.database_url.as_str()),
    ];
    ask_in(
        &variables,
        &[&["reconcile", "--since", "1h", "--across"], flags].concat(),
    )
    .await
}

pub(crate) async fn across_is_right(a: &Place, b: &Place) {
    for (one, other) in [(a, b), (b, a)] {
        let compared = across(one, other, &[]).await.document(0);
        assert_eq!(compared["ok"], true, "{compared}");
    }
}
