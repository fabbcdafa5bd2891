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

/// The database's number of an account.
pub type AccountId = i64;

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
