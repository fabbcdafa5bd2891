//! Slips of somebody who is new here: each is answered, and with what to do next.

use crate::kit::command::{Answer, ask, ledger};

#[tokio::test]
async fn a_slip_is_answered_with_what_to_do_next() {
    // A schema, and an empty virtual host.
    let place = ledger("slips").await;
    // Named, and not there: an empty list would look like an answer.
    let (message, hint) = ask(&place, &["audit", "list", "--act", "partner suspnd"])
        .await
        .refusal(2);
    assert!(message.contains("no act is called \"partner suspnd\""), "{message}");
    assert!(hint.contains("did you mean `partner suspend`?"), "{hint}");
    ask(&place, &["audit", "list", "--act", "purge"]).await.lines(0);
    for list in [&["key", "list"][..], &["connection", "list"]] {
        ask(&place, list).await.document(0);
        ask(&place, &[list, &["--partner", "northwnd"]].concat())
            .await
            .refused(1, "no partner northwnd is registered");
    }
    let client = "9838fce3-c125-4af8-a775-a389f5ac26bf";
    let deposit = |client: &str, quantity: &str| {
        let words = [
            "deposit",
            "--client-id",
            client,
            "--currency",
            "BTC",
            "--reference",
            "r",
            "--quantity",
            quantity,
        ];
        words.map(str::to_owned)
    };
    for (words, piece) in [
        (deposit(client, "-5").to_vec(), "base units, must be decimal digits"),
        (deposit("9838fce3", "5").to_vec(), "give the whole of it"),
        (
            ["audit", "list", "--after", "abc"].map(str::to_owned).to_vec(),
            "that of the last line of the page before",
        ),
        (
            ["dead-letters", "runs", "list", "--after", "abc"]
                .map(str::to_owned)
                .to_vec(),
            "that of the last line of the page before",
        ),
    ] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let answer = ask(&place, &words).await;
        assert_eq!(answer.code, Some(2));
        assert!(answer.err.contains(piece), "{words:?}: {}", answer.err);
    }
    // What mends a whole row of problems is said once, to a person.
    let answer = Answer::of(&place.run(&["doctor"]).await);
    assert_eq!(answer.code, Some(1), "{}", answer.all());
    let (problems, hints) = (
        answer.out.matches("PROBLEM").count(),
        answer.out.matches("settled topology").count(),
    );
    assert!(
        problems > 10 && hints <= 3,
        "{hints} hints for {problems} problems: {}",
        answer.out
    );
}
