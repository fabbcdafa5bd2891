//! Amounts named by partners' own symbols.

use super::*;

/// A message that names its amount so.
fn named(id: Uuid, nonce: &str, currency: &str) -> Letter {
    let mut letter = Letter::cleared(id, nonce);
    letter.draft.amount.currency = currency.to_owned();
    letter
}

fn record(model: &Model, id: Uuid) -> (Status, &str, Option<&str>) {
    let allocation = &model.allocations[&id];
    let symbol = allocation.partner_symbol.as_deref();
    (allocation.status, allocation.amount.currency.as_str(), symbol)
}

#[test]
fn the_books_speak_of_the_currency_and_carry_the_symbol() {
    for (map, currency, symbol) in [
        (&[("XBT", "BTC")][..], "XBT", Some("XBT")),
        (&[("XBT", "BTC")], "BTC", None),
        (&[("BTC", "BTC")], "BTC", None),
        (&[("XBT", "BTC"), ("XXBT", "BTC")], "XXBT", Some("XXBT")),
    ] {
        let mut model = Model::new();
        model.acme().symbols = symbols(map);
        let sent = named(ALLOCATION, "n", currency).send();
        let (judgements, changes) = model.post(&rules(), std::slice::from_ref(&sent));
        assert_eq!(lines(&judgements), ["settled"], "{currency}");
        assert_eq!(changes.settlements[0].transfer.amount.currency, "BTC");
        assert_eq!(record(&model, ALLOCATION), (Status::Cleared, "BTC", symbol));
        // What was signed stays as it is.
        assert!(
            changes.settlements[0]
                .content
                .payload
                .contains(&format!("\"{currency}\""))
        );
    }
}

/// The same statement again, under whatever names mean the same, and by the name that stands in the record.
#[test]
fn what_is_settled_is_asked_for_by_any_of_its_names() {
    let mut model = Model::new();
    model.acme().symbols = symbols(&[("XBT", "BTC"), ("XXBT", "BTC")]);
    assert_eq!(line(&model.judge_letter(&named(ALLOCATION, "1", "XBT"))), "settled");
    assert_eq!(line(&model.judge_letter(&named(ALLOCATION, "2", "XXBT"))), "duplicate");
    assert_eq!(line(&model.judge_letter(&named(ALLOCATION, "3", "BTC"))), "duplicate");
    model.acme().symbols = symbols(&[("XBT", "TBTC")]);
    for (nonce, currency, expected) in [
        ("1", "XBT", "duplicate"),
        ("4", "XBT", "duplicate"),
        ("5", "BTC", "duplicate"),
        ("2", "XXBT", "duplicate"),
        ("6", "XXBT", "currency_unmapped"),
    ] {
        let line = line(&model.judge_letter(&named(ALLOCATION, nonce, currency)));
        assert_eq!(line, expected, "{nonce} {currency}");
    }
    assert_eq!(record(&model, ALLOCATION), (Status::Cleared, "BTC", Some("XBT")));
}

/// What waits is judged by the map of the moment at which it is judged.
#[test]
fn a_map_that_changes_while_a_message_waits() {
    let late = || named(LATE, "n", "XBT");
    for (before, after, expected) in [
        (&[][..], &[("XBT", "BTC")][..], "settled"),
        (&[("XBT", "BTC")], &[("XBT", "TBTC")], "currency_mismatch"),
        (&[("XBT", "TBTC")], &[("XBT", "BTC")], "settled"),
        (&[("XBT", "BTC")], &[], "allocation_mismatch"),
        (&[("XBT", "BTC")], &[("XETH", "ETH:wei")], "currency_unmapped"),
    ] {
        let mut model = Model::new();
        model.acme().symbols = symbols(before);
        let sent = late().send();
        assert_eq!(line(&model.judge(&sent)), "parked");
        model.acme().symbols = symbols(after);
        model.reserve(LATE);
        assert_eq!(line(&model.judge(&sent.due())), expected, "{before:?} {after:?}");
    }
}

/// What was refused because of the map settles once the map is mended; what was refused for good never does.
#[test]
fn a_mended_map_brings_back_what_it_held_up_and_nothing_else() {
    for (before, refused, again) in [
        (&[("XBT", "TBTC")][..], "currency_mismatch", "settled"),
        (&[("XETH", "ETH:wei")], "currency_unmapped", "settled"),
        (&[], "allocation_mismatch", "allocation_mismatch"),
    ] {
        let mut model = Model::new();
        model.acme().symbols = symbols(before);
        let sent = named(ALLOCATION, "n", "XBT").send();
        assert_eq!(line(&model.judge(&sent)), refused);
        model.acme().symbols = symbols(&[("XBT", "BTC")]);
        assert_eq!(line(&model.judge(&sent)), again);
        let receipt = if again == "settled" {
            "settled"
        } else {
            "rejected allocation_mismatch"
        };
        assert_eq!(model.receipt("n"), receipt);
        // Under a new nonce it is another statement, and that does not change what became of the first.
        let anew = line(&model.judge_letter(&named(ALLOCATION, "m", "XBT")));
        assert_eq!(anew, if again == "settled" { "duplicate" } else { "settled" });
        assert_eq!(
            line(&model.judge(&sent)),
            if again == "settled" { "duplicate" } else { again }
        );
        assert_eq!(model.receipt("n"), receipt);
    }
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![Just(Outcome::Cleared), Just(released())]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Symbols that mean their own names, and those of names that nobody says, change nothing.
    #[test]
    fn judged_through_a_map_is_judged_without_where_the_symbol_is_the_currency(
        names in prop::collection::vec("[A-Za-z0-9:._-]{1,5}", 0..6),
        said in prop::collection::vec(
            (
                prop::sample::select(vec![ALLOCATION, DEALLOCATION, LARGE, LATE]),
                outcome(),
                prop::sample::select(vec!["1", "2", "3"]),
                prop::sample::select(vec!["BTC", "ETH:wei", "btc", "XBT"]),
            ),
            1..10,
        ),
    ) {
        let own = names.iter().map(String::as_str).chain(["BTC", "ETH:wei", "XBT"]);
        let map: Symbols = own.map(|name| (name.to_owned(), name.to_owned())).collect();
        let batch: Vec<Sent> = said
            .into_iter()
            .map(|(id, outcome, nonce, currency)| {
                let mut letter = Letter::new(id, outcome, nonce);
                letter.draft.amount.currency = currency.to_owned();
                letter.send()
            })
            .collect();
        let (mut without, mut through) = (Model::new(), Model::new());
        through.acme().symbols = map;
        let (plain, mapped) = (without.post(&rules(), &batch), through.post(&rules(), &batch));
        prop_assert_eq!(plain.0, mapped.0);
        through.acme().symbols = Symbols::default();
        prop_assert_eq!(without, through);
    }

    /// A message in the partner's own words moves what it would move in the books' words.
    #[test]
    fn judged_in_its_own_words_it_moves_the_same(
        symbol in "[A-Za-z0-9:._-]{1,64}",
        id in prop::sample::select(vec![ALLOCATION, DEALLOCATION, LARGE]),
        outcome in outcome(),
    ) {
        let currency = reserved(id).amount.currency;
        let mut own = Letter::new(id, outcome.clone(), "n");
        own.draft.amount.currency.clone_from(&symbol);
        let (mut in_own, mut in_ours) = (Model::new(), Model::new());
        in_own.acme().symbols = symbols(&[(&symbol, &currency)]);
        let (judged, mapped) = in_own.post(&rules(), &[own.send()]);
        let (plainly, plain) = in_ours.post(&rules(), &[Letter::new(id, outcome, "n").send()]);
        prop_assert_eq!(lines(&judged), ["settled"]);
        prop_assert_eq!(lines(&plainly), ["settled"]);
        prop_assert_eq!(mapped.balances, plain.balances);
        prop_assert_eq!(&mapped.settlements[0].transfer, &plain.settlements[0].transfer);
        let expected = Allocation {
            partner_symbol: (symbol != currency).then_some(symbol),
            ..in_ours.allocations[&id].clone()
        };
        prop_assert_eq!(&in_own.allocations[&id], &expected);
    }
}
