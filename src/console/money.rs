//! Ledger: balances, exact.

use std::collections::BTreeMap;

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use num_bigint::BigInt;

use super::{
    answer::{NotDone, page},
    ask::Ask,
    frame::Frame,
    shown::{Chip, Digits},
};

/// Accounts that a page shows.
const ACCOUNTS_MAX: usize = 500;

#[derive(Template)]
#[template(path = "ledger.html")]
struct LedgerPage {
    frame: Frame,
    currency: String,
    owner: String,
    sums: Vec<SumLine>,
    accounts: Vec<AccountLine>,
    more: usize,
}

struct SumLine {
    currency: String,
    external: Digits,
    available: Digits,
    held: Digits,
    allocated: Digits,
    chip: Chip,
}

struct AccountLine {
    currency: String,
    account: String,
    owner: String,
    balance: Digits,
}

pub(super) async fn ledger(ask: &Ask) -> Result<Response, NotDone> {
    let balances = ask.desk.balances().await?;
    let currency = ask.fields.get("currency").unwrap_or_default().trim().to_owned();
    let owner = ask.fields.get("owner").unwrap_or_default().trim().to_ascii_lowercase();
    let mut sums = BTreeMap::<&str, BTreeMap<&str, BigInt>>::new();
    for balance in &balances {
        let number: BigInt = balance.balance.parse().unwrap_or_default();
        *sums
            .entry(&balance.currency)
            .or_default()
            .entry(&balance.account)
            .or_default() += number;
    }
    let sums = sums
        .into_iter()
        .map(|(currency, of)| {
            let one = |account: &str| Digits::of(of.get(account).cloned().unwrap_or_default());
            let total: BigInt = of.values().sum();
            SumLine {
                currency: currency.to_owned(),
                external: one("external"),
                available: one("available"),
                held: one("held"),
                allocated: one("allocated"),
                chip: if total == BigInt::ZERO {
                    Chip::good("0")
                } else {
                    Chip::bad(total.to_string())
                },
            }
        })
        .collect();
    let mut accounts: Vec<AccountLine> = balances
        .iter()
        .filter(|balance| currency.is_empty() || balance.currency == currency)
        .filter(|balance| {
            owner.is_empty()
                || balance
                    .owner
                    .is_some_and(|id| id.to_string().starts_with(owner.as_str()))
        })
        .map(|balance| AccountLine {
            currency: balance.currency.clone(),
            account: balance.account.clone(),
            owner: balance.owner.map_or_else(|| "–".to_owned(), |owner| owner.to_string()),
            balance: Digits::of(&balance.balance),
        })
        .collect();
    let more = accounts.len().saturating_sub(ACCOUNTS_MAX);
    accounts.truncate(ACCOUNTS_MAX);
    Ok(page(
        StatusCode::OK,
        &LedgerPage {
            frame: ask.frame("ledger", "Ledger"),
            currency,
            owner,
            sums,
            accounts,
            more,
        },
    ))
}
