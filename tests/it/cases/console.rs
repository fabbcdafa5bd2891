//! `settled console`: who is let in, what each route needs, whose form counts; and an incident from plan to drained by forms
//! alone, as a browser without scripts sends them.

use settled::console::{ConsoleRole, Needs, table};

use super::tidy::{code, sources};
use crate::kit::{
    command::Answer,
    console::{Console, Visitor},
    partner::Partner,
    support::{COLLECTS, PATIENCE, Place, until},
};

/// A route with something in its place.
fn path_of(path: &str) -> String {
    path.replace("{id}", "1")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_wants_its_role() {
    let place = Place::new("console_routes").await;
    let console = Console::behind_proxy(&place, &[]).await;
    let stranger = Visitor::default();
    let visitors = [
        (ConsoleRole::Reader, console.visitor("rita").await),
        (ConsoleRole::Operator, console.visitor("ann").await),
        (ConsoleRole::Approver, console.visitor("bob").await),
    ];
    let mut walked = 0;
    for route in table() {
        let path = path_of(route.path);
        walked += 1;
        let ask = async |visitor: &Visitor| match route.method {
            "GET" => console.get(visitor, &path).await,
            _ => console.act(visitor, &path, &[]).await,
        };
        let least = match route.needs {
            Needs::Nobody => {
                assert_ne!(ask(&stranger).await.status, 403, "{route:?}");
                continue;
            }
            Needs::Look(least) | Needs::Change(least) => least,
        };
        assert_eq!(ask(&stranger).await.status, 401, "{route:?}");
        // For who may have it a stream has no end, and signing out ends what the others need.
        if matches!(route.path, "/live" | "/sign-out") {
            assert_eq!(least, ConsoleRole::Reader, "{route:?}");
            continue;
        }
        for (role, visitor) in &visitors {
            let page = ask(visitor).await;
            if *role < least {
                assert_eq!(page.status, 403, "{route:?} as {role:?}: {page:?}");
                assert!(
                    page.text.contains(&format!("needs the role {}", least.as_str())),
                    "{page:?}"
                );
            } else {
                assert_ne!(page.status, 403, "{route:?} as {role:?}: {page:?}");
                assert_ne!(page.status, 500, "{route:?} as {role:?}: {page:?}");
            }
        }
    }
    assert!(walked > 35, "the table is walked: {walked}");
    // Where nobody may change anything, nobody does, whatever their role.
    let console = Console::behind_proxy(&place, &[("SETTLED_CONSOLE__READ_ONLY", "true")]).await;
    let bob = console.visitor("bob").await;
    for route in table().filter(|route| matches!(route.needs, Needs::Change(_))) {
        let page = console.act(&bob, &path_of(route.path), &[]).await;
        assert_eq!(page.status, 403, "{route:?}");
        assert!(page.text.contains("console.read_only"), "{page:?}");
    }
}

/// Nothing is asked for past the table: one place makes routes, and it makes them of its lines.
#[test]
fn every_route_stands_in_the_table() {
    let mut made: Vec<String> = Vec::new();
    for (name, text) in sources("src/console") {
        let makes = |line: &&str| {
            [".route(", ".route_service(", ".nest(", ".merge("]
                .iter()
                .any(|way| line.contains(way))
        };
        made.extend(
            code(&text)
                .lines()
                .filter(makes)
                .map(|line| format!("{name}: {}", line.trim())),
        );
    }
    assert_eq!(made.len(), 1, "{made:?}");
    assert!(made[0].contains("router.route(line.path"), "{made:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_counts_only_in_its_own_session_and_a_cookie_is_never_adopted() {
    let place = Place::new("console_forms").await;
    let console = Console::start(&place, &[]).await;
    // Looking at the link uses nothing up.
    let first = console.link();
    let look = console.get(&Visitor::default(), &format!("/enter?link={first}")).await;
    assert_eq!(look.status, 200);
    assert!(look.cookie().is_none(), "{look:?}");
    // Whoever brings a cookie along has none, before and after.
    let fixed = Visitor {
        cookie: Some(format!("settled_console={}", "ab".repeat(32))),
        ..Visitor::default()
    };
    assert_eq!(console.get(&fixed, "/plans").await.status, 401);
    let entered = console.post(&fixed, "/enter", &format!("link={first}")).await;
    assert_eq!(entered.status, 303);
    assert_ne!(entered.cookie(), fixed.cookie, "a session has a cookie of its own");
    assert_eq!(console.get(&fixed, "/plans").await.status, 401);
    let attributes = entered.header("set-cookie").expect("a cookie");
    assert!(
        attributes.contains("HttpOnly") && attributes.contains("SameSite=Lax"),
        "{attributes}"
    );
    // Once means once; and another link is printed.
    assert_eq!(
        console
            .post(&Visitor::default(), "/enter", &format!("link={first}"))
            .await
            .status,
        401
    );
    assert_ne!(console.link(), first);

    let (ann, other) = (console.sign_in().await, console.sign_in().await);
    assert_ne!(ann.token, other.token);
    for token in ["", "x", &other.token, &ann.token.to_uppercase()] {
        let forged = Visitor {
            token: token.to_owned(),
            ..ann.clone()
        };
        let page = console
            .act(&forged, "/discard", &[("partner", "acme"), ("why", "w"), ("seen", "0")])
            .await;
        assert_eq!(page.status, 403, "{token}: {page:?}");
        assert!(page.text.contains("nothing was done"), "{page:?}");
    }
    let form = format!("form_token={}", ann.token);
    let kind = ("content-type", "application/x-www-form-urlencoded");
    let elsewhere = [kind, ("sec-fetch-site", "cross-site")];
    assert_eq!(
        console.ask(&ann, "POST", "/discard", &elsewhere, &form).await.status,
        403
    );
    let text = [("content-type", "text/plain")];
    assert_eq!(console.ask(&ann, "POST", "/discard", &text, &form).await.status, 415);
    let json = [("content-type", "application/json")];
    assert_eq!(console.ask(&ann, "POST", "/discard", &json, "{}").await.status, 415);
    let large = format!("{form}&why={}", "x".repeat(70_000));
    assert_eq!(console.ask(&ann, "POST", "/discard", &[kind], &large).await.status, 413);

    // Another name that leads here is not answered.
    let renamed = [("host", "console.example")];
    assert_eq!(console.ask(&ann, "GET", "/plans", &renamed, "").await.status, 421);
    // What a browser is told with every page, the refused ones too.
    for path in ["/plans", "/nowhere", "/enter"] {
        let page = console.get(&ann, path).await;
        let policy = page.header("content-security-policy").expect("a policy");
        assert!(
            policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert!(!policy.contains("unsafe"), "{policy}");
        for (name, value) in [
            ("x-frame-options", "DENY"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-store"),
        ] {
            assert_eq!(page.header(name), Some(value), "{path}");
        }
    }
    // Signing out ends it, and ending a session does.
    let gone = console.act(&ann, "/sign-out", &[]).await;
    assert_eq!(gone.status, 200);
    assert_eq!(console.get(&ann, "/plans").await.status, 401);
    let sessions = console.get(&other, "/sessions").await;
    let id = sessions
        .text
        .split("/sessions/")
        .nth(1)
        .and_then(|rest| rest.split('/').next());
    assert_eq!(
        console
            .act(&other, &format!("/sessions/{}/end", id.expect("one")), &[])
            .await
            .status,
        303
    );
    console.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_let_in_by_an_open_door() {
    let place = Place::new("console_doors").await;
    let secret = place.file("short-secret");
    std::fs::write(&secret, "short").expect("a file");
    let short = secret.display().to_string();
    for (settings, says) in [
        (
            &[("SETTLED_CONSOLE__LISTEN", "0.0.0.0:0")][..],
            "nobody says who they are",
        ),
        (&[("SETTLED_CONSOLE__PROXY_SECRET_FILE", short.as_str())], "16 bytes"),
        (
            &[("SETTLED_CONSOLE__PROXY_SECRET_FILE", "/nowhere/at/all")],
            "/nowhere/at/all",
        ),
        (&[("SETTLED_CONSOLE__KEY_FILE", "/nowhere")], "console.certificate_file"),
    ] {
        let mut command = place.command(&["console", "--json"]);
        command.envs(settings.iter().copied());
        let (message, _) = Answer::of(&command.output().await.expect("settled runs")).refusal(2);
        assert!(message.contains(says), "{message}");
    }
    std::fs::write(&secret, "long enough to be a secret").expect("a file");
    let mut command = place.command(&["console", "--json"]);
    command.env("SETTLED_CONSOLE__LISTEN", "0.0.0.0:0");
    command.env("SETTLED_CONSOLE__PROXY_SECRET_FILE", &short);
    let (message, _) = Answer::of(&command.output().await.expect("settled runs")).refusal(2);
    assert!(message.contains("there is no TLS"), "{message}");

    let console = Console::behind_proxy(&place, &[("SETTLED_CONSOLE__READERS", "rita")]).await;
    let headers = |pairs: &[(&str, &str)]| Visitor {
        headers: pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect(),
        ..Visitor::default()
    };
    let right = ("x-settled-proxy-secret", crate::kit::console::PROXY_SECRET);
    for (visitor, status) in [
        (headers(&[("x-forwarded-user", "ann")]), 401),
        (
            headers(&[
                ("x-settled-proxy-secret", "wrong wrong wrong"),
                ("x-forwarded-user", "ann"),
            ]),
            401,
        ),
        (headers(&[right]), 401),
        (
            headers(&[right, ("x-forwarded-user", "ann"), ("x-forwarded-user", "bob")]),
            401,
        ),
        (headers(&[right, ("x-forwarded-user", "eve")]), 403),
        (headers(&[right, ("x-forwarded-user", "rita")]), 200),
    ] {
        assert_eq!(console.get(&visitor, "/plans").await.status, status, "{visitor:?}");
    }
    // A session is of whom the proxy names: with another name it is another's, and a form of one's own counts in none but that.
    let ann = console.visitor("ann").await;
    let as_bob = Visitor {
        headers: console.visitor("bob").await.headers,
        ..ann.clone()
    };
    let page = console.get(&as_bob, "/sessions").await;
    assert!(page.text.contains("You are bob"), "{page:?}");
    assert_eq!(console.act(&as_bob, "/sign-out", &[]).await.status, 403);
    // Without the proxy there is nothing.
    let alone = Visitor {
        headers: Vec::new(),
        ..ann
    };
    assert_eq!(console.get(&alone, "/plans").await.status, 401);
}

/// What was done before the key was registered waits for an operator. The whole way by forms: plan, a second person, canary,
/// stop, go on, drained.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incident_is_drained_by_two_people_with_forms_alone() {
    let place = Place::new("console_incident").await;
    let partner = Partner::new("acme");
    let worker = place.ready_worker(&COLLECTS).await;
    let reservations = place
        .strand(&partner, "<b>Acme</b> \u{202e}", "1000000", (12, "7"))
        .await;
    place.collected(12).await;
    let db = place.db().await;
    place.add_key(&partner).await;
    let console = Console::behind_proxy(&place, &[("SETTLED_DEAD_LETTERS__APPROVE_ABOVE", "5")]).await;
    let (ann, bob) = (console.visitor("ann").await, console.visitor("bob").await);
    let overview = console.get(&ann, "/").await;
    assert!(overview.text.contains("open letters"), "{overview:?}");
    let partners = console.get(&ann, "/partners").await;
    assert!(
        !partners.text.contains("<b>Acme") && partners.text.contains("\\u{202e}"),
        "{partners:?}"
    );
    let letters = console.get(&ann, "/letters?partner=acme").await;
    assert!(letters.text.contains("Plan 12 messages"), "{letters:?}");
    let until_field = letters.hidden("until").expect("it is frozen");

    let fields = [("partner", "acme"), ("until", until_field.as_str()), ("seen", "12")];
    let planned = console.act(&ann, "/plans", &fields).await;
    assert_eq!(
        (planned.status, planned.header("location")),
        (303, Some("/plans/1")),
        "{planned:?}"
    );
    let plan = console.get(&ann, "/plans/1").await;
    assert!(
        plan.text.contains("takes two people") && plan.text.contains("Replay 12 messages"),
        "{plan:?}"
    );
    // Its maker can not approve it, nor act without the other; and a number that is not the one that was seen does nothing.
    let why = ("why", "acme's key was missing");
    let alone = console
        .act(&ann, "/plans/1/replay", &[why, ("seen", "12"), ("canary", "3")])
        .await;
    assert_eq!(alone.status, 409);
    assert!(alone.text.contains("nobody else has approved"), "{alone:?}");
    assert_eq!(console.act(&ann, "/plans/1/approve", &[why]).await.status, 403);
    let approved = console
        .act(
            &bob,
            "/plans/1/approve",
            &[("why", "I looked"), ("for", "replay"), ("seen_replay", "12")],
        )
        .await;
    assert!(
        approved.text.contains("you approved the replay of plan 1"),
        "{approved:?}"
    );
    let stale = console.act(&ann, "/plans/1/replay", &[why, ("seen", "11")]).await;
    assert!(
        stale.status == 409 && stale.text.contains("the page said 11"),
        "{stale:?}"
    );
    let own = console.act(&bob, "/plans/1/replay", &[why, ("seen", "12")]).await;
    assert!(own.status == 409 && own.text.contains("bob can not be both"), "{own:?}");
    // What was replayed too often wants a box to be ticked.
    place.tamper("UPDATE settled.dead_letters SET replays = 5").await;
    let circles = console.act(&ann, "/plans/1/replay", &[why, ("seen", "12")]).await;
    assert!(
        circles.status == 409 && circles.text.contains("they may go in circles, and nothing was done"),
        "{circles:?}"
    );
    let slow = [
        why,
        ("seen", "12"),
        ("canary", "3"),
        ("rate", "0.01"),
        ("yes_again", "yes"),
    ];
    let begun = console.act(&ann, "/plans/1/replay", &slow).await;
    assert_eq!(
        (begun.status, begun.header("location")),
        (303, Some("/runs/1")),
        "{begun:?}"
    );
    until("the canary is judged", PATIENCE, async || {
        let run = console.get(&ann, "/runs/1").await;
        run.text.contains("3: judged as planned").then_some(())
    })
    .await;
    let stopped = console.act(&ann, "/runs/1/cancel", &[("why", "too slow")]).await;
    assert_eq!(stopped.status, 303, "{stopped:?}");
    let run = console.get(&ann, "/runs/1").await;
    let left = run.hidden("seen").expect("it can be gone on with");
    assert!(run.text.contains("cancelled"), "{run:?}");
    let resumed = console
        .act(
            &ann,
            "/runs/1/resume",
            &[("why", "faster"), ("rate", "1000"), ("seen", &left)],
        )
        .await;
    assert_eq!(resumed.status, 303, "{resumed:?}");
    until("the run is done", PATIENCE, async || {
        let run = console.get(&ann, "/runs/1").await;
        run.text.contains("</b>done</span>").then_some(())
    })
    .await;
    let letters = console.get(&ann, "/letters?state=open").await;
    assert!(letters.text.contains("No such letter."), "{letters:?}");
    let audit = place.run(&["audit", "list", "--json"]).await;
    let acts: Vec<(String, String)> = Answer::of(&audit)
        .lines(0)
        .iter()
        .map(|act| {
            let text = |name: &str| act[name].as_str().unwrap_or_default().to_owned();
            (text("act"), text("operator"))
        })
        .collect();
    for (act, operator) in [
        ("plan", "ann"),
        ("plan approve", "bob"),
        ("replay", "ann"),
        ("cancel", "ann"),
        ("resume", "ann"),
        ("replay ended", "ann"),
    ] {
        assert!(acts.contains(&(act.to_owned(), operator.to_owned())), "{act}: {acts:?}");
    }
    // A life, a letter with its body, the books: each is a page, and what was looked at is written down.
    let id: uuid::Uuid = db
        .query_one("SELECT id FROM settled.dead_letters ORDER BY seq LIMIT 1", &[])
        .await
        .expect("a letter")
        .get(0);
    let body = console.act(&ann, &format!("/letters/{id}"), &[]).await;
    assert!(body.text.contains("Body and signed payload say the same."), "{body:?}");
    let life = console.get(&ann, &format!("/timeline?of={}", reservations[0].id)).await;
    assert!(
        life.text.contains("<strong>replayed</strong>") && life.text.contains("<svg class=\"branch\""),
        "{life:?}"
    );
    console.proves_the_books(&ann).await;
    console.stop().await;
    place.settle_up(worker).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_away_is_said_and_the_rest_is_shown() {
    let place = Place::new("console_away").await;
    let nowhere = format!("amqp://a:b@{}/x", crate::kit::command::NOWHERE);
    let console = Console::start(&place, &[("SETTLED_BROKER_URL", &nowhere)]).await;
    let ann = console.sign_in().await;
    until("the broker is said to be away", PATIENCE, async || {
        let page = console.get(&ann, "/").await;
        assert_eq!(page.status, 200);
        (page.text.contains("the broker: ") && page.text.contains("open letters")).then_some(())
    })
    .await;
    let nowhere = format!("postgres://a:b@{}/x", crate::kit::command::NOWHERE);
    let console = Console::start(&place, &[("SETTLED_DATABASE_URL", &nowhere)]).await;
    let ann = console.sign_in_without_pages().await;
    until("the database is said to be away", PATIENCE, async || {
        let page = console.get(&ann, "/").await;
        assert_eq!(page.status, 200);
        (page.text.contains("in the queue") && page.text.contains("the database: ")).then_some(())
    })
    .await;
    // Whatever can not be shown says so; a form stays as it was filled in.
    let page = console.get(&ann, "/letters?partner=acme").await;
    assert_eq!(page.status, 503);
    assert!(
        page.text.contains("role=\"alert\"")
            && page.text.contains("value=\"acme\"")
            && page.text.contains("href=\"/audit\""),
        "{page:?}"
    );
    let page = console.get(&ann, "/runs").await;
    assert_eq!(page.status, 503);
    assert!(
        page.text.contains("Not now") && page.text.contains("href=\"/audit\""),
        "{page:?}"
    );
}
