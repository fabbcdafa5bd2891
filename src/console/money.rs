//! Ledger: balances, exact.

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use uuid::Uuid;

use super::{
    answer::{NotDone, page},
    ask::Ask,
    fields::query_of,
    frame::Frame,
    shown::{Chip, Digits},
};
use crate::{
    desk::{AccountRecord, AccountsPage, Page, SumRecord},
    domain::{address::parse_uuid, ledger::is_currency},
};

#[derive(Template)]
#[template(path = "ledger.html")]
struct LedgerPage {
    frame: Frame,
    currency: String,
    owner: String,
    /// None: it is not known.
    sums: Option<Vec<SumLine>>,
    accounts: Option<Vec<AccountLine>>,
    /// Where the accounts go on.
    next: Option<String>,
    /// The filter alone, where they begin elsewhere than at the first.
    first: Option<String>,
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
    account: &'static str,
    owner: String,
    balance: Digits,
}

/// What is asked for.
struct Asked<'f> {
    page: AccountsPage<'f>,
    currency: &'f str,
    owner: &'f str,
}

fn asked(ask: &Ask) -> Result<Asked<'_>, NotDone> {
    let currency = ask.fields.get("currency").unwrap_or_default().trim();
    let owner = ask.fields.get("owner").unwrap_or_default().trim();
    if !currency.is_empty() && !is_currency(currency) {
        return Err(NotDone::wrong(format!("currency: {currency:?} is none")));
    }
    let after = match ask.fields.get("after") {
        None => None,
        Some(text) => {
            Some(after(text).ok_or_else(|| NotDone::wrong(format!("after: {text:?} is no account of a page")))?)
        }
    };
    let page = AccountsPage {
        owners: owners(owner).ok_or_else(|| {
            NotDone::wrong(format!(
                "client or connection: {owner:?} is no id, and no beginning of one"
            ))
        })?,
        currency: (!currency.is_empty()).then_some(currency),
        after,
    };
    Ok(Asked { page, currency, owner })
}

/// From which id to which something is that begins so.
fn owners(beginning: &str) -> Option<(Uuid, Uuid)> {
    const DIGITS: usize = 32;
    let digits: String = beginning.chars().filter(|letter| *letter != '-').collect();
    let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let rest = DIGITS.checked_sub(digits.len()).filter(|_| is_hex)?;
    let bound = |fill: &str| u128::from_str_radix(&format!("{digits}{}", fill.repeat(rest)), 16).ok();
    Some((Uuid::from_u128(bound("0")?), Uuid::from_u128(bound("f")?)))
}

/// An account, as a link says it.
fn after(text: &str) -> Option<(Uuid, &str, &str)> {
    let (owner, rest) = text.split_once('/')?;
    let (currency, holder) = rest.split_once('/')?;
    Some((parse_uuid(owner)?, currency, holder))
}

pub(super) async fn ledger(ask: &Ask) -> Result<Response, NotDone> {
    let said = |name: &str| ask.fields.get(name).unwrap_or_default().to_owned();
    // The form stays as it was filled in, whatever comes of it.
    let form = |why_not: NotDone| {
        let (status, notice) = NotDone::above(Some(why_not));
        let form = LedgerPage {
            frame: ask.frame("ledger", "Ledger").with(notice),
            currency: said("currency"),
            owner: said("owner"),
            sums: None,
            accounts: None,
            next: None,
            first: None,
        };
        page(status, &form)
    };
    let asked = match asked(ask) {
        Ok(asked) => asked,
        Err(wrong) => return Ok(form(wrong)),
    };
    let (sums, found) = match tokio::try_join!(ask.desk.sums(), ask.desk.accounts(&asked.page)) {
        Ok(found) => found,
        Err(refusal) => return Ok(form(refusal.into())),
    };
    let place = |after: Option<String>| {
        let pairs = [("currency", asked.currency), ("owner", asked.owner)];
        let mut pairs: Vec<(&str, String)> = pairs
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name, value.to_owned()))
            .collect();
        pairs.extend(after.map(|after| ("after", after)));
        query_of(&pairs)
    };
    let next = found.items.last().filter(|_| found.more);
    let next = next.map(|last| place(Some(format!("{}/{}/{}", last.owner, last.currency, last.holder))));
    Ok(page(
        StatusCode::OK,
        &LedgerPage {
            frame: ask.frame("ledger", "Ledger"),
            currency: asked.currency.to_owned(),
            owner: asked.owner.to_owned(),
            sums: Some(sums.into_iter().map(sum_line).collect()),
            accounts: Some(lines(&found)),
            next,
            first: asked.page.after.map(|_| place(None)),
        },
    ))
}

fn sum_line(sum: SumRecord) -> SumLine {
    SumLine {
        external: Digits::of(sum.external),
        available: Digits::of(sum.available),
        held: Digits::of(sum.held),
        allocated: Digits::of(sum.allocated),
        chip: if sum.total == "0" {
            Chip::good("0")
        } else {
            Chip::bad(sum.total)
        },
        currency: sum.currency,
    }
}

/// An account is one balance of its holder.
fn lines(found: &Page<AccountRecord>) -> Vec<AccountLine> {
    let lines = |record: &AccountRecord| {
        let line = |account, balance: &String| AccountLine {
            currency: record.currency.clone(),
            account,
            owner: if record.owner.is_nil() {
                "–".to_owned()
            } else {
                record.owner.to_string()
            },
            balance: Digits::of(balance),
        };
        match record.holder.as_str() {
            "client" => vec![line("available", &record.available)],
            "connection" => vec![line("held", &record.held), line("allocated", &record.allocated)],
            _ => vec![line("external", &record.external)],
        }
    };
    found.items.iter().flat_map(lines).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_found_by_their_beginning() {
        let range = |text: &str| owners(text).map(|(first, last)| (first.to_string(), last.to_string()));
        assert_eq!(
            range("3F25-04"),
            Some((
                "3f250400-0000-0000-0000-000000000000".to_owned(),
                "3f2504ff-ffff-ffff-ffff-ffffffffffff".to_owned()
            ))
        );
        assert_eq!(owners(""), Some((Uuid::nil(), Uuid::max())));
        let whole = "3f2504e0-4f89-41d3-9a0c-0305e82c3301";
        assert_eq!(range(whole), Some((whole.to_owned(), whole.to_owned())));
        for text in ["x", "3f2504e0-4f89-41d3-9a0c-0305e82c33010", "é"] {
            assert_eq!(owners(text), None, "{text}");
        }
        let place = format!("{whole}/BTC/client");
        assert_eq!(
            after(&place).map(|(_, currency, holder)| (currency, holder)),
            Some(("BTC", "client"))
        );
        assert_eq!(after("BTC/client"), None);
    }
}
