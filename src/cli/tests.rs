//! What is read of command lines.

use super::{unparsed::in_two, *};

fn read(words: &str) -> Result<Cli, Unparsed> {
    Cli::read(words.split(' ').map(OsString::from))
}

#[test]
fn the_definition_holds_together() {
    Cli::command().debug_assert();
}

#[test]
fn global_flags_stand_anywhere() {
    for words in [
        "settled --json --set park.deadline=2s partner list",
        "settled partner --json list --set park.deadline=2s",
        "settled partner list --set park.deadline=2s --json",
    ] {
        let cli = read(words).expect(words);
        assert!(cli.wants_json(), "{words}");
        assert_eq!(
            cli.global.set,
            [("park.deadline".to_owned(), "2s".to_owned())],
            "{words}"
        );
    }
}

#[test]
fn arguments_are_checked_before_anything_is_asked() {
    let deposit = "settled deposit --client-id 3f2504e0-4f89-41d3-9a0c-0305e82c3301 --currency BTC --reference r";
    for (words, fits) in [
        (format!("{deposit} --quantity 1"), true),
        (format!("{deposit} --quantity 01"), false),
        (format!("{deposit} --quantity -1"), false),
        (format!("{deposit} --quantity 1.5"), false),
        ("settled partner add --enterprise-id a.b --name x".to_owned(), false),
        ("settled partner suspend --enterprise-id -x".to_owned(), false),
        (
            "settled allocation show 3f2504e04f8941d39a0c0305e82c3301".to_owned(),
            false,
        ),
        (
            "settled allocation show 3F2504E0-4F89-41D3-9A0C-0305E82C3301".to_owned(),
            true,
        ),
        ("settled worker --set worker.lanes".to_owned(), false),
        ("settled".to_owned(), false),
        ("settled nothing".to_owned(), false),
    ] {
        let read = read(&words);
        assert_eq!(read.is_ok(), fits, "{words}");
        if let Err(refusal) = read {
            assert_eq!(refusal.error.exit_code(), 2, "{words}");
        }
    }
}

#[test]
fn secrets_in_the_wrong_place_are_not_repeated() {
    for secret in [
        "xprv9s21ZrQH143K3QTDL4LXw2F7HEK3wJUD2nW2nRk4stbPy6cq3jPPqjiChkVvvNKmPGJxWUtg6LnF5kejMRNNU3TGtRBeJgk33yuGBxrMPHi",
        "postgres://u:pa55@h/d",
        "host=h,password=pa55",
        "u:pa55@h",
    ] {
        for words in [
            format!("settled key add --enterprise-id E {secret}"),
            format!("settled key add {secret}"),
            format!("settled {secret}"),
            format!("settled key add --enterprise-id={secret} --public-key x"),
            format!("settled key add --enterprise-id=\u{a0}{secret} --public-key x"),
        ] {
            let refusal = read(&words).err().expect(&words);
            assert!(refusal.error.to_string().contains(secret), "clap would say it: {words}");
            assert!(!refusal.scrubbed().contains(secret), "{words}");
        }
    }
}

#[test]
fn usage_errors_have_a_sentence_and_a_hint() {
    let refusal = read("settled allocation show").err().expect("an argument is missing");
    let (message, hint) = in_two(&refusal.scrubbed());
    assert_eq!(message, "the following required arguments were not provided: <ID>");
    assert!(hint.starts_with("Usage: settled allocation show"), "{hint}");
}

#[test]
fn times_are_cut_to_what_is_shown() {
    let read = |text| time(text).map(|time| time.to_string());
    assert_eq!(
        read("2030-01-31T01:00:00.123456+01:00"),
        Ok("2030-01-31T00:00:00.123Z".to_owned())
    );
    assert!(read("2030-01-31").is_err());
    assert!(read("tomorrow").is_err());
}

/// What the desk says is to be typed is read as the same wish.
#[test]
fn a_command_line_of_the_desk_is_read_as_what_was_asked() {
    use dead_letters::DeadLettersCommand as Dead;

    use crate::{
        desk::{Author, Cancel, Moment, Plan, Purge, Replay, Resume, Selection, StateChange, Which},
        domain::{
            dead_letter::{MadeBy, State},
            reason::Reason,
        },
    };
    let which = Which {
        states: vec![State::Open, State::Discarded],
        reasons: vec![Reason::Internal, Reason::InvalidField],
        is_final: Some(false),
        partner: Some("acme".into()),
        allocation: Some(Uuid::from_u128(7)),
        nonce: Some("-n'1".into()),
        group: Some("0123abcd".into()),
        made_by: Some(MadeBy::Unknown),
        since: Some(Moment::Ago(std::time::Duration::from_millis(5_400_001))),
        until: Some(Moment::At(
            CalendarTime::parse("2030-01-31T00:00:00.123Z").expect("a time"),
        )),
    };
    let author = Author {
        operator: "-ann o'hara".into(),
        why: "--they asked; \"again\"".into(),
    };
    let dead = |command: &crate::desk::Command| {
        let words = command.words().iter().map(OsString::from);
        match Cli::read(words)
            .unwrap_or_else(|refusal| panic!("{command}: {}", refusal.error))
            .command
        {
            Command::DeadLetters(dead) => dead,
            _ => panic!("{command}"),
        }
    };
    for (plan, which) in [(Some(7), Which::default()), (None, which.clone())] {
        let selection = Selection { plan, which };
        for change in [StateChange::Discard, StateChange::Restore] {
            let asked = (selection.clone(), author.clone());
            match (change, dead(&change.command(&selection, &author))) {
                (StateChange::Discard, Dead::Discard(read)) | (StateChange::Restore, Dead::Restore(read)) => {
                    assert_eq!(read.typed(), asked);
                }
                _ => panic!("{change:?}"),
            }
        }
    }
    let purge = Purge {
        discarded_before: Moment::Ago(std::time::Duration::from_secs(3_600)),
        settled: true,
        author: author.clone(),
    };
    assert!(matches!(dead(&purge.command()), Dead::Purge(read) if read.typed() == purge));
    let plan = Plan {
        which: which.clone(),
        limit: Some(3),
        seen: None,
        operator: author.operator.clone(),
    };
    assert!(matches!(dead(&plan.command()), Dead::Plan(read) if read.typed() == Some(plan.clone())));
    for for_act in crate::desk::PlanAct::ALL {
        let approve = crate::desk::Approve {
            plan: 7,
            for_act,
            author: author.clone(),
        };
        use dead_letters::OfPlan;
        let Dead::Plan(read) = dead(&approve.command()) else {
            panic!("{for_act}");
        };
        assert!(matches!(read.of_one(), Some(OfPlan::Approve(read)) if read.typed() == approve));
    }
    let export = crate::desk::Export {
        which,
        recipients: vec!["age1x".to_owned(), "age1y".to_owned()],
        operator: author.operator.clone(),
    };
    assert!(matches!(dead(&export.command()), Dead::Export(read) if read.typed() == export));
    let replay = Replay {
        plan: 7,
        canary: Some(10),
        rate: Some(0.5),
        yes_again: true,
        all_verdicts: true,
        author: author.clone(),
    };
    assert!(matches!(dead(&replay.command()), Dead::Replay(read) if read.typed() == replay));
    let (resume, cancel) = (
        Resume {
            run: 3,
            rate: Some(50.0),
            yes_again: true,
            author: author.clone(),
        },
        Cancel { run: 3, author },
    );
    use dead_letters::RunsCommand as Runs;
    for which in [crate::desk::Refused::All, crate::desk::Refused::Ids(vec![7, 9])] {
        let retry = crate::desk::Retry {
            which,
            author: resume.author.clone(),
        };
        let words = retry.command().words().iter().map(OsString::from).collect::<Vec<_>>();
        assert!(matches!(
            Cli::read(words).expect("a command line").command,
            Command::Outbox(outbox::OutboxCommand::Retry(read)) if read.typed() == retry
        ));
    }
    assert!(matches!(dead(&resume.command()), Dead::Runs(Runs::Resume(read)) if read.typed() == resume));
    assert!(matches!(dead(&cancel.command()), Dead::Runs(Runs::Cancel(read)) if read.typed() == cancel));
}
