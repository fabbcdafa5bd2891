//! A currency that the books have never held: whether somebody meant it.
//!
//! A code that is mistyped would open accounts that nobody looks at. Programs deposit what they mean, in as many currencies
//! as they like and without a flag, so only what looks like a slip of a currency that is there is refused; a person at a
//! terminal is asked about every new one. The first currency of empty books is nobody's slip.

use std::io::{BufRead, IsTerminal, stdin};

use strsim::osa_distance;

use super::{Context, Failure, output::complain};

/// Codes that many people use, and that differ by a letter from each other: none of them is taken for a slip.
const COMMON: [&str; 96] = [
    "AAVE", "ADA", "ALGO", "APT", "ARB", "ATOM", "AUD", "AVAX", "AVAXC", "BCH", "BCHA", "BNB", "BRL", "BSC", "BSV",
    "BTC", "BTG", "BUSD", "CAD", "CELO", "CHF", "CNY", "COMP", "CRV", "CSPR", "CZK", "DAI", "DASH", "DKK", "DOGE",
    "DOT", "EOS", "ETC", "ETH", "ETH2", "ETHW", "EUR", "EURC", "FIL", "FTM", "GBP", "GUSD", "HBAR", "HKD", "HUF",
    "IDR", "ILS", "INR", "JPY", "KRW", "LINK", "LTC", "MANA", "MATIC", "MKR", "MXN", "MYR", "NEAR", "NOK", "NZD", "OP",
    "OSMO", "PAX", "PHP", "PLN", "POL", "POLYGON", "PYUSD", "RON", "RUNE", "SAND", "SEI", "SEK", "SGD", "SHIB", "SOL",
    "STX", "SUI", "THB", "TIA", "TON", "TRX", "TRY", "TUSD", "UNI", "USD", "USDC", "USDP", "USDS", "USDT", "WBTC",
    "WETH", "XLM", "XRP", "XTZ", "ZEC",
];

/// Whether a code is one of those, of the main network or of a test network.
fn is_common(code: &str) -> bool {
    let of_a_network = ["", "T", "HT", "GT"]
        .into_iter()
        .filter_map(|prefix| code.strip_prefix(prefix));
    of_a_network.into_iter().any(|code| COMMON.contains(&code))
}

/// The currency of the books that a new code is a slip of: another letter case, a mark more or less, or one letter wrong,
/// missing, too many or exchanged with its neighbour in one part of it. Not a slip: what is common, and what counts
/// (`C1` and `C2`, `TEST_A` and `TEST_B`).
fn slip_of<'k>(code: &str, known: &'k [String]) -> Option<&'k String> {
    const SHORTEST: usize = 3;
    let parts = |code: &str| -> Vec<String> {
        let parts = code.to_ascii_uppercase();
        parts.split([':', '.', '_', '-']).map(str::to_owned).collect()
    };
    let ours = parts(code);
    known.iter().find(|known| {
        let theirs = parts(known);
        if ours.concat() == theirs.concat() {
            return true;
        }
        if is_common(code) || ours.len() != theirs.len() {
            return false;
        }
        let mut different = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs);
        let (Some((mine, other)), None) = (different.next(), different.next()) else {
            return false;
        };
        let without_digits = |part: &str| part.replace(|letter: char| letter.is_ascii_digit(), "");
        mine.len().max(other.len()) >= SHORTEST
            && without_digits(mine) != without_digits(other)
            && osa_distance(mine, other) == 1
    })
}

/// Asks, or refuses, before a currency comes into the books that was never in them.
pub(super) fn must_be_meant(context: &Context, code: &str, known: &[String], undone: &str) -> Result<(), Failure> {
    if known.is_empty() || known.iter().any(|known| known == code) {
        return Ok(());
    }
    let slip = slip_of(code, known);
    let asks = !context.out.json && stdin().is_terminal() && std::io::stderr().is_terminal();
    let sentence = match slip {
        Some(known) => format!("the books have never held the currency {code}, but {known}; {undone}"),
        None => format!("the books have never held the currency {code}; {undone}"),
    };
    let hint = match slip {
        Some(known) => format!("did you mean {known}? If {code} is another currency, say so with --new-currency"),
        None => format!("if {code} is meant, say so with --new-currency"),
    };
    if !asks {
        return match slip {
            Some(_) => Err(Failure::usage(sentence).hint(hint)),
            None => Ok(()),
        };
    }
    let others: Vec<&str> = known.iter().take(10).map(String::as_str).collect();
    let more = if known.len() > others.len() { ", .." } else { "" };
    complain(&format!(
        "The books have never held {code}; they hold {}{more}. Type {code} again to open accounts in it:",
        others.join(", ")
    ));
    let mut typed = String::new();
    stdin()
        .lock()
        .read_line(&mut typed)
        .map_err(|error| Failure::usage(format!("the answer can not be read: {error}; {undone}")))?;
    if typed.trim() == code {
        return Ok(());
    }
    Err(Failure::usage(sentence).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_told_from_another_currency() {
        let known = ["BTC", "ofc:usd.1", "EURX", "TEST_A", "C1", "LONGNAME"].map(str::to_owned);
        for (code, expected) in [
            ("btc", Some("BTC")),
            ("Btc", Some("BTC")),
            ("BCT", Some("BTC")),
            ("BTX", Some("BTC")),
            ("BTCC", Some("BTC")),
            ("BT", Some("BTC")),
            ("ofc:usd-1", Some("ofc:usd.1")),
            ("ofc:usd1", Some("ofc:usd.1")),
            ("ofc:uds.1", Some("ofc:usd.1")),
            ("OFC:USD.1", Some("ofc:usd.1")),
            ("test-a", Some("TEST_A")),
            ("LONGNAMES", Some("LONGNAME")),
            // Others.
            ("ETH", None),
            ("BCH", None),
            ("TBTC", None),
            ("USDC", None),
            ("EURC", None),
            ("ofc:usd.2", None),
            ("TEST_B", None),
            ("C2", None),
            ("A", None),
            ("ofc:eth.1", None),
            ("LONGER", None),
            ("BTC2", None),
        ] {
            let found = slip_of(code, &known).map(String::as_str);
            assert_eq!(found, expected, "{code}");
        }
        // What differs by a letter and is common.
        for (one, other) in [("USDC", "USDT"), ("ETH", "ETC"), ("BTC", "BTG"), ("BCH", "BCHA")] {
            assert_eq!(slip_of(one, &[other.to_owned()]), None, "{one} {other}");
            assert_eq!(slip_of(other, &[one.to_owned()]), None, "{one} {other}");
        }
        assert!(COMMON.is_sorted());
    }
}
