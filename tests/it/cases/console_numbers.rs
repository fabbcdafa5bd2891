//! What a page said is what is approved and planned: where it is not so any more nothing is done, and the page says the number of now.

use crate::kit::{
    console::Console,
    partner::Partner,
    support::{COLLECTS, Place, count},
};

/// The letter of a plan's first message.
const FIRST: &str = "id = (SELECT dead_letter_id FROM settled.plan_items WHERE plan_id = 1 AND position = 1)";

/// A console with letters of acme, all of which would settle now.
async fn letters(test: &str, letters: usize) -> (Place, Console) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    let worker = place.ready_worker(&COLLECTS).await;
    place.strand(&partner, "Acme", "1000000", (letters, "7")).await;
    place.collected(letters).await;
    place.add_key(&partner).await;
    let ended = worker.terminate().await;
    assert!(ended.success(), "{}", worker.said());
    let console = Console::behind_proxy(&place, &[]).await;
    (place, console)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_approval_is_of_both_numbers_that_its_button_said() {
    let (place, console) = letters("console_both", 4).await;
    let db = place.db().await;
    let (ann, bob) = (console.visitor("ann").await, console.visitor("bob").await);
    let made = console.act(&ann, "/plans", &[("partner", "acme"), ("seen", "4")]).await;
    assert_eq!(made.header("location"), Some("/plans/1"), "{made:?}");
    let refuse =
        "UPDATE settled.plan_items SET verdict = 'rejected', reason = 'internal', currency = NULL, quantity = NULL";
    place.tamper(&format!("{refuse} WHERE position = 1")).await;
    let page = console.get(&bob, "/plans/1").await;
    assert!(
        page.text.contains("Approve the replay of 3 messages, or of all 4"),
        "{page:?}"
    );
    assert_eq!(page.hidden("seen_replay").as_deref(), Some("3"), "{page:?}");
    assert_eq!(page.hidden("seen_replay_all").as_deref(), Some("4"), "{page:?}");
    let approve = async |all: Option<&str>, settles: &str| {
        let why = ("why", "I looked");
        let mut fields = vec![why, ("for", "replay"), ("seen_replay", settles)];
        fields.extend(all.map(|all| ("seen_replay_all", all)));
        console.act(&bob, "/plans/1/approve", &fields).await
    };
    // The one that would not settle is discarded elsewhere: as many would settle, and all are fewer.
    place
        .tamper(&format!(
            "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now() WHERE {FIRST}"
        ))
        .await;
    let stale = approve(Some("4"), "3").await;
    assert!(
        stale.status == 409
            && stale
                .text
                .contains("there are 3 messages now, and the page said 4; nothing was done"),
        "{stale:?}"
    );
    assert!(
        stale.text.contains("Approve the replay of 3 messages</button>") && stale.text.contains("value=\"I looked\""),
        "the page says the number of now: {stale:?}"
    );
    // And one that comes back is more than a button that said one number.
    place
        .tamper(&format!(
            "UPDATE settled.dead_letters SET state = 'open', discarded_at = NULL WHERE {FIRST}"
        ))
        .await;
    let stale = approve(None, "3").await;
    assert!(
        stale.status == 409 && stale.text.contains("there are 4 messages now, and the page said 3"),
        "{stale:?}"
    );
    assert_eq!(count(&db, "approvals").await, 0);
    let approved = approve(Some("4"), "3").await;
    assert_eq!(approved.status, 200, "{approved:?}");
    // Where nothing would settle there is still a replay of all to approve.
    place.tamper(refuse).await;
    let page = console.get(&bob, "/plans/1").await;
    assert!(
        page.text.contains(
            "<button name=\"for\" value=\"replay\" class=\"main\">Approve the replay of 0 messages, or of all 4<"
        ),
        "{page:?}"
    );
    let approved = approve(Some("4"), "0").await;
    assert_eq!(approved.status, 200, "{approved:?}");
    assert_eq!(count(&db, "approvals").await, 2);
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_is_made_of_as_many_as_its_button_said() {
    let (place, console) = letters("console_planned", 4).await;
    let db = place.db().await;
    let ann = console.visitor("ann").await;
    let page = console.get(&ann, "/letters?partner=acme").await;
    assert!(page.text.contains("Plan 4 messages"), "{page:?}");
    let until = page.hidden("until").expect("it is frozen");
    let plan = async |seen: Option<&str>| {
        let mut fields = vec![("partner", "acme"), ("until", until.as_str())];
        fields.extend(seen.map(|seen| ("seen", seen)));
        console.act(&ann, "/plans", &fields).await
    };
    place
        .tamper(
            "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now()
             WHERE seq = (SELECT min(seq) FROM settled.dead_letters)",
        )
        .await;
    let stale = plan(Some("4")).await;
    assert!(
        stale.status == 409
            && stale
                .text
                .contains("there are 3 messages now, and the page said 4; nothing was planned"),
        "{stale:?}"
    );
    assert!(
        stale.text.contains("Plan 3 messages") && stale.text.contains("value=\"acme\""),
        "the page says the number of now: {stale:?}"
    );
    let unseen = plan(None).await;
    assert!(
        unseen.status == 400 && unseen.text.contains("does not say how many messages were seen"),
        "{unseen:?}"
    );
    assert_eq!(count(&db, "plans").await, 0);
    assert_eq!(plan(Some("3")).await.header("location"), Some("/plans/1"));
    console.stop().await;
}
