//! The second person of what is no replay, by the database's word: whoever discards, opens again, deletes for ever or accepts a loss
//! with SQL of their own is asked for one as well.

use crate::kit::{
    command::{ask, ask_in},
    console::Console,
    support::{COLLECTS, Place, connect},
};

use super::two_people::{Login, OPERATOR, stranded};

/// No setting of whoever acts wants a second person.
const NONE: (&str, &str) = ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "0");

/// The database keeps it: more than so many messages take two people.
async fn keep(place: &Place, above: &str) {
    let environment = [
        ("SETTLED_DATABASE_URL", place.database_url.as_str()),
        ("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", above),
    ];
    ask_in(&environment, &["roles", "--apply", "--two-people"])
        .await
        .document(0);
}

/// Somebody's own SQL.
struct OwnSql(tokio_postgres::Client);

impl OwnSql {
    async fn of(login: &Login) -> Self {
        Self(connect(&login.url).await)
    }

    async fn says(&self, words: &str) {
        self.0
            .batch_execute(words)
            .await
            .unwrap_or_else(|error| panic!("{words}: {error:?}"));
    }

    async fn is_refused(&self, words: &str, says: &str) {
        let error = self.0.batch_execute(words).await.expect_err(words);
        let error = error.as_db_error().expect("the server's word").to_string();
        assert!(error.contains(says), "{words}: {error}");
    }
}

/// An act with its row of the audit, on all letters that there are.
fn with_audit(act: &str, filters: &str, change: &str) -> String {
    format!(
        "INSERT INTO settled.audit (at, operator, act, why, filters, outcome) VALUES (now(), 'ann', '{act}', 'x', '{filters}', '{{}}');
         INSERT INTO settled.audit_subjects (dead_letter_id, audit_id)
         SELECT id, (SELECT max(id) FROM settled.audit) FROM settled.dead_letters;
         {change}"
    )
}

const DISCARD: &str = "UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now()";
const RESTORE: &str = "UPDATE settled.dead_letters SET state = 'open', discarded_at = NULL";
const DELETE: &str = "DELETE FROM settled.dead_letters";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_discards_or_opens_much_again_alone() {
    let place = Place::new("second_discard").await;
    let worker = place.ready_worker(&COLLECTS).await;
    stranded(&place, 6).await;
    place.collected(6).await;
    keep(&place, "5").await;
    let (ann, bob) = (
        Login::with_roles(&place, "ann", OPERATOR).await,
        Login::with_roles(&place, "bob", OPERATOR).await,
    );
    let sql = OwnSql::of(&ann).await;
    ann.says(&place, NONE, &["plan", "--partner", "acme"], "ann")
        .await
        .document(0);

    // An act that nobody did yet is one that there is.
    let acts = ask(&place, &["audit", "list", "--act", "plan approve"]).await;
    assert_eq!(acts.lines(0).len(), 0);
    // What stands in no row of the audit is not done, nor what stands there without a plan, or without a second person.
    sql.is_refused(DISCARD, "is in no discard that the audit has").await;
    sql.is_refused(&with_audit("restore", "{}", DISCARD), "takes two people, and a plan")
        .await;
    sql.is_refused(
        &with_audit("discard", "{}", DISCARD),
        "a discard of more than 5 messages takes two people, and a plan",
    )
    .await;
    let of_plan = with_audit("discard", "{\"plan\": 1}", DISCARD);
    sql.is_refused(&of_plan, "nobody else has approved it of plan 1").await;
    sql.is_refused(
        "INSERT INTO settled.audit (at, operator, act, filters, outcome) VALUES (now(), 'ann', 'discard', '{\"plan\": 1}', '{}');
         INSERT INTO settled.audit_subjects (dead_letter_id, audit_id) SELECT gen_random_uuid(), max(id) FROM settled.audit",
        "touches a message that plan 1 has not",
    )
    .await;
    // Nor is it hidden in another way.
    for state in ["settled", "parked"] {
        let hides = format!("UPDATE settled.dead_letters SET state = '{state}'");
        sql.is_refused(&hides, &format!("becomes {state} by being judged"))
            .await;
        // Nor is what was judged opened again.
        let judged = "UPDATE settled.dead_letters SET judged_at = now(), discarded_at = NULL, state = ";
        place.tamper(&format!("{judged}'{state}'")).await;
        sql.is_refused(RESTORE, "is in no restore that the audit has").await;
        place
            .tamper("UPDATE settled.dead_letters SET judged_at = NULL, state = 'open'")
            .await;
    }
    // Her own word in another's name is hers; and bob's counts for what he said, while it counts.
    sql.says(
        "INSERT INTO settled.approvals (plan_id, act, at, expires_at, operator, why, voucher, session_name)
         VALUES (1, 'discard', now(), now() + interval '1 hour', 'bob', 'x', 'bob', 'bob')",
    )
    .await;
    sql.is_refused(&of_plan, "nobody else has approved it of plan 1").await;
    let approve = |act: &'static str| ["plan", "approve", "1", "--for", act, "--reason", "I looked"];
    bob.says(&place, NONE, &approve("restore"), "bob").await.document(0);
    let short = ("SETTLED_DEAD_LETTERS__APPROVAL_LASTS", "1s");
    bob.says(&place, short, &approve("discard"), "bob").await.document(0);
    let over = "DO $$ BEGIN
            WHILE EXISTS (
                SELECT FROM settled.approvals WHERE session_name LIKE '%\\_bob' AND act = 'discard' AND expires_at > clock_timestamp()
            ) LOOP
                PERFORM pg_sleep(0.05);
            END LOOP;
        END $$";
    sql.says(over).await;
    sql.is_refused(&of_plan, "nobody else has approved it of plan 1").await;
    bob.says(&place, NONE, &approve("discard"), "bob").await.document(0);
    let discard = ["discard", "1", "--reason", "not ours", "--yes"];
    let done = ann.says(&place, NONE, &discard, "ann").await.document(0);
    assert_eq!(done["changed"], 6, "{done}");

    // The same of what is opened again; few of them take one person.
    sql.is_refused(RESTORE, "is in no restore that the audit has").await;
    sql.is_refused(&with_audit("restore", "{}", RESTORE), "takes two people, and a plan")
        .await;
    let few = "WHERE id IN (SELECT id FROM settled.dead_letters ORDER BY id LIMIT 5)";
    sql.says(&format!(
        "INSERT INTO settled.audit (at, operator, act, filters, outcome) VALUES (now(), 'ann', 'restore', '{{}}', '{{}}');
         INSERT INTO settled.audit_subjects (dead_letter_id, audit_id)
         SELECT id, (SELECT max(id) FROM settled.audit) FROM settled.dead_letters {few};
         {RESTORE} {few}"
    ))
    .await;
    // An act of the past covers nothing that comes later.
    sql.is_refused(&format!("{DISCARD} {few}"), "is in no discard that the audit has")
        .await;
    ann.says(&place, NONE, &discard, "ann").await.document(0);
    let restore = ["restore", "1", "--reason", "they are ours", "--yes"];
    let done = ann.says(&place, NONE, &restore, "ann").await.document(0);
    assert_eq!(done["changed"], 6, "{done}");
    // Who stores them opens them where they fail anew.
    ann.says(&place, NONE, &discard, "ann").await.document(0);
    let opened = place.db().await.execute(RESTORE, &[]).await;
    assert_eq!(opened.expect("it may"), 6);
    // And without limits one is enough.
    keep(&place, "0").await;
    sql.says(DISCARD).await;
    drop(sql);
    ann.forget(&place).await;
    bob.forget(&place).await;
    worker.terminate().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_deletes_much_for_ever_alone() {
    let place = Place::new("second_purge").await;
    let worker = place.ready_worker(&COLLECTS).await;
    stranded(&place, 6).await;
    place.collected(6).await;
    place
        .tamper("UPDATE settled.dead_letters SET state = 'discarded', discarded_at = now() - interval '1 day'")
        .await;
    keep(&place, "5").await;
    let (ann, bob) = (
        Login::with_roles(&place, "ann", OPERATOR).await,
        Login::with_roles(&place, "bob", OPERATOR).await,
    );
    let sql = OwnSql::of(&ann).await;
    let db = place.db().await;
    let ago = async |interval: &str| -> String {
        let text =
            "SELECT to_char(now() AT TIME ZONE 'UTC' - $1::text::interval, 'YYYY-MM-DD\"T\"HH24:MI:SS.000\"Z\"')";
        db.query_one(text, &[&interval]).await.expect("a time").get(0)
    };
    let (time, earlier) = (ago("1 hour").await, ago("2 days").await);
    let filters = |time: &str| format!("{{\"discardedBefore\": \"{time}\"}}");

    sql.is_refused(DELETE, "is in no purge that the audit has").await;
    let purge = with_audit("purge", &filters(&time), DELETE);
    sql.is_refused(
        &purge,
        "a purge of more than 5 messages takes two people; nobody else has said so",
    )
    .await;
    let own_voice = format!(
        "INSERT INTO settled.voices (act, subject, at, expires_at, operator, why, voucher, session_name)
         VALUES ('purge', 'before {time} settled false', now(), now() + interval '1 hour', 'bob', 'x', 'bob', 'bob')"
    );
    sql.is_refused(&format!("{own_voice}; {purge}"), "nobody else has said so")
        .await;
    // Bob says so of one time: that is no word for another, nor may go what was discarded since.
    let purge_before =
        |time: &str| ["purge", "--discarded-before", time, "--reason", "why", "--yes"].map(str::to_owned);
    let says = async |login: &Login, time: &str, name: &str| {
        let words = purge_before(time);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        login.says(&place, NONE, &words, name).await
    };
    let few = "SELECT id FROM settled.dead_letters ORDER BY id LIMIT 5";
    sql.is_refused(
        &format!(
            "INSERT INTO settled.audit (at, operator, act, filters, outcome) VALUES (now(), 'ann', 'purge', '{}', '{{}}');
             INSERT INTO settled.audit_subjects (dead_letter_id, audit_id) SELECT few.id, (SELECT max(id) FROM settled.audit) FROM ({few}) AS few;
             {DELETE} WHERE id IN ({few})",
            filters(&earlier)
        ),
        "is in no purge that the audit has",
    )
    .await;
    sql.is_refused(
        &with_audit("purge", &filters(&earlier), DELETE),
        "nobody else has said so",
    )
    .await;
    assert_eq!(says(&bob, &time, "bob").await.document(3)["purged"], 0);
    // And of that time only: what settled is no other one's.
    let wider = format!(
        "{{\"discardedBefore\": \"{time}\", \"settledBefore\": \"{}\"}}",
        ago("-1 hour").await
    );
    sql.is_refused(
        &with_audit("purge", &wider, DELETE),
        "a purge of more than 5 messages has one time",
    )
    .await;
    let done = says(&ann, &time, "ann").await.document(0);
    assert_eq!(done["purged"], 6, "{done}");
    drop(sql);
    ann.forget(&place).await;
    bob.forget(&place).await;
    worker.terminate().await;
}

#[tokio::test]
async fn nobody_accepts_a_loss_alone() {
    let place = Place::new("second_epoch").await;
    place.json(&["roles", "--apply"]).await;
    let (ann, bob) = (
        Login::with_roles(&place, "ann", OPERATOR).await,
        Login::with_roles(&place, "bob", OPERATOR).await,
    );
    let (at_ann, at_bob) = (OwnSql::of(&ann).await, OwnSql::of(&bob).await);
    let begin = "INSERT INTO settled.epochs (epoch, books, begun_at) SELECT max(epoch) + 1, min(books::text)::uuid, now() FROM settled.epochs";
    let voice = |name: &str, subject: &str, lasts: &str| {
        format!(
            "INSERT INTO settled.voices (act, subject, at, expires_at, operator, why)
             VALUES ('recover', '{subject}', now(), now() + interval '{lasts}', '{name}', 'x')"
        )
    };
    let alone = "a new epoch takes two people who accept the same loss of epoch 1";
    at_ann.is_refused(begin, alone).await;
    at_ann.says(&voice("ann", "epoch 1: this", "1 hour")).await;
    at_ann.says(&voice("bob", "epoch 1: this", "1 hour")).await;
    at_ann.is_refused(begin, alone).await;
    // Bob says so of another loss, of another epoch, and for a moment.
    at_bob.says(&voice("bob", "epoch 1: that", "1 hour")).await;
    at_bob.says(&voice("bob", "epoch 2: this", "1 hour")).await;
    at_bob.says(&voice("bob", "epoch 1: this", "1 millisecond")).await;
    at_bob.says("SELECT pg_sleep(0.01)").await;
    at_ann.is_refused(begin, alone).await;
    at_bob.says(&voice("bob", "epoch 1: this", "1 hour")).await;
    for other in [
        "INSERT INTO settled.epochs (epoch, books, begun_at) VALUES (2, gen_random_uuid(), now())",
        "INSERT INTO settled.epochs (epoch, books, begun_at) SELECT 7, gen_random_uuid(), now() FROM settled.epochs",
    ] {
        at_ann.is_refused(other, "does not follow epoch 1 of books").await;
    }
    at_ann.says(begin).await;
    // What was said of one epoch does not begin the next.
    at_ann
        .is_refused(
            begin,
            "a new epoch takes two people who accept the same loss of epoch 2",
        )
        .await;
    drop((at_ann, at_bob));
    ann.forget(&place).await;
    bob.forget(&place).await;
}

/// In a console that may vouch, two names are two people to the database too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_people_of_a_console_discard_what_one_may_not() {
    let place = Place::new("second_console").await;
    let worker = place.ready_worker(&COLLECTS).await;
    stranded(&place, 6).await;
    place.collected(6).await;
    keep(&place, "5").await;
    let desk = Login::with_roles(&place, "desk", &format!("{OPERATOR}, settled_console")).await;
    let console = Console::behind_proxy(&place, &[NONE, ("SETTLED_DATABASE_URL", desk.url.as_str())]).await;
    let (ann, bob) = (console.visitor("ann").await, console.visitor("bob").await);
    let why = ("why", "not ours");
    let planned = console.act(&ann, "/plans", &[("state", "open"), ("seen", "6")]).await;
    assert_eq!(planned.header("location"), Some("/plans/1"), "{planned:?}");
    let alone = console.act(&ann, "/plans/1/discard", &[why, ("seen", "6")]).await;
    assert!(
        alone.status == 409 && alone.text.contains("nobody else has approved the discard"),
        "{alone:?}"
    );
    let approve = [why, ("for", "discard"), ("seen_discard", "6")];
    let approved = console.act(&bob, "/plans/1/approve", &approve).await;
    assert_eq!(approved.status, 200, "{approved:?}");
    let own = console.act(&bob, "/plans/1/discard", &[why, ("seen", "6")]).await;
    assert!(own.status == 409 && own.text.contains("bob can not be both"), "{own:?}");
    let done = console.act(&ann, "/plans/1/discard", &[why, ("seen", "6")]).await;
    assert!(done.text.contains("discarded 6 messages"), "{done:?}");
    let row = "SELECT voucher FROM settled.audit WHERE act = 'discard'";
    let row = place.db().await.query_one(row, &[]).await.expect("an act");
    assert_eq!(row.get::<_, Option<&str>>(0), Some("ann"));
    // A purge has no plan: the second one sees what the first one wants, and says the same.
    place
        .tamper("UPDATE settled.dead_letters SET discarded_at = now() - interval '1 day'")
        .await;
    let page = console.get(&bob, "/purge?before=1h").await;
    assert!(
        page.text.contains("Purge 6 messages for ever") && !page.text.contains("h-proposed"),
        "{page:?}"
    );
    let before = page.hidden("before").expect("a time");
    let purge = [why, ("before", before.as_str()), ("seen", "6")];
    let first = console.act(&bob, "/purge", &purge).await;
    assert!(first.text.contains("nothing is purged yet"), "{first:?}");
    let page = console.get(&ann, "/purge").await;
    assert!(page.text.contains("<td>bob</td>"), "{page:?}");
    let (_, rest) = page
        .text
        .split_once("<th scope=\"row\"><a href=\"/purge?")
        .expect("a link");
    let query = rest.split('"').next().expect("its end");
    let page = console.get(&ann, &format!("/purge?{query}")).await;
    assert!(page.text.contains("Purge 6 messages for ever"), "{page:?}");
    assert_eq!(page.hidden("before").as_ref(), Some(&before));
    let second = console.act(&ann, "/purge", &purge).await;
    assert!(second.text.contains("purged 6 messages"), "{second:?}");
    console.stop().await;
    desk.forget(&place).await;
    worker.terminate().await;
}
