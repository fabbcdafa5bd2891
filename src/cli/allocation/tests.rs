//! Lines as they are read and answered.

use serde_json::{Value, json};

use super::*;

const ID: &str = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";

fn line() -> Value {
    json!({
        "id": ID,
        "type": "allocation",
        "connectionId": "6f1d0c52-0e0b-5c7e-9a53-3c1c8a2d7f10",
        "amount": {"currency": "BTC", "quantity": "1"},
        "clientExternalId": "c-1",
        "initiatedBy": "user",
    })
}

/// A line with one field replaced, or taken away.
fn with(path: &str, value: Option<Value>) -> String {
    let mut line = line();
    let (parent, field) = path.rsplit_once('/').unwrap_or(("", path));
    let object = line
        .pointer_mut(parent)
        .and_then(Value::as_object_mut)
        .expect("an object");
    match value {
        Some(value) => object.insert(field.to_owned(), value),
        None => object.remove(field),
    };
    line.to_string()
}

#[test]
fn what_is_sent_is_what_the_line_says() {
    for text in [
        line().to_string(),
        with("clientExternalId", Some(json!(""))),
        with("notes", Some(Value::Null)),
        with("reason", Some(json!("weil \u{1f600} \u{202e}\u{1}"))),
        with("retriable", Some(json!(true))),
        with("more", Some(json!({"a": {"b": "c"}}))),
    ] {
        let said = read_line(format!(" {text} \r\n").as_bytes()).expect(&text);
        let again: Value = serde_json::from_str(&said).expect("JSON");
        assert_eq!(again, serde_json::from_str::<Value>(&text).expect("JSON"));
    }
    // Only their kind matters, and the database could not hold every number.
    let said = read_line(br#"{"notes": 1e400000, "reason": [1, "\u0000"]}"#).expect("read");
    assert_eq!(said, r#"{"notes":0,"reason":[]}"#);
}

#[test]
fn what_a_line_may_not_say() {
    for (text, detail) in [
        ("[]".to_owned(), "must be a JSON object"),
        ("null".to_owned(), "must be a JSON object"),
        ("7".to_owned(), "must be a JSON object"),
        ("{".to_owned(), "the line is not well-formed JSON: EOF"),
        (format!("\u{feff}{}", line()), "the line begins with a byte-order mark"),
        (
            with("initiatedBy", Some(json!("a\u{0}b"))),
            "initiatedBy: must not hold the character U+0000",
        ),
        (
            with("/amount/currency", Some(json!("\u{0}"))),
            "amount.currency: must not hold the character U+0000",
        ),
        (
            with("x\u{0}", Some(json!(1))),
            "a name: must not hold the character U+0000",
        ),
        (
            line().to_string().replacen('{', r#"{"type":"allocation","#, 1),
            "the line has the same key twice in one object",
        ),
        (
            with("notes", Some(json!("@"))).replace('@', r"\ud800"),
            "the line has a lone surrogate",
        ),
        (
            with("notes", Some(json!("@"))).replace("\"@\"", &format!("{}{}", "[".repeat(17), "]".repeat(17))),
            "the line is nested deeper than 16",
        ),
    ] {
        let answer = read_line(text.as_bytes()).expect_err(&text);
        assert_eq!(
            (answer.result.as_str(), answer.reason.as_deref()),
            ("refused", Some("invalid_field"))
        );
        let found = answer.detail.unwrap_or_default();
        assert!(found.starts_with(detail), "{text}: {found}");
    }
}

#[test]
fn an_id_is_told_where_it_can_be_read() {
    for (text, id) in [
        (with("notes", Some(json!("\u{0}"))), Some(ID)),
        (
            line().to_string().replacen('{', r#"{"type":"allocation","#, 1),
            Some(ID),
        ),
        ("not json".to_owned(), None),
        ("[]".to_owned(), None),
        ("{".to_owned(), None),
    ] {
        let answer = read_line(text.as_bytes()).expect_err(&text);
        assert_eq!(answer.id.map(|id| id.to_string()).as_deref(), id, "{text}");
    }
}

#[test]
fn lines_end_where_they_end() {
    let long = format!("\"{}\"", "x".repeat(LINE_MAX));
    let fits = format!("\"{}\"", "x".repeat(LINE_MAX - 2));
    let text = format!("a\n\n  \r\n{long}\n{fits}\n{long}");
    let (sender, mut lines) = mpsc::channel(16);
    let read = AtomicU64::new(0);
    read_lines(text.as_bytes(), &sender, &read);
    drop(sender);
    let mut details = Vec::new();
    while let Some(line) = lines.blocking_recv() {
        let answer = line.expect("read").expect_err("no reservation");
        details.push(answer.detail.unwrap_or_default());
    }
    let starts: Vec<&str> = details.iter().filter_map(|detail| detail.get(..15)).collect();
    assert_eq!(
        starts,
        [
            "the line is not",
            "the line is lon",
            "must be a JSON ",
            "the line is lon"
        ],
        "{details:?}"
    );
}

#[test]
fn the_exit_code_says_how_much_was_refused() {
    for (reserved, exists, refused, exit) in [
        (0, 0, 0, Exit::Done),
        (1, 1, 0, Exit::Done),
        (0, 0, 2, Exit::Failed),
        (0, 1, 1, Exit::Partly),
    ] {
        let tally = Tally {
            reserved,
            exists,
            refused,
        };
        assert_eq!(tally.exit(), exit);
    }
}
