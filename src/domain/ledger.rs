//! Amounts, accounts and transfers. A transfer is balanced by construction: it has one amount and two accounts.

use std::fmt;

use num_bigint::{BigInt, BigUint};
use serde::Serialize;
use uuid::Uuid;

/// The largest quantity: 2^256 - 1 has 78 decimal digits.
const QUANTITY_MAX_DIGITS: usize = 78;

/// A quantity in base units (satoshi, wei): 1 to 2^256 - 1.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity(BigUint);

impl Quantity {
    /// Reads decimal digits without leading zeros.
    ///
    /// # Errors
    /// A sentence about the text, when it is not digits, has leading zeros, is zero, or exceeds 2^256 - 1.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err("must be decimal digits");
        }
        if text.starts_with('0') {
            return Err("must be at least 1 and have no leading zeros");
        }
        if text.len() > QUANTITY_MAX_DIGITS {
            return Err("must be at most 2^256-1");
        }
        let value = BigUint::parse_bytes(text.as_bytes(), 10).ok_or("must be decimal digits")?;
        if value.bits() > 256 {
            return Err("must be at most 2^256-1");
        }
        Ok(Self(value))
    }

    /// The same number, signed and unbounded, for sums.
    pub fn to_signed(&self) -> BigInt {
        BigInt::from(self.0.clone())
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Quantity {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// So much of one currency.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// 1..64 bytes of `[A-Za-z0-9:._-]`, compared exactly.
    pub currency: String,
    pub quantity: Quantity,
}

/// Whether text is a currency's name.
pub fn is_currency(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'.' | b'_' | b'-'))
}

/// The four kinds of account, one of each per owner and currency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccountKind {
    /// The world outside; the only one that may be negative. No owner.
    External,
    /// Funds a client may allocate. Owner: the client.
    Available,
    /// Funds reserved by an allocation or a deallocation. Owner: the connection.
    Held,
    /// Funds at the partner's disposal. Owner: the connection.
    Allocated,
}

impl AccountKind {
    /// The name used in the database and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            AccountKind::External => "external",
            AccountKind::Available => "available",
            AccountKind::Held => "held",
            AccountKind::Allocated => "allocated",
        }
    }

    /// Reads the name used in the database.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::External, Self::Available, Self::Held, Self::Allocated]
            .into_iter()
            .find(|kind| kind.as_str() == text)
    }
}

/// The database's number of an account: four for each row of funds, one of each kind.
pub type AccountId = i64;

/// The row that an account's balance stands in, and the account's kind. Rows are locked, not accounts.
pub fn funds_of(account: AccountId) -> (i64, AccountKind) {
    let kind = match account.rem_euclid(4) {
        0 => AccountKind::External,
        1 => AccountKind::Available,
        2 => AccountKind::Held,
        _ => AccountKind::Allocated,
    };
    (account.div_euclid(4), kind)
}

/// One movement: `quantity` leaves `debit` and arrives at `credit`. Balanced, because there is only one quantity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// What it settles.
    pub allocation_id: Uuid,
    pub debit: (AccountKind, AccountId),
    pub credit: (AccountKind, AccountId),
    pub amount: Amount,
}

impl Transfer {
    /// The two ledger entries: what each account changes by. They sum to zero.
    pub fn entries(&self) -> [(AccountId, BigInt); 2] {
        let quantity = self.amount.quantity.to_signed();
        // Negation of an unbounded integer has no side effect to fear.
        #[expect(clippy::arithmetic_side_effects, reason = "BigInt is unbounded")]
        let negative = -quantity.clone();
        [(self.debit.1, negative), (self.credit.1, quantity)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: &str = "115792089237316195423570985008687907853269984665640564039457584007913129639935";

    fn parse(text: &str) -> Result<String, &'static str> {
        Quantity::parse(text).map(|quantity| quantity.to_string())
    }

    #[test]
    fn what_a_quantity_is() {
        for text in ["1", "9", "10", "100000000", "18446744073709551616", MAX] {
            assert_eq!(parse(text), Ok(text.to_owned()));
            let quantity = Quantity::parse(text).expect("a quantity");
            assert_eq!(quantity.to_signed().to_string(), text);
            assert_eq!(format!("{quantity:?}"), text);
            assert_eq!(serde_json::to_string(&quantity).ok(), Some(format!("\"{text}\"")));
        }
        let digits = Err("must be decimal digits");
        let leading = Err("must be at least 1 and have no leading zeros");
        let large = Err("must be at most 2^256-1");
        let padded = format!("0{MAX}");
        let (long, longer) = ("1".repeat(79), "9".repeat(1_000_000));
        let nines = "9".repeat(78);
        for (text, expected) in [
            ("", digits.clone()),
            ("-1", digits.clone()),
            ("+1", digits.clone()),
            (" 1", digits.clone()),
            ("1 ", digits.clone()),
            ("1\n", digits.clone()),
            ("1.0", digits.clone()),
            ("1e3", digits.clone()),
            ("1_000", digits.clone()),
            ("1,000", digits.clone()),
            ("0x1", digits.clone()),
            ("NaN", digits.clone()),
            // Digits, but not of ASCII: Arabic-Indic one, full-width one.
            ("\u{661}", digits.clone()),
            ("\u{ff11}", digits),
            ("0", leading.clone()),
            ("00", leading.clone()),
            ("01", leading.clone()),
            (padded.as_str(), leading),
            // 2^256, and other numbers of 78 digits and more.
            (
                "115792089237316195423570985008687907853269984665640564039457584007913129639936",
                large.clone(),
            ),
            (nines.as_str(), large.clone()),
            (long.as_str(), large.clone()),
            (longer.as_str(), large),
        ] {
            assert_eq!(parse(text), expected, "{}", text.get(..20).unwrap_or(text));
        }
    }

    #[test]
    fn quantities_are_in_the_order_of_numbers() {
        let quantity = |text| Quantity::parse(text).expect("a quantity");
        assert!(quantity("9") < quantity("10"));
        assert!(quantity("10") < quantity(MAX));
    }

    #[test]
    fn ten_times_the_largest_is_exact() {
        let transfer = Transfer {
            allocation_id: Uuid::nil(),
            debit: (AccountKind::External, 1),
            credit: (AccountKind::Available, 2),
            amount: Amount {
                currency: "ETH".to_owned(),
                quantity: Quantity::parse(MAX).expect("a quantity"),
            },
        };
        let (mut external, mut available) = (BigInt::ZERO, BigInt::ZERO);
        for _ in 0..10 {
            let [(debit, minus), (credit, plus)] = transfer.entries();
            assert_eq!((debit, credit), (1, 2));
            assert_eq!(minus.checked_add(&plus), Some(BigInt::ZERO), "balanced");
            external = external.checked_add(&minus).expect("unbounded");
            available = available.checked_add(&plus).expect("unbounded");
        }
        // Ten times as large: a nought more.
        assert_eq!(available.to_string(), format!("{MAX}0"));
        assert_eq!(external.to_string(), format!("-{MAX}0"));
    }

    #[test]
    fn what_a_currency_is() {
        let (longest, too_long) = ("a".repeat(64), "a".repeat(65));
        for text in ["B", "BTC", "eth:usdc", "a.b_c-d:9", "-", longest.as_str()] {
            assert!(is_currency(text), "{text}");
        }
        for text in ["", " ", "BTC ", "B/C", "\u{20bf}", "a\0", "a\n", too_long.as_str()] {
            assert!(!is_currency(text), "{text}");
        }
    }

    /// As `settled.account()` and `settled.kind_of()` count them.
    #[test]
    fn four_accounts_stand_in_a_row_of_funds() {
        let kinds = [
            AccountKind::External,
            AccountKind::Available,
            AccountKind::Held,
            AccountKind::Allocated,
        ];
        for (place, kind) in (0..).zip(kinds) {
            for funds in [1, 2, 2_000_000_000_000] {
                assert_eq!(funds_of(funds * 4 + place), (funds, kind));
            }
        }
    }

    #[test]
    fn kinds_of_account_are_read_as_they_are_written() {
        for kind in [
            AccountKind::External,
            AccountKind::Available,
            AccountKind::Held,
            AccountKind::Allocated,
        ] {
            assert_eq!(AccountKind::parse(kind.as_str()), Some(kind));
            assert_eq!(
                serde_json::to_string(&kind).ok(),
                Some(format!("\"{}\"", kind.as_str()))
            );
        }
        assert_eq!(AccountKind::parse("Held"), None);
    }
}
