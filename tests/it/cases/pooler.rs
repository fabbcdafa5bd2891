//! Through PgBouncer: what a pooler refuses, drops or lends on is nothing that we need.

use crate::kit::{
    auditor::Reservation,
    command::ask_in,
    partner::Partner,
    pooler::Pooler,
    support::{Ground, Place, skip},
};

/// Migrates through the pooler, settles through it, and looks at the books through it.
async fn everything_works(pooler: &Pooler, name: &str) {
    let empty = Ground::new(&format!("{name}_empty")).await;
    empty.create_database("template0").await;
    let url = pooler.url(&empty.database_url);
    let through = [("SETTLED_DATABASE_URL", url.as_str())];
    for _ in 0..2 {
        ask_in(&through, &["migrate"]).await.document(0);
    }
    // A lock that a session kept would be the pooler's now, for ever.
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'
                 AND database = (SELECT oid FROM pg_database WHERE datname = current_database())";
    let row = empty.db().await.query_one(locks, &[]).await.expect("locks");
    assert_eq!(row.get::<_, i64>(0), 0);

    let place = Place::new(name).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "100").await;
    let reservations: Vec<Reservation> = (0..40).map(|_| partner.allocation("BTC", "1")).collect();
    place.reserve(&reservations).await;
    let url = pooler.url(&place.database_url);
    let worker = place.ready_worker(&[("SETTLED_DATABASE_URL", url.as_str())]).await;
    let mut messages: Vec<_> = reservations.iter().map(|one| partner.cleared(one)).collect();
    // One that waits for its allocation: what is due is looked for by statements of its own.
    let late = partner.allocation("BTC", "1");
    messages.push(partner.cleared(&late));
    place.publish(&messages).await;
    place.reserve(&[late]).await;
    place.settle_up(worker).await;
    let through = [
        ("SETTLED_DATABASE_URL", url.as_str()),
        ("SETTLED_BROKER_URL", place.broker_url.as_str()),
    ];
    ask_in(&through, &["ledger", "check"]).await.document(0);
    let told = ask_in(&through, &["doctor"]).await;
    let checks = told.document(0);
    assert_eq!(checks["ok"], true, "{}", told.all());
}

#[tokio::test]
async fn by_session_everything_works() {
    let ground = Ground::new("pool_session").await;
    match Pooler::start("session", &ground.database_url).await {
        Err(why) => skip("pooler::by_session_everything_works", &why),
        Ok(pooler) => everything_works(&pooler, "pool_session").await,
    }
}

/// A pooler that keeps prepared statements is as good by transaction; one that does not is named, and what to do about it.
#[tokio::test]
async fn by_transaction_it_works_or_is_told() {
    let place = Place::new("pool_transaction").await;
    let pooler = match Pooler::start("transaction", &place.database_url).await {
        Err(why) => return skip("pooler::by_transaction_it_works_or_is_told", &why),
        Ok(pooler) => pooler,
    };
    if pooler.keeps_statements {
        return everything_works(&pooler, "pool_by_transaction").await;
    }
    let url = pooler.url(&place.database_url);
    let through = [("SETTLED_DATABASE_URL", url.as_str())];
    // The first one prepares what the second one finds already there.
    ask_in(&through, &["partner", "list"]).await.document(0);
    let (message, hint) = ask_in(&through, &["partner", "list"]).await.refusal(70);
    assert!(message.contains("42P05"), "{message}");
    assert!(
        hint.contains("max_prepared_statements") && !hint.contains("migrate"),
        "{hint}"
    );
}
