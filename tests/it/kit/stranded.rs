//! Updates that are refused for want of their signer's key, and settle once it is there.

use super::{
    auditor::{Expect, Reservation},
    partner::Partner,
    support::{PATIENCE, Place, until},
};

impl Place {
    /// Registers a partner with a connection, a deposit and no key, reserves so many times so much, and publishes the updates.
    pub(crate) async fn strand(
        &self,
        partner: &Partner,
        name: &str,
        deposit: &str,
        (count, quantity): (usize, &str),
    ) -> Vec<Reservation> {
        let add = ["partner", "add", "--enterprise-id", &partner.enterprise, "--name", name];
        assert!(self.run(&add).await.status.success());
        self.connect_partner(partner).await;
        self.deposit(partner, "BTC", deposit).await;
        let reservations: Vec<Reservation> = (0..count).map(|_| partner.allocation("BTC", quantity)).collect();
        self.reserve(&reservations).await;
        let messages: Vec<_> = reservations
            .iter()
            .map(|reservation| partner.draft(reservation, "cleared").message(Expect::Any))
            .collect();
        self.publish(&messages).await;
        reservations
    }

    /// Waits until so many dead letters are open.
    pub(crate) async fn collected(&self, count: usize) {
        let db = self.db().await;
        until("they are collected", PATIENCE, async || {
            let sql = "SELECT count(*) FROM settled.dead_letters WHERE state = 'open'";
            let open: i64 = db.query_one(sql, &[]).await.expect("a count").get(0);
            (usize::try_from(open) == Ok(count)).then_some(())
        })
        .await;
    }
}
