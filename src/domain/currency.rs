//! What partners call the currencies: symbols of their own, each with what it means here.

use std::{
    collections::{BTreeMap, HashMap},
    ops::RangeInclusive,
};

use jiff::Timestamp;

use super::reason::Reason;

/// Symbols that a partner may have at a time.
pub const SYMBOLS_MAX: usize = 1_000;

/// A partner's symbols, as they count now. A symbol that is not among them means the currency of that name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Symbols(BTreeMap<String, String>);

impl FromIterator<(String, String)> for Symbols {
    /// Symbols, each with its currency.
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl Symbols {
    /// The currency that a symbol means.
    pub fn currency_of<'a>(&'a self, symbol: &'a str) -> &'a str {
        self.0.get(symbol).map_or(symbol, String::as_str)
    }

    /// Whether any of them means something else than its name.
    fn translates(&self) -> bool {
        self.0.iter().any(|(symbol, currency)| symbol != currency)
    }

    /// Why an amount that is named so is not in the currency that was reserved. Whoever has no symbols of its own has named
    /// another currency, for good. Else the map may be what is wrong, and it may be mended; ours it is only where the map has
    /// no word for what was reserved.
    pub(super) fn objection(&self, symbol: &str, reserved: &str) -> Option<(Reason, &'static str)> {
        if self.currency_of(symbol) == reserved {
            return None;
        }
        let is_named = self.0.get(symbol).is_some_and(|currency| currency == symbol);
        Some(if is_named || !self.translates() {
            (Reason::AllocationMismatch, "amount.currency: differs from the record")
        } else if self.0.contains_key(symbol) {
            (
                Reason::CurrencyMismatch,
                "amount.currency: this symbol is mapped to another currency than was reserved",
            )
        } else if self.0.values().any(|currency| currency == reserved) {
            (
                Reason::CurrencyMismatch,
                "amount.currency: this symbol is not mapped, and what was reserved has another one of this partner",
            )
        } else {
            (
                Reason::CurrencyUnmapped,
                "amount.currency: this symbol is not mapped, and no symbol of this partner is mapped to what was reserved",
            )
        })
    }
}

/// From when to when a symbol meant a currency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meaning {
    pub currency: String,
    pub since: Timestamp,
    /// None: it counts still.
    pub until: Option<Timestamp>,
}

impl Meaning {
    /// Whether it counted some time within this.
    fn may_count(&self, within: &RangeInclusive<Timestamp>) -> bool {
        self.since <= *within.end() && self.until.is_none_or(|until| until >= *within.start())
    }

    /// Whether nothing else counted within this.
    fn must_count(&self, within: &RangeInclusive<Timestamp>) -> bool {
        self.since <= *within.start() && self.until.is_none_or(|until| until > *within.end())
    }
}

/// Everything that partners' symbols ever meant.
#[derive(Clone, Debug, Default)]
pub struct SymbolLives(HashMap<(String, String), Vec<Meaning>>);

impl SymbolLives {
    pub fn add(&mut self, enterprise_id: &str, symbol: &str, meaning: Meaning) {
        let key = (enterprise_id.to_owned(), symbol.to_owned());
        self.0.entry(key).or_default().push(meaning);
    }

    /// Whether a symbol of a partner meant a currency some time within this.
    pub(super) fn may_mean(
        &self,
        enterprise_id: &str,
        symbol: &str,
        currency: &str,
        within: &RangeInclusive<Timestamp>,
    ) -> bool {
        let key = (enterprise_id.to_owned(), symbol.to_owned());
        let meanings = self.0.get(&key).map(Vec::as_slice).unwrap_or_default();
        if symbol == currency {
            return !meanings
                .iter()
                .any(|meaning| meaning.currency != symbol && meaning.must_count(within));
        }
        meanings
            .iter()
            .any(|meaning| meaning.currency == currency && meaning.may_count(within))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbols(pairs: &[(&str, &str)]) -> Symbols {
        let owned = |(symbol, currency): &(&str, &str)| ((*symbol).to_owned(), (*currency).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[test]
    fn what_a_symbol_means_and_whose_fault_it_is_where_it_means_another() {
        use Reason::{AllocationMismatch as Other, CurrencyMismatch as Mapped, CurrencyUnmapped as Unmapped};
        let none: &[(&str, &str)] = &[];
        for (map, symbol, reserved, expected) in [
            (none, "BTC", "BTC", None),
            (none, "XBT", "BTC", Some(Other)),
            // A symbol that means its name is no map.
            (&[("BTC", "BTC")], "BTC", "BTC", None),
            (&[("BTC", "BTC")], "ETH", "BTC", Some(Other)),
            (&[("BTC", "BTC")], "BTC", "ETH", Some(Other)),
            (&[("XBT", "BTC")], "XBT", "BTC", None),
            // What is not mapped means its name, also beside a map.
            (&[("XBT", "BTC")], "BTC", "BTC", None),
            (&[("XBT", "BTC")], "ETH", "ETH", None),
            (&[("XBT", "BTC"), ("XXBT", "BTC")], "XXBT", "BTC", None),
            (&[("XBT", "BTC")], "XBT", "ETH", Some(Mapped)),
            (&[("XBT", "BTC")], "XXBT", "BTC", Some(Mapped)),
            (&[("XBT", "BTC")], "XETH", "ETH", Some(Unmapped)),
            // A name that means another currency does not mean its own any more.
            (&[("BTC", "TBTC")], "BTC", "BTC", Some(Mapped)),
            (&[("BTC", "TBTC")], "BTC", "TBTC", None),
            // Somebody said that it means its name.
            (&[("BTC", "TBTC"), ("ETH", "ETH")], "ETH", "TBTC", Some(Other)),
            // Exactly, and once: what a symbol means is no symbol.
            (&[("XBT", "BTC")], "xbt", "ETH", Some(Unmapped)),
            (&[("A", "B"), ("B", "C")], "A", "C", Some(Mapped)),
        ] {
            let found = symbols(map).objection(symbol, reserved);
            assert_eq!(found.map(|(reason, _)| reason), expected, "{map:?} {symbol} {reserved}");
            if let Some((_, detail)) = found {
                assert!(detail.starts_with("amount.currency: "), "{detail}");
            }
        }
    }

    #[test]
    fn a_meaning_counts_while_it_was_in_force() {
        let at = |text: &str| -> Timestamp { text.parse().expect("a time") };
        let mut lives = SymbolLives::default();
        let meaning = |currency: &str, since: &str, until: Option<&str>| Meaning {
            currency: currency.to_owned(),
            since: at(since),
            until: until.map(at),
        };
        let (first, change) = ("2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z");
        lives.add("acme", "XBT", meaning("BTC", first, Some(change)));
        lives.add("acme", "XBT", meaning("TBTC", change, None));
        for (enterprise, symbol, currency, from, until, expected) in [
            (
                "acme",
                "XBT",
                "BTC",
                "2026-01-01T23:58:00Z",
                "2026-01-01T23:59:00Z",
                false,
            ),
            ("acme", "XBT", "BTC", "2026-01-01T23:59:00Z", first, true),
            (
                "acme",
                "XBT",
                "BTC",
                "2026-01-02T12:00:00Z",
                "2026-01-02T12:01:00Z",
                true,
            ),
            ("acme", "XBT", "BTC", change, "2026-01-03T00:01:00Z", true),
            (
                "acme",
                "XBT",
                "BTC",
                "2026-01-03T00:00:01Z",
                "2026-01-03T00:01:01Z",
                false,
            ),
            (
                "acme",
                "XBT",
                "TBTC",
                "2026-01-02T23:58:00Z",
                "2026-01-02T23:59:00Z",
                false,
            ),
            ("acme", "XBT", "TBTC", "2026-01-02T23:59:00Z", change, true),
            (
                "acme",
                "XBT",
                "TBTC",
                "2030-01-01T00:00:00Z",
                "2030-01-01T00:01:00Z",
                true,
            ),
            (
                "acme",
                "XBT",
                "ETH",
                "2026-01-02T12:00:00Z",
                "2026-01-02T12:01:00Z",
                false,
            ),
            (
                "other",
                "XBT",
                "BTC",
                "2026-01-02T12:00:00Z",
                "2026-01-02T12:01:00Z",
                false,
            ),
            // By its own name a currency is known, unless that name meant another all the while.
            (
                "other",
                "XBT",
                "XBT",
                "2026-01-02T12:00:00Z",
                "2026-01-02T12:01:00Z",
                true,
            ),
            (
                "acme",
                "XBT",
                "XBT",
                "2026-01-01T12:00:00Z",
                "2026-01-01T12:01:00Z",
                true,
            ),
            (
                "acme",
                "XBT",
                "XBT",
                "2026-01-01T23:59:30Z",
                "2026-01-02T00:00:30Z",
                true,
            ),
            (
                "acme",
                "XBT",
                "XBT",
                "2026-01-02T12:00:00Z",
                "2026-01-02T12:01:00Z",
                false,
            ),
        ] {
            let found = lives.may_mean(enterprise, symbol, currency, &(at(from)..=at(until)));
            assert_eq!(found, expected, "{enterprise} {symbol} {currency} {from}");
        }
    }
}
