//! A database of an earlier version, whose tables belong to a role since `settled roles` was applied, is migrated by a member of
//! that role; and everything goes on at once, before the roles are applied anew.

use refinery::Target;
use serde_json::json;
use uuid::Uuid;

use crate::kit::{
    auditor::Expect,
    command::ask,
    partner::Partner,
    support::{Ground, PATIENCE, Place, connect, count, run, said, until, userinfo},
};

mod embedded {
    refinery::embed_migrations!("src/store/schema");
}

/// The last version before tables were added that functions of an owner's rights read.
const BEFORE: i32 = 19;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_with_roles_is_migrated_and_goes_on() {
    let mut ground = Ground::new("upgrade").await;
    ground.create_database("template0").await;
    let admins_url = ground.database_url.clone();
    let mut admin = connect(&admins_url).await;
    let statements = settled::store::roles::statements(None);
    let of_the_owner = statements
        .iter()
        .position(|sql| sql.contains("ALTER SCHEMA settled OWNER"))
        .expect("one says whose it is");
    for sql in &statements[..of_the_owner] {
        admin.batch_execute(sql).await.expect(sql);
    }
    let (login, secret) = (format!("{}_login", ground.name), Uuid::new_v4().simple());
    admin
        .batch_execute(&format!(
            "CREATE ROLE {login} LOGIN PASSWORD '{secret}' IN ROLE settled_owner; CREATE SCHEMA settled"
        ))
        .await
        .expect("a login");
    embedded::migrations::runner()
        .set_target(Target::Version(BEFORE))
        .set_migration_table_name("settled.refinery_schema_history")
        .run_async(&mut admin)
        .await
        .expect("the schema of before");
    admin
        .batch_execute(&statements[of_the_owner])
        .await
        .expect("it is the owner's");
    admin
        .batch_execute("INSERT INTO settled.plans (at, operator, filters, messages) VALUES (now(), 'ann', '{}', 1)")
        .await
        .expect("a plan of before");

    let (name, password) = userinfo(&admins_url);
    ground.database_url = admins_url.replace(&format!("{name}:{password}@"), &format!("{login}:{secret}@"));
    // While somebody reads for long, a backup say, it gives up, or everybody else would wait behind it; nothing was changed.
    let reading = admin.transaction().await.expect("a transaction");
    reading
        .execute("SELECT FROM settled.partners", &[])
        .await
        .expect("it reads");
    let refused = ground.run(&["migrate", "--set", "database.lock_timeout=200ms"]).await;
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("run it again"), "{}", said(&refused));
    reading.rollback().await.expect("it has read");
    let migrated = ground.run(&["migrate"]).await;
    assert!(migrated.status.success(), "{}", said(&migrated));

    let place = Place::with_topology(ground).await;
    let partner = Partner::new("acme");
    place.register(&partner).await;
    place.deposit(&partner, "BTC", "1000").await;
    settles_and_plans(&place, &partner, 2).await;
    let applied = run(&admins_url, &place.broker_url, &["roles", "--apply"], "").await;
    assert!(applied.status.success(), "{}", said(&applied));
    settles_and_plans(&place, &partner, 3).await;
}

/// One settles, one is refused and planned, under a number that no plan had.
async fn settles_and_plans(place: &Place, partner: &Partner, plan: i64) {
    let reservations = [partner.allocation("BTC", "5"), partner.allocation("BTC", "5")];
    place.reserve(&reservations).await;
    let worker = place.ready_worker(&[]).await;
    let contradicts = partner
        .draft(&reservations[1], "cleared")
        .set("policyResult", "rejected")
        .message(Expect::Refused("policy_contradiction"));
    place.publish(&[partner.cleared(&reservations[0]), contradicts]).await;
    let db = place.db().await;
    until("one settles, one is kept", PATIENCE, async || {
        let all = (count(&db, "settlements").await, count(&db, "dead_letters").await);
        (all == (plan - 1, plan - 1)).then_some(())
    })
    .await;
    let planned = ask(place, &["dead-letters", "plan"]).await.document(0);
    assert_eq!(
        (&planned["plan"], &planned["messages"]),
        (&json!(plan), &json!(plan - 1)),
        "{planned}"
    );
    place.settle_up(worker).await;
}
