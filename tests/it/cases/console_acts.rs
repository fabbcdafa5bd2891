//! What the console promises of its pages: a number on a button is what it will touch, a refusal leaves the page as it was, who
//! goes on with what may go in circles says so, a proof says how far it is, and a partner says when it was seen last.

use crate::kit::{
    auditor::Expect,
    command::ask,
    console::{Console, Visitor},
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, count, until},
};

/// Dead letters of acme that settle now that the key is there; and a plan of all of them.
async fn planned(test: &str, count: usize) -> (Place, Console, Visitor) {
    let place = Place::new(test).await;
    let partner = Partner::new("acme");
    let worker = place.ready_worker(&COLLECTS).await;
    place.strand(&partner, "Acme", "1000000", (count, "7")).await;
    place.collected(count).await;
    place.add_key(&partner).await;
    let ended = worker.terminate().await;
    assert!(ended.success(), "{}", worker.said());
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let seen = count.to_string();
    let made = console
        .act(&ann, "/plans", &[("partner", "acme"), ("seen", &seen)])
        .await;
    assert_eq!(made.header("location"), Some("/plans/1"), "{made:?}");
    (place, console, ann)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_number_on_a_button_is_what_it_will_touch() {
    let (place, console, ann) = planned("console_numbers", 4).await;
    let why = ("why", "not ours");
    // One of them is discarded elsewhere, and one came by nobody known.
    place
        .tamper(
            "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now()
             WHERE seq = (SELECT min(seq) FROM settled.dead_letters)",
        )
        .await;
    place
        .tamper(
            "UPDATE settled.dead_letters SET made_by = 'unknown'
             WHERE seq = (SELECT max(seq) FROM settled.dead_letters)",
        )
        .await;
    let plan = console.get(&ann, "/plans/1").await;
    for button in [
        "Replay 3 messages",
        "Discard 3 messages",
        "Restore 1 messages",
        "Approve the replay of 3 messages",
        "Approve the discard of 3 messages",
        "Approve the restore of 1 messages",
    ] {
        assert!(plan.text.contains(button), "{button}: {plan:?}");
    }
    for (act, seen) in [
        ("replay", "seen_replay"),
        ("discard", "seen_discard"),
        ("restore", "seen_restore"),
    ] {
        let stale = console
            .act(&ann, "/plans/1/approve", &[why, ("for", act), (seen, "4")])
            .await;
        assert!(
            stale.status == 409 && stale.text.contains("the page said 4"),
            "{act}: {stale:?}"
        );
    }
    // The number that was true before does nothing, whatever is done.
    for act in ["replay", "discard", "restore"] {
        let stale = console
            .act(&ann, &format!("/plans/1/{act}"), &[why, ("seen", "4")])
            .await;
        assert!(
            stale.status == 409 && stale.text.contains("the page said 4"),
            "{act}: {stale:?}"
        );
    }
    let letters = console.get(&ann, "/letters?partner=acme").await;
    assert!(
        letters.text.contains("With all 3 of this filter") && letters.text.contains("Plan 2 messages"),
        "what nobody known made is not planned with the rest: {letters:?}"
    );
    let done = console.act(&ann, "/plans/1/discard", &[why, ("seen", "3")]).await;
    assert!(
        done.status == 200 && done.text.contains("discarded 3 messages"),
        "{done:?}"
    );
    for button in ["Replay 0 messages", "Discard 0 messages", "Restore 4 messages"] {
        assert!(done.text.contains(button), "{button}: {done:?}");
    }
    for act in ["replay", "discard"] {
        let none = console
            .act(&ann, &format!("/plans/1/{act}"), &[why, ("seen", "0")])
            .await;
        assert!(
            none.status == 409 && none.text.contains("nothing was done"),
            "{act}: {none:?}"
        );
    }
    let restored = console.act(&ann, "/plans/1/restore", &[why, ("seen", "4")]).await;
    assert!(restored.text.contains("restored 4 messages"), "{restored:?}");
    console.stop().await;
}

/// A run that was stopped goes on with what is open still: what was done with otherwise meanwhile is skipped, and not counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_goes_on_with_as_many_as_its_button_says() {
    let (place, console, ann) = planned("console_goes_on", 4).await;
    let why = ("why", "the key is there");
    let begun = console
        .act(&ann, "/plans/1/replay", &[why, ("seen", "4"), ("canary", "1")])
        .await;
    assert_eq!(begun.header("location"), Some("/runs/1"), "{begun:?}");
    assert_eq!(console.act(&ann, "/runs/1/cancel", &[why]).await.status, 303);
    place
        .tamper(
            "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now()
             WHERE seq = (SELECT min(seq) FROM settled.dead_letters)",
        )
        .await;
    let run = console.get(&ann, "/runs/1").await;
    assert!(
        run.text.contains("Go on with 3 messages") && run.text.contains("of 4 that wait"),
        "{run:?}"
    );
    let stale = console
        .act(&ann, "/runs/1/resume", &[why, ("seen", "4"), ("rate", "5")])
        .await;
    assert!(
        stale.status == 409 && stale.text.contains("the page said 4") && stale.text.contains("value=\"5\""),
        "{stale:?}"
    );
    // Many who watch have it looked at once.
    let mut db = place.db().await;
    let lock = db.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE settled.run_items IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("a lock");
    let watching = futures_util::future::join_all((0..10).map(|_| console.get(&ann, "/runs/1?again=1")));
    let looks = "SELECT count(*), coalesce(string_agg(a::text, E'\n'), '') FROM pg_stat_activity AS a
                 WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%runs::run_came%'";
    let other = place.db().await;
    let counted = async {
        until("somebody looks", PATIENCE, async || {
            let waiting: i64 = other.query_one(looks, &[]).await.expect("it is seen").get(0);
            (waiting > 0).then_some(())
        })
        .await;
        // The others have come by the time that ten more pages are answered.
        for _ in 0..10 {
            assert_eq!(console.get(&ann, "/plans").await.status, 200);
        }
        let waiting = other.query_one(looks, &[]).await.expect("it is seen");
        lock.rollback().await.expect("an end");
        (waiting.get::<_, i64>(0), waiting.get::<_, String>(1))
    };
    let (pages, (looks, which)) = tokio::join!(watching, counted);
    // A look that is tried again is seen twice: the server waits on for the lock that nobody wants any more.
    assert!(matches!(looks, 1 | 2), "ten watch, and one looks: {which}");
    assert!(
        pages.iter().all(|page| page.text.contains("Go on with 3 messages")),
        "{pages:?}"
    );
    let worker = place.ready_worker(&COLLECTS).await;
    let on = console.act(&ann, "/runs/1/resume", &[why, ("seen", "3")]).await;
    assert_eq!(on.status, 303, "{on:?}");
    until("it is over", PATIENCE, async || {
        let run = console.get(&ann, "/runs/1?again=1").await;
        run.text.contains("</b>done</span>").then_some(())
    })
    .await;
    let run = console.get(&ann, "/runs").await;
    assert!(run.text.contains("</b>done</span>"), "{run:?}");
    assert_eq!(
        count(&place.db().await, "receipts WHERE verdict = 'settled'").await,
        3,
        "as many as the button said"
    );
    console.stop().await;
    assert!(worker.terminate().await.success(), "{}", worker.said());
}

/// What was typed into a form that is refused stands in it again, and in no other form.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_form_is_as_it_was_filled_in() {
    let (place, console, ann) = planned("console_typed", 3).await;
    // Some would not settle: there are two forms of a replay.
    place
        .tamper(
            "UPDATE settled.plan_items SET verdict = 'rejected', reason = 'internal', currency = NULL, quantity = NULL
             WHERE position = 1",
        )
        .await;
    let why = ("why", "\"mine\" & <theirs>");
    let kept = "value=\"&#34;mine&#34; &#38; &#60;theirs&#62;\"";
    for (path, fields, holds) in [
        (
            "/plans/1/replay",
            &[
                why,
                ("seen", "9"),
                ("canary", "2"),
                ("rate", "0.5"),
                ("yes_again", "yes"),
            ][..],
            &[
                "name=\"canary\" inputmode=\"numeric\" value=\"2\"",
                "value=\"0.5\"",
                "value=\"yes\" checked",
            ][..],
        ),
        (
            "/plans/1/replay",
            &[why, ("seen", "9")],
            &["name=\"canary\" inputmode=\"numeric\" value=\"\""],
        ),
        (
            "/plans/1/replay",
            &[why, ("seen", "9"), ("all_verdicts", "yes"), ("canary", "2")],
            &[
                "<details open><summary>Replay all",
                "name=\"canary\" inputmode=\"numeric\" value=\"2\"",
            ],
        ),
        (
            "/plans/1/approve",
            &[why, ("for", "discard"), ("seen_discard", "9")],
            &[],
        ),
        ("/plans/1/discard", &[why, ("seen", "9")], &[]),
        ("/plans/1/restore", &[why, ("seen", "9")], &[]),
        ("/discard", &[why, ("partner", "acme"), ("seen", "9")], &[]),
        ("/purge", &[why, ("before", "1h"), ("seen", "9")], &[]),
        ("/outbox/retry", &[why, ("seen", "9")], &[]),
    ] {
        let page = console.act(&ann, path, fields).await;
        assert!(page.status == 409, "{path}: {page:?}");
        for text in holds {
            assert!(page.text.contains(text), "{path}: {text}: {page:?}");
        }
        assert_eq!(
            page.text.matches(kept).count(),
            1,
            "{path}, in one form alone: {page:?}"
        );
    }
    let page = console
        .act(&ann, "/partners/acme/suspend", &[("why", "internal")])
        .await;
    assert!(
        page.status == 409 && page.text.contains("value=\"internal\""),
        "{page:?}"
    );
    console.stop().await;
}

/// A run waits; others replay its messages meanwhile, again and again: whoever goes on with it says that this is meant, in the
/// browser and on the command line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_may_go_in_circles_is_gone_on_with_by_a_yes_only() {
    let (place, console, ann) = planned("console_circles", 3).await;
    let why = ("why", "the key is there");
    let begun = console
        .act(&ann, "/plans/1/replay", &[why, ("seen", "3"), ("canary", "1")])
        .await;
    assert_eq!(begun.header("location"), Some("/runs/1"), "{begun:?}");
    let cancelled = console.act(&ann, "/runs/1/cancel", &[why]).await;
    assert_eq!(cancelled.status, 303, "{cancelled:?}");
    place.tamper("UPDATE settled.dead_letters SET replays = 5").await;
    let seen = console.get(&ann, "/runs/1").await.hidden("seen").expect("they wait");
    assert_eq!(seen, "3");
    let refused = console.act(&ann, "/runs/1/resume", &[why, ("seen", &seen)]).await;
    assert!(
        refused.status == 409 && refused.text.contains("they may go in circles, and nothing was done"),
        "{refused:?}"
    );
    let resume = ["dead-letters", "runs", "resume", "1", "--reason", "once more"];
    ask(&place, &resume).await.refused(2, "they may go in circles");
    let run = console.get(&ann, "/runs/1").await;
    assert!(run.text.contains("cancelled"), "nothing was done: {run:?}");
    let on = console
        .act(&ann, "/runs/1/resume", &[why, ("seen", &seen), ("yes_again", "yes")])
        .await;
    assert_eq!(on.status, 303, "{on:?}");
    // Who said so once need not say it again of the same run.
    assert_eq!(console.act(&ann, "/runs/1/cancel", &[why]).await.status, 303);
    let again = console.act(&ann, "/runs/1/resume", &[why, ("seen", &seen)]).await;
    assert_eq!(again.status, 303, "{again:?}");
    console.stop().await;
}

/// A refusal is said above the page that it belongs to, with everything as it was filled in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_leaves_the_page_as_it_was() {
    let place = Place::new("console_refusals").await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let alert = "role=\"alert\"";
    for (path, status, holds) in [
        (
            "/letters?partner=a.b&since=2h",
            400,
            &["value=\"a.b\"", "value=\"2h\"", "is no enterprise", ">Filter<"][..],
        ),
        (
            "/letters?until=yesterday",
            400,
            &["value=\"yesterday\"", "until", ">Filter<"],
        ),
        (
            "/audit?since=yesterday&operator=bob",
            400,
            &["value=\"yesterday\"", "value=\"bob\""],
        ),
        ("/purge?before=soon", 400, &["value=\"soon\"", "Count them"]),
        ("/timeline?of=nothing-at-all", 404, &["nothing-at-all"]),
    ] {
        let page = console.get(&ann, path).await;
        assert_eq!(page.status, status, "{path}: {page:?}");
        for text in holds.iter().chain([&alert, &"href=\"/audit\""]) {
            assert!(page.text.contains(text), "{path}: {text}: {page:?}");
        }
    }
    for (path, fields, status, holds) in [
        (
            "/plans",
            &[("partner", "acme"), ("seen", "7")][..],
            409,
            &["nothing to plan", "value=\"acme\"", ">Filter<"][..],
        ),
        (
            "/export",
            &[("partner", "a.b")],
            400,
            &["is no enterprise", "value=\"a.b\"", ">Filter<"],
        ),
        (
            "/purge",
            &[("before", "1h"), ("seen", "0")],
            400,
            &["say why", "value=\"1h\"", "Purge 0 messages for ever"],
        ),
        (
            "/sessions/none/end",
            &[],
            404,
            &["there is no such session", "You are ann"],
        ),
        (
            "/outbox/retry",
            &[("why", "w"), ("seen", "3")],
            409,
            &["the page said 3", "Outbox"],
        ),
    ] {
        let page = console.act(&ann, path, fields).await;
        assert_eq!(page.status, status, "{path}: {page:?}");
        for text in holds.iter().chain([&alert]) {
            assert!(page.text.contains(text), "{path}: {text}: {page:?}");
        }
    }
    console.stop().await;
}

/// What it takes long for is seen to go on: who comes meanwhile sees the same proof, and nobody begins another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_of_the_books_says_how_far_it_is() {
    let place = Place::new("console_proof").await;
    let console = Console::start(&place, &[]).await;
    let (ann, other) = (console.sign_in().await, console.sign_in().await);
    let mut db = place.db().await;
    let lock = db.transaction().await.expect("a transaction");
    lock.batch_execute("LOCK TABLE settled.transfers IN ACCESS EXCLUSIVE MODE")
        .await
        .expect("a lock");
    let page = console.get(&ann, "/ledger/check").await;
    assert!(
        page.status == 200 && page.text.contains("under way") && page.text.contains("questions answered"),
        "{page:?}"
    );
    let (_, rest) = page.text.split_once("href=\"/ledger/check?of=").expect("a link");
    let number = rest.split('"').next().expect("a number").to_owned();
    let page = console.get(&other, "/ledger/check").await;
    assert!(page.text.contains(&format!("/ledger/check?of={number}\"")), "{page:?}");
    lock.rollback().await.expect("an end");
    let path = format!("/ledger/check?of={number}");
    until("it is over", PATIENCE, async || {
        let page = console.get(&ann, &path).await;
        page.text.contains("the books are right").then_some(())
    })
    .await;
    // It stays to be seen; whoever asks anew has them proved anew.
    let page = console.get(&other, &path).await;
    assert!(page.text.contains("the books are right"), "{page:?}");
    console.proves_the_books(&other).await;
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partner_was_seen_last() {
    let place = Place::new("console_seen").await;
    let (acme, beta) = (Partner::new("acme"), Partner::new("beta"));
    for partner in [&acme, &beta] {
        place.register(partner).await;
        place.deposit(partner, "BTC", "1000").await;
    }
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    for path in ["/partners", "/partners/acme"] {
        let page = console.get(&ann, path).await;
        assert!(page.text.contains("nothing came yet"), "{path}: {page:?}");
    }
    let settings = [("SETTLED_REGISTRY__KEY_USE_INTERVAL", "100ms")];
    let worker = place.ready_worker(&[&COLLECTS[..], &settings].concat()).await;
    // A stranger speaks in beta's name, acme itself.
    let reservations = [acme.allocation("BTC", "5"), beta.allocation("BTC", "5")];
    place.reserve(&reservations).await;
    let forged = Partner::new("beta").draft(&reservations[1], "cleared");
    place
        .publish(&[
            acme.cleared(&reservations[0]),
            forged.message(Expect::Refused("signature_mismatch")),
        ])
        .await;
    for (partner, how) in [
        ("acme", "signed by a key of its own"),
        ("beta", "refused, whoever sent it"),
    ] {
        until("it was seen", PATIENCE, async || {
            let page = console.get(&ann, &format!("/partners/{partner}")).await;
            page.text.contains(how).then_some(())
        })
        .await;
    }
    let all = console.get(&ann, "/partners").await;
    assert!(
        all.text.contains("signed by a key of its own") && all.text.contains("refused, whoever sent it"),
        "{all:?}"
    );
    // What is held is seen as well, and counted where everything is looked at.
    let quarantined = console
        .act(&ann, "/partners/acme/quarantine", &[("why", "their key may be stolen")])
        .await;
    assert!(quarantined.text.contains("acme is in quarantine"), "{quarantined:?}");
    let more = acme.allocation("BTC", "6");
    place.reserve(std::slice::from_ref(&more)).await;
    place.publish(&[acme.cleared(&more)]).await;
    until("it is held", PATIENCE, async || {
        let page = console.get(&ann, "/partners/acme").await;
        page.text.contains("held, and not judged yet").then_some(())
    })
    .await;
    let overview = console.get(&ann, "/").await;
    assert!(
        overview.text.contains("of a partner in quarantine") && overview.text.contains("No worker is watched"),
        "{overview:?}"
    );
    let resumed = console
        .act(&ann, "/partners/acme/resume", &[("why", "it was not")])
        .await;
    assert!(resumed.text.contains("acme is resumed"), "{resumed:?}");
    // The world hears of it as of what the command line does.
    for kind in ["partner.quarantined.acme", "partner.resumed.acme"] {
        place.events.wait(kind, |seen| seen.routing_key == kind).await;
    }
    console.stop().await;
    place.settle_up(worker).await;
}

/// However many partners have letters, and however many strangers' names stand in them, each has its own number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_partner_of_the_overview_has_its_own_number() {
    let place = Place::new("console_many").await;
    place
        .tamper(
            "INSERT INTO settled.partners (enterprise_id, name, async_allocations, async_deallocations)
             SELECT 'partner-' || n, 'Partner ' || n, true, true FROM generate_series(10, 39) AS n;
             INSERT INTO settled.dead_letters (
                id, exchange, routing_key, digest, format, properties, body, enterprise_id, reason, detail, group_id, made_by,
                first_failed_at, last_failed_at, collected_at
             )
             SELECT md5(name || '/' || copy)::uuid, 'settlement.updates', name || '.allocation.update', sha256(convert_to(name || '/' || copy, 'UTF8')),
                    1, '{}', convert_to(name || '/' || copy, 'UTF8'), name, 'unknown_partner', 'detail', left(md5(name), 16), 'settled', now(),
                    now(), now()
             FROM (
                SELECT 'partner-' || n AS name, n AS copies FROM generate_series(10, 39) AS n
                UNION ALL
                SELECT 'stranger-' || n, 100 FROM generate_series(1, 60) AS n
             ) AS whose,
             generate_series(1, copies) AS copy",
        )
        .await;
    let console = Console::start(&place, &[]).await;
    let ann = console.sign_in().await;
    let page = console.get(&ann, "/").await;
    for number in 10..40 {
        let (_, rest) = page
            .text
            .split_once(&format!("href=\"/partners/partner-{number}\""))
            .expect("a line");
        let line = rest.split("</tr>").next().expect("its end");
        assert!(
            line.contains(&format!("<span class=\"num\">{number}</span>")),
            "partner-{number}: {line}"
        );
    }
    assert!(!page.text.contains("href=\"/partners/stranger"), "{page:?}");
    console.stop().await;
}

/// Every button has its command line beside it: what a browser does can be typed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_act_shows_its_command() {
    let (place, console, ann) = planned("console_commands", 2).await;
    for (path, commands) in [
        (
            "/letters?partner=acme",
            &[
                "settled dead-letters plan --partner acme",
                "settled dead-letters export --partner acme",
            ][..],
        ),
        (
            "/plans/1",
            &[
                "settled dead-letters replay 1",
                "settled dead-letters plan approve 1",
                "settled dead-letters discard 1",
                "settled dead-letters restore 1",
            ],
        ),
        (
            "/discard?partner=acme",
            &["settled dead-letters discard --partner acme"],
        ),
        (
            "/restore?partner=acme",
            &["settled dead-letters restore --partner acme"],
        ),
        ("/purge?before=1h", &["settled dead-letters purge --discarded-before"]),
        (
            "/partners/acme",
            &[
                "settled partner suspend --enterprise-id acme",
                "settled partner quarantine --enterprise-id acme",
            ],
        ),
        ("/ledger/check", &["settled ledger check"]),
        ("/audit", &["settled audit list"]),
    ] {
        let page = console.get(&ann, path).await;
        for command in commands {
            assert!(page.text.contains(command), "{path}: {command}: {page:?}");
        }
    }
    console.stop().await;
    drop(place);
}
