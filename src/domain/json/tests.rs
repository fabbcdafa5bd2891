//! What JSON is, what it is not, and that equality is by value.

use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn refused(text: &str) -> String {
    match Json::from_text(text) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_json_is() {
    for text in [
        "null",
        " true ",
        "\t\r\n[]\n",
        "{}",
        r#"{"a":1}"#,
        "-0",
        "1e999",
        "123456789012345678901234567890.5E-7",
        r#""\u0000""#,
        r#""😀 \ud83d\ude00 \" \\ \/ \b\f\n\r\t""#,
        "\"\u{feff}\"",
        r#"{"":{"":[]}}"#,
        r#"{"$serde_json::private::RawValue":"1","$serde_json::private::Number":"x"}"#,
        r#"{"a":{"x":1},"b":{"x":1}}"#,
    ] {
        assert_eq!(refused(text), "accepted", "{text}");
    }
}

#[test]
fn what_json_is_not() {
    let lone = "has a lone surrogate in a string";
    let mut others = Vec::new();
    for (text, sentence) in [
        (
            "",
            "is not well-formed JSON: EOF while parsing a value at line 1 column 0",
        ),
        (
            "  ",
            "is not well-formed JSON: EOF while parsing a value at line 1 column 2",
        ),
        (
            "{} {}",
            "is not well-formed JSON: trailing characters at line 1 column 4",
        ),
        (
            "{}\0",
            "is not well-formed JSON: trailing characters at line 1 column 3",
        ),
        (
            "{}\u{feff}",
            "is not well-formed JSON: trailing characters at line 1 column 3",
        ),
        ("\u{feff}{}", "begins with a byte-order mark"),
        (
            " \u{feff}{}",
            "is not well-formed JSON: expected value at line 1 column 2",
        ),
        ("\u{a0}{}", "is not well-formed JSON: expected value at line 1 column 1"),
        (
            "{",
            "is not well-formed JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            r#"{"a":[1}"#,
            "is not well-formed JSON: expected `,` or `]` at line 1 column 8",
        ),
        (
            r#"{"a":1,}"#,
            "is not well-formed JSON: key must be a string at line 1 column 8",
        ),
        ("[1,]", "is not well-formed JSON: expected value at line 1 column 4"),
        (
            r"{a:1}",
            "is not well-formed JSON: key must be a string at line 1 column 2",
        ),
        (
            r#"{"a":NaN}"#,
            "is not well-formed JSON: expected value at line 1 column 6",
        ),
        (
            "{'a':1}",
            "is not well-formed JSON: key must be a string at line 1 column 2",
        ),
        (
            "nul",
            "is not well-formed JSON: EOF while parsing a value at line 1 column 3",
        ),
        (
            r#"{"a":01}"#,
            "is not well-formed JSON: invalid number at line 1 column 7",
        ),
        (
            r#"{"a":+1}"#,
            "is not well-formed JSON: expected value at line 1 column 6",
        ),
        (
            r#"{"a":.5}"#,
            "is not well-formed JSON: expected value at line 1 column 6",
        ),
        (
            r#"{"a":1.}"#,
            "is not well-formed JSON: invalid number at line 1 column 8",
        ),
        (
            r#"{"a":"\x"}"#,
            "is not well-formed JSON: invalid escape at line 1 column 8",
        ),
        (
            "{\"a\":\"\n\"}",
            "is not well-formed JSON: control character (\\u0000-\\u001F) found while parsing a string at line 1 \
             column 6",
        ),
        (
            "{/**/}",
            "is not well-formed JSON: key must be a string at line 1 column 2",
        ),
        (r#"{"a":1,"a":2}"#, "has the same key twice in one object"),
        (r#"{"a":1,"\u0061":1}"#, "has the same key twice in one object"),
        (r#"{"é":1,"\u00e9":1}"#, "has the same key twice in one object"),
        (r#"{"😀":1,"\uD83D\uDE00":1}"#, "has the same key twice in one object"),
        (
            r#"{"ignored":[{"b":1,"a":1,"b":1}]}"#,
            "has the same key twice in one object",
        ),
        (r#""\ud800""#, lone),
        (r#""\udc00""#, lone),
        (r#""\ud800\ud800""#, lone),
        (r#""\ud800x""#, lone),
        (r#"{"ignored":"\udfff"}"#, lone),
        (r#"{"ignored":[{"x":["\ud83d"]}]}"#, lone),
        (r#"{"ignored":{"\ud800":1}}"#, lone),
        (r#"{"\ud800":1}"#, lone),
        (r#"{"\udc00":1}"#, lone),
    ] {
        let said = refused(text);
        if said != sentence {
            others.push((text, said));
        }
    }
    assert!(others.is_empty(), "{others:#?}");
    for (bytes, sentence) in [
        (&b"{\"a\":\"\xff\"}"[..], "is not UTF-8 (from byte 6)"),
        // A surrogate and an overlong form written as bytes.
        (b"\"\xed\xa0\x80\"", "is not UTF-8 (from byte 1)"),
        (b"\"\xc0\x80\"", "is not UTF-8 (from byte 1)"),
        (b"\xef\xbb\xbf{}", "begins with a byte-order mark"),
        (b"\xff\xfe{\0}\0", "is not UTF-8 (from byte 0)"),
    ] {
        assert_eq!(
            Json::from_bytes(bytes).map_err(|error| error.to_string()),
            Err(sentence.to_owned())
        );
    }
}

#[test]
fn depth_has_a_bound() {
    let nested =
        |open: &str, inner: &str, close: &str, depth| format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
    for (open, inner, close) in [
        ("[", "", "]"),
        ("[", "1", "]"),
        (r#"{"a":"#, "null", "}"),
        (r#"{"a":"#, "\"\"", "}"),
    ] {
        assert_eq!(refused(&nested(open, inner, close, 16)), "accepted");
        assert_eq!(refused(&nested(open, inner, close, 17)), "is nested deeper than 16");
    }
    // Both kinds count, and what stands beside does not.
    let mixed = |inner| nested(r#"{"x":[],"a":["#, inner, "]}", 8);
    assert_eq!(refused(&mixed("1")), "accepted");
    assert_eq!(refused(&mixed("[]")), "is nested deeper than 16");
    assert_eq!(refused(&mixed("{}")), "is nested deeper than 16");
    // As deep as a body can be: no stack is used up.
    assert_eq!(refused(&nested("[", "", "]", 131_000)), "is nested deeper than 16");
    assert_eq!(
        refused(&"[".repeat(262_144)),
        "is not well-formed JSON: EOF while parsing a list at line 1 column 262144"
    );
}

#[test]
fn many_keys_take_little_time() {
    let keys: Vec<String> = (0..50_000).map(|number| format!("\"{number}\":0")).collect();
    assert_eq!(refused(&format!("{{{}}}", keys.join(","))), "accepted");
    assert_eq!(
        refused(&format!("{{{},\"25000\":0}}", keys.join(","))),
        "has the same key twice in one object"
    );
}

#[test]
fn keys_are_in_the_order_of_their_code_points() {
    let keys = [
        "",
        "a",
        "a\u{0}",
        "ab",
        "a\"",
        "é",
        "e\u{301}",
        "\u{ffff}",
        "\u{10000}",
        "😀",
        "😀a",
        "\\",
        "z",
    ];
    let plain = |key: &str| serde_json::to_string(key).expect("a string");
    let escaped = |key: &str| {
        let units: String = key.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        format!("\"{units}\"")
    };
    for left in keys {
        for right in keys {
            for (one, another) in [
                (plain(left), plain(right)),
                (plain(left), escaped(right)),
                (escaped(left), plain(right)),
                (escaped(left), escaped(right)),
            ] {
                let order = text::Cursor::at(&one, 0).cmp_string(text::Cursor::at(&another, 0));
                assert_eq!(order, left.cmp(right), "{one} and {another}");
            }
            assert_eq!(text::Cursor::at(&plain(left), 0).cmp_plain(right), left.cmp(right));
            assert_eq!(text::Cursor::at(&escaped(left), 0).cmp_plain(right), left.cmp(right));
        }
    }
}

#[test]
fn equality_is_by_value() {
    for (left, right, equal) in [
        ("1", "1", true),
        ("1", " 1 ", true),
        ("1", "1.0", false),
        ("1", "1e0", false),
        ("1e0", "1E0", false),
        ("0", "-0", false),
        ("1", "\"1\"", false),
        ("null", "false", false),
        ("null", "\"null\"", false),
        (r#""a""#, r#""\u0061""#, true),
        (r#""\/""#, r#""/""#, true),
        (r#""😀""#, r#""\ud83d\udE00""#, true),
        // Code points, not looks: precomposed and decomposed are two strings.
        (r#""\u00e9""#, r#""e\u0301""#, false),
        (r#""a""#, r#""A""#, false),
        ("[1,2]", "[1 , 2]", true),
        ("[1,2]", "[2,1]", false),
        ("[1]", "[1,1]", false),
        ("[]", "{}", false),
        (
            r#"{"a":1,"b":[{"x":1,"y":2}]}"#,
            r#"{ "b":[{"y":2,"x":1}], "\u0061":1 }"#,
            true,
        ),
        (r#"{"a":1}"#, r#"{"a":1,"b":1}"#, false),
        (r#"{"a":null}"#, "{}", false),
        (r#"{"a":1}"#, r#"{"b":1}"#, false),
    ] {
        let (left_json, right_json) = (Json::from_text(left), Json::from_text(right));
        assert!(left_json.is_ok() && right_json.is_ok());
        assert_eq!(left_json == right_json, equal, "{left} and {right}");
        assert_eq!(right_json == left_json, equal, "{right} and {left}");
    }
}

#[test]
fn strings_without_escapes_are_borrowed() {
    let Ok(Json::Object(object)) = Json::from_text(r#"{"plain":"text","\u0062":"te\u0078t"}"#) else {
        panic!("an object");
    };
    assert!(matches!(object.get("plain"), Some(Json::String(Cow::Borrowed("text")))));
    assert_eq!(object.get("b").as_ref().and_then(Json::as_str), Some("text"));
    assert_eq!(object.get("c"), None);
    assert_eq!(object.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["b", "plain"]);
}

/// A document, without numbers that serde_json would write differently.
fn documents() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    scalar.prop_recursive(6, 48, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(any::<String>(), inner, 0..6)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

/// The same document with members in reverse, white space, and every UTF-16 unit escaped.
fn written_oddly(value: &Value) -> String {
    fn string(text: &str) -> String {
        let units: String = text.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
        format!("\"{units}\"")
    }
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => format!("\n{value}\t"),
        Value::String(text) => string(text),
        Value::Array(elements) => {
            format!(
                "[ {} ]",
                elements.iter().map(written_oddly).collect::<Vec<_>>().join(" ,")
            )
        }
        Value::Object(members) => {
            let members = members
                .iter()
                .rev()
                .map(|(key, value)| format!("{} :{}", string(key), written_oddly(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(",\r"))
        }
    }
}

proptest! {
    #[test]
    fn writing_does_not_change_a_value(document in documents()) {
        let (plain, odd) = (document.to_string(), written_oddly(&document));
        prop_assert!(Json::from_text(&plain).is_ok());
        prop_assert_eq!(Json::from_text(&plain), Json::from_text(&odd));
    }

    #[test]
    fn other_values_are_not_equal(left in documents(), right in documents()) {
        let (left_text, right_text) = (left.to_string(), right.to_string());
        prop_assert_eq!(Json::from_text(&left_text) == Json::from_text(&right_text), left == right);
    }

    #[test]
    fn nothing_panics_and_nothing_is_accepted_that_serde_json_refuses(
        text in r#"([\[\]{},:" ]|"[a-b]":|\\u[dD][89aAcCdD]00|[0-9.eE+-]|null|true|"\PC*"){0,40}"#,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        for bytes in [text.as_bytes(), &bytes] {
            if Json::from_bytes(bytes).is_ok() {
                prop_assert!(serde_json::from_slice::<&RawValue>(bytes).is_ok());
            }
        }
    }
}
