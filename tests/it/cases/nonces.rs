//! What counts no more: a nonce that an operator made unusable, and a message that has ended by its own word.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::kit::{
    auditor::Expect,
    command::{Answer, ask},
    partner::new_key,
    support::{PATIENCE, Place, count, until, with_partner},
};

async fn void(place: &Place, nonce: &str) -> Answer {
    let words = ["nonce", "void", "--enterprise-id", "acme", "--nonce", nonce];
    ask(
        place,
        &[&words[..], &["--reason", "the partner lost its laptop"]].concat(),
    )
    .await
}

async fn receipt(place: &Place, nonce: &str) -> Value {
    ask(place, &["receipt", "--enterprise-id", "acme", "--nonce", nonce])
        .await
        .document(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voided_nonce_settles_nothing_and_is_told_as_any_refusal() {
    let (place, partner) = with_partner("nonce_void", "1000").await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let reservations: Vec<_> = (0..3).map(|_| partner.allocation("BTC", "5")).collect();
    place.reserve(&reservations).await;
    let late = partner.allocation("BTC", "5");
    let waits = partner
        .draft(&late, "cleared")
        .set("nonce", "waits")
        .message(Expect::Any);
    let done = partner
        .draft(&reservations[0], "cleared")
        .set("nonce", "done")
        .message(Expect::Settles);
    // Refused, and not for good: the same bytes could settle later.
    let contradicts = partner
        .draft(&reservations[1], "cleared")
        .set("nonce", "refused")
        .set("policyResult", "rejected")
        .message(Expect::Refused("policy_contradiction"));
    place.publish(&[waits.clone(), done.clone(), contradicts.clone()]).await;
    until("one of each", PATIENCE, async || {
        let all = (
            count(&db, "settlements").await,
            count(&db, "parked").await,
            count(&db, "dead_letters").await,
        );
        (all == (1, 1, 1)).then_some(())
    })
    .await;

    void(&place, "never").await.refused(1, "was ever seen");
    void(&place, "done")
        .await
        .refused(1, "what has settled can not be voided");
    let told = void(&place, "waits").await.document(0);
    assert_eq!(
        (&told["result"], &told["wasParked"], &told["nonce"]),
        (&json!("voided"), &json!(true), &json!("waits")),
        "{told}"
    );
    let told = void(&place, "refused").await.document(0);
    assert_eq!((&told["result"], &told["wasParked"]), (&json!("voided"), &json!(false)));
    let again = void(&place, "refused").await.document(0);
    assert_eq!(
        (&again["result"], &again["voidedAt"]),
        (&json!("exists"), &told["voidedAt"])
    );

    // Who waits is refused at once, with its dead letter and its event, although its reservation comes.
    place.reserve(std::slice::from_ref(&late)).await;
    until("the one that waits is refused", PATIENCE, async || {
        (count(&db, "parked").await == 0 && count(&db, "dead_letters").await == 2).then_some(())
    })
    .await;
    assert_eq!(count(&db, "told WHERE reason = 'nonce_voided'").await, 1);
    // A copy, the other one's replay, a fresh message with either nonce: all of them.
    let fresh = partner
        .draft(&reservations[2], "cleared")
        .set("nonce", "refused")
        .message(Expect::Refused("nonce_voided"));
    place.publish(&[waits, fresh]).await;
    let plan = ask(&place, &["dead-letters", "plan", "--reason", "policy_contradiction"])
        .await
        .document(0);
    assert_eq!(plan["messages"], 1, "{plan}");
    let sql = "SELECT count(*) FROM settled.plan_items WHERE verdict = 'rejected' AND reason = 'nonce_voided'";
    until("they are refused", PATIENCE, async || {
        (count(&db, "dead_letters WHERE reason = 'nonce_voided'").await == 2
            && count(&db, "dead_letters WHERE times_seen = 2").await == 1)
            .then_some(())
    })
    .await;
    assert_eq!(db.query_one(sql, &[]).await.expect("items").get::<_, i64>(0), 1);
    // Of a nonce that is refused for good there is nothing to void.
    let known = receipt(&place, "waits").await;
    assert_eq!(
        (&known["verdict"], &known["reason"]),
        (&json!("rejected"), &json!("nonce_voided"))
    );
    assert_eq!(void(&place, "waits").await.document(0)["result"], "exists");
    // What settled is answered as before; and the allocations are there for other nonces.
    place
        .publish(&[done, partner.cleared(&late), partner.cleared(&reservations[1])])
        .await;
    until("they settle", PATIENCE, async || {
        (count(&db, "settlements").await == 3).then_some(())
    })
    .await;
    // Who did it, to what, and why.
    let acts = ask(&place, &["audit", "list", "--act", "nonce void"]).await.lines(0);
    assert_eq!(acts.len(), 2, "{acts:?}");
    for act in &acts {
        assert_eq!(act["why"], "the partner lost its laptop");
        assert_eq!(act["filters"]["enterpriseId"], "acme");
    }
    assert_eq!(acts[1]["outcome"]["verdict"], "parked");
    let life = ask(&place, &["timeline", "waits"]).await.document(0);
    let whats: Vec<&str> = life["timeline"]
        .as_array()
        .expect("moments")
        .iter()
        .filter_map(|moment| moment["what"].as_str())
        .collect();
    assert!(whats.contains(&"voided"), "{whats:?}");
    place.settle_up(worker).await;
}

/// A batch that settles and a command that voids wait for each other: either it has settled and can not be voided, or it is
/// void and did not settle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voiding_and_settling_exclude_each_other() {
    const MESSAGES: usize = 24;
    let (place, partner) = with_partner("nonce_race", "1000").await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let late: Vec<_> = (0..MESSAGES).map(|_| partner.allocation("BTC", "1")).collect();
    let messages: Vec<_> = late
        .iter()
        .enumerate()
        .map(|(number, one)| {
            partner
                .draft(one, "cleared")
                .set("nonce", format!("n-{number}"))
                .message(Expect::Any)
        })
        .collect();
    place.publish(&messages).await;
    until("all wait", PATIENCE, async || {
        (count(&db, "parked").await == MESSAGES as i64).then_some(())
    })
    .await;
    // The reservation wakes them, and each is voided meanwhile.
    let voids = async {
        let mut voided = Vec::new();
        for number in 0..MESSAGES {
            let answer = void(&place, &format!("n-{number}")).await;
            assert!(matches!(answer.code, Some(0 | 1)), "{}", answer.all());
            voided.push(answer.code == Some(0));
        }
        voided
    };
    let ((), voided) = tokio::join!(place.reserve(&late), voids);
    until("all are judged", PATIENCE, async || {
        (count(&db, "parked").await == 0).then_some(())
    })
    .await;
    for (number, was_voided) in voided.into_iter().enumerate() {
        let known = receipt(&place, &format!("n-{number}")).await;
        let expected = if was_voided { "rejected" } else { "settled" };
        assert_eq!(known["verdict"], expected, "{known}");
    }
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signed_message_ends_when_it_says_so() {
    let (place, partner) = with_partner("expires_at", "1000").await;
    let worker = place.ready_worker(&[]).await;
    let db = place.db().await;
    let reservations: Vec<_> = (0..4).map(|_| partner.allocation("BTC", "5")).collect();
    place.reserve(&reservations[..3]).await;
    let ends = Timestamp::now() + SignedDuration::from_secs(4);
    let ending = |at: usize, ends: Timestamp| {
        let mut draft = partner.draft(&reservations[at], "cleared");
        let mut fields = draft.fields.clone();
        fields.set("expiresAt", json!(format!("{ends:.6}")));
        draft.fields.set("evaluationId", json!("unsigned"));
        (draft, fields.text())
    };
    let past = Timestamp::now() - SignedDuration::from_secs(1);
    let (draft, payload) = ending(0, ends);
    let in_time = draft.message_with(&payload, Expect::Settles);
    let (draft, payload) = ending(1, past);
    let too_late = draft.message_with(&payload, Expect::Refused("expired_update"));
    let (draft, payload) = ending(3, ends);
    let waits = draft.message_with(&payload, Expect::Any);
    // By a stranger it is not even that.
    let stranger = partner
        .draft(&reservations[2], "cleared")
        .set("expiresAt", format!("{past:.3}"))
        .signed_by(new_key())
        .message(Expect::Refused("signature_mismatch"));
    place
        .publish(&[in_time.clone(), too_late.clone(), waits, stranger])
        .await;
    until("all are judged", PATIENCE, async || {
        let all = (
            count(&db, "settlements").await,
            count(&db, "parked").await,
            count(&db, "dead_letters").await,
        );
        (all == (1, 1, 2)).then_some(())
    })
    .await;
    let sql = "SELECT bool_and(until <= $1) FROM settled.parked";
    let row = db.query_one(sql, &[&ends]).await.expect("the one that waits");
    assert!(row.get::<_, bool>(0), "it waits no longer than it counts");
    // It is refused when its time is over, long before `park.deadline`.
    until("it ends", PATIENCE.max(Duration::from_secs(20)), async || {
        (count(&db, "dead_letters WHERE reason = 'expired_update'").await == 2).then_some(())
    })
    .await;
    place.reserve(&reservations[3..]).await;
    // What settled in time is a duplicate for ever; the late ones stay refused, replayed or sent again.
    place.publish(&[in_time, too_late]).await;
    until("the duplicate is counted", PATIENCE, async || {
        (count(&db, "batches WHERE duplicate > 0").await == 1
            && count(&db, "dead_letters WHERE times_seen = 2").await == 1)
            .then_some(())
    })
    .await;
    let letters = ask(&place, &["dead-letters", "list", "--reason", "expired_update"])
        .await
        .lines(0);
    assert_eq!(letters.len(), 2, "{letters:?}");
    for letter in &letters {
        assert_eq!(
            (&letter["class"], &letter["final"]),
            (&json!(408), &json!(true)),
            "{letter}"
        );
    }
    place.settle_up(worker).await;
}
