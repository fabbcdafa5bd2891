//! What is asked and changes nothing: allocations, balances, receipts. Whoever asks sees its own, and of what is another's not
//! whether it exists.

use std::collections::BTreeMap;

use axum::response::Response;
use hyper::StatusCode;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use uuid::Uuid;

use super::{
    Site,
    answer::{ApiRefused, json},
};
use crate::{
    desk::{OwnedBy, OwnedFilter, ReceiptRecord},
    domain::{
        address::parse_uuid,
        allocation::{Kind, Status},
        event::AllocationView,
        json::Json,
        ledger::is_currency,
        reason::Reason,
    },
};

/// Where enterprises stand.
pub(super) const ROOT: &str = "/api/network/v1/enterprises";
/// Entries of a page where nobody says how many.
const PAGE: u32 = 100;
/// Values of one filter at most.
const VALUES_MAX: usize = 100;
/// Bytes of a nonce.
const NONCE_MAX: usize = 256;
/// What of a nonce stands in an address as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'~').remove(b'.');

/// One allocation, made of its record or taken over from an event.
#[derive(Serialize)]
pub(super) struct One<A> {
    pub(super) allocation: A,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List<'a> {
    allocations: Vec<AllocationView<'a>>,
    /// What `prevId` has to be for the next page; there is none where this is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_batch_prev_id: Option<Uuid>,
}

#[derive(Serialize)]
struct Funds {
    available: String,
    held: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct OfConnection {
    client_id: Uuid,
    partners_connection_id: String,
    balances: BTreeMap<String, Funds>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Balances<'a> {
    partner_id: &'a str,
    balances: BTreeMap<String, Funds>,
    network_balances: BTreeMap<Uuid, OfConnection>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_batch_prev_id: Option<Uuid>,
}

#[derive(Serialize)]
struct Receipt {
    #[serde(flatten)]
    record: ReceiptRecord,
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<u16>,
    #[serde(rename = "final", skip_serializing_if = "Option::is_none")]
    is_final: Option<bool>,
}

/// One allocation or deallocation.
pub(super) async fn allocation(site: &Site, owner: OwnedBy<'_>, id: &str) -> Result<Response, ApiRefused> {
    let id = parse_uuid(id).ok_or_else(|| ApiRefused::invalid("allocationId: must be a UUID of 36 characters"))?;
    match site.desk.owned_allocation(owner, id).await? {
        Some(allocation) => Ok(json(
            StatusCode::OK,
            &One {
                allocation: AllocationView::from(&allocation),
            },
        )),
        None => Err(ApiRefused::not_found(
            "there is no such allocation or deallocation of this enterprise",
        )),
    }
}

/// A page of them, the oldest first.
pub(super) async fn allocations(
    site: &Site,
    owner: OwnedBy<'_>,
    parameters: &ListParameters,
) -> Result<Response, ApiRefused> {
    let asked = ListAsked::read(site, parameters, true)?;
    let page = site
        .desk
        .owned_allocations(
            owner,
            &asked.filter,
            asked.after,
            (i64::from(asked.page), i64::from(site.settings.page_max_bytes)),
        )
        .await?
        .ok_or_else(|| ApiRefused::invalid("prevId: this enterprise has no such allocation or deallocation"))?;
    let last = page.items.last().map(|allocation| allocation.id);
    Ok(json(
        StatusCode::OK,
        &List {
            allocations: page.items.iter().map(AllocationView::from).collect(),
            next_batch_prev_id: last.filter(|_| page.more),
        },
    ))
}

/// What stands on a partner's connections.
pub(super) async fn balances(
    site: &Site,
    enterprise_id: &str,
    parameters: &ListParameters,
) -> Result<Response, ApiRefused> {
    let asked = ListAsked::read(site, parameters, false)?;
    let found = site
        .desk
        .partner_balances(enterprise_id, asked.after, i64::from(asked.page))
        .await?;
    let all = found.all.into_iter().map(|balance| {
        let funds = Funds {
            available: balance.allocated,
            held: balance.held,
        };
        (balance.currency, funds)
    });
    let mut each = BTreeMap::new();
    for balance in found.each {
        let connection = each.entry(balance.connection_id).or_insert_with(|| OfConnection {
            client_id: balance.client_id,
            partners_connection_id: balance.partners_connection_id,
            balances: BTreeMap::new(),
        });
        if let Some(currency) = balance.currency {
            let funds = Funds {
                available: balance.allocated,
                held: balance.held,
            };
            connection.balances.insert(currency, funds);
        }
    }
    Ok(json(
        StatusCode::OK,
        &Balances {
            partner_id: enterprise_id,
            balances: all.collect(),
            network_balances: each,
            next_batch_prev_id: found.more_after,
        },
    ))
}

/// What became of a nonce.
pub(super) async fn receipt(site: &Site, enterprise_id: &str, nonce: &str) -> Result<Response, ApiRefused> {
    if nonce.is_empty() || nonce.len() > NONCE_MAX || nonce.contains('\0') {
        return Err(ApiRefused::invalid("nonce: must be 1 to 256 bytes of text"));
    }
    let Some(record) = site.desk.partners_receipt(enterprise_id, nonce).await? else {
        return Err(ApiRefused::not_found(
            "no update with this nonce was judged whose signature was proven; one that waits in the queue has no receipt yet",
        ));
    };
    let reason = record.reason.as_deref().map(Reason::written);
    Ok(json(
        StatusCode::OK,
        &Receipt {
            record,
            class: reason.map(Reason::class),
            is_final: reason.map(Reason::is_final),
        },
    ))
}

/// The nonce of a query.
pub(super) fn nonce_of(query: Option<&str>) -> Result<String, ApiRefused> {
    let mut pairs = pairs(query);
    match (pairs.next(), pairs.next()) {
        (Some((name, nonce)), None) if name == "nonce" => Ok(nonce),
        _ => Err(ApiRefused::invalid("ask with nonce=, and nothing else")),
    }
}

/// Where the receipt of a nonce is.
pub(super) fn receipt_address(enterprise_id: &str, nonce: &str) -> String {
    let encoded = utf8_percent_encode(nonce, PLAIN);
    // Whoever reads an address resolves these two, encoded or not.
    if matches!(nonce, "." | "..") {
        return format!("{ROOT}/{enterprise_id}/receipts?nonce={encoded}");
    }
    format!("{ROOT}/{enterprise_id}/receipts/{encoded}")
}

fn pairs(query: Option<&str>) -> impl Iterator<Item = (String, String)> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes())
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
}

/// The parameters of a list, by name: those of the query, and those of a JSON object in the body. BitGo's SDK sends a GET with
/// its parameters there, and one that nobody reads is a filter that is left out.
#[derive(Debug)]
pub(super) struct ListParameters(Vec<(String, String)>);

/// Bytes of a parameter's name: more than the longest of any list has.
const PARAMETER_MAX: usize = 40;

impl ListParameters {
    pub(super) fn read(query: Option<&str>, body: &[u8]) -> Result<Self, ApiRefused> {
        let mut all: Vec<_> = pairs(query).collect();
        if body.is_empty() {
            return Ok(Self(all));
        }
        let refused =
            |why: &str| ApiRefused::invalid(format!("the body {why}: a list's has its parameters, or is empty"));
        let document = Json::from_bytes(body).map_err(|error| refused(&error.to_string()))?;
        let members = document.as_object().ok_or_else(|| refused("is no JSON object"))?;
        for (name, value) in members.iter() {
            // It stands beside each of its values from here on, and no list knows so long a one.
            if name.len() > PARAMETER_MAX {
                let start: String = name.chars().take(PARAMETER_MAX).collect();
                return Err(ApiRefused::invalid(format!(
                    "{start:?}... is no parameter of this list"
                )));
            }
            match value {
                Json::Array(values) => {
                    let before = all.len();
                    for value in values.iter() {
                        all.push((name.clone().into_owned(), one_value(&name, value)?));
                    }
                    // One without values is still named, and has to be known.
                    if all.len() == before {
                        all.push((name.into_owned(), String::new()));
                    }
                }
                value @ (Json::Null | Json::Bool(_) | Json::Number(_) | Json::String(_) | Json::Object(_)) => {
                    let text = one_value(&name, value)?;
                    all.push((name.into_owned(), text));
                }
            }
        }
        Ok(Self(all))
    }
}

/// A value in a body, as it would stand in a query.
fn one_value(name: &str, value: Json<'_>) -> Result<String, ApiRefused> {
    match value {
        Json::String(text) => Ok(text.into_owned()),
        Json::Number(digits) => Ok(digits.to_owned()),
        Json::Null | Json::Bool(_) | Json::Array(_) | Json::Object(_) => {
            let name = shortened(name);
            let error = format!("{name:?} must be a string, a number, or a list of these");
            Err(ApiRefused::invalid(error))
        }
    }
}

/// What a list is asked for.
struct ListAsked {
    filter: OwnedFilter,
    after: Option<Uuid>,
    page: u32,
}

impl ListAsked {
    /// What is not known is refused: a filter that is left out would answer with more than was asked for.
    fn read(site: &Site, parameters: &ListParameters, may_filter: bool) -> Result<Self, ApiRefused> {
        let most = site.settings.page_max;
        let mut asked = Self {
            filter: OwnedFilter::default(),
            after: None,
            page: PAGE.min(most),
        };
        for (name, value) in &parameters.0 {
            let wrong = |why: &str| ApiRefused::invalid(format!("{name}: {why}"));
            // Several values stand between commas, or the parameter stands several times.
            let values = || value.split(',').map(str::trim).filter(|value| !value.is_empty());
            match name.as_str() {
                "types" if may_filter => {
                    for value in values() {
                        let kind = Kind::parse(value).ok_or_else(|| wrong("must be allocation or deallocation"))?;
                        asked.filter.kinds.push(kind.as_str());
                    }
                }
                "statuses" if may_filter => {
                    for value in values() {
                        let status =
                            Status::parse(value).ok_or_else(|| wrong("must be cleared, released or reserved"))?;
                        asked.filter.statuses.push(status.as_str());
                    }
                }
                "currencies" if may_filter => {
                    for value in values() {
                        if !is_currency(value) {
                            return Err(wrong("must be names of currencies"));
                        }
                        asked.filter.currencies.push(value.to_owned());
                    }
                }
                "connectionIds" if may_filter => {
                    for value in values() {
                        let id = parse_uuid(value).ok_or_else(|| wrong("must be UUIDs of 36 characters"))?;
                        asked.filter.connections.push(id);
                    }
                }
                "prevId" => {
                    let id = parse_uuid(value).ok_or_else(|| wrong("must be a UUID of 36 characters"))?;
                    asked.after = Some(id);
                }
                "pageSize" => {
                    asked.page = value
                        .parse()
                        .ok()
                        .filter(|size| (1..=most).contains(size))
                        .ok_or_else(|| wrong(&format!("must be from 1 to {most}")))?;
                }
                // The public API counts pages; here one goes on after the last entry, which stays right while others are made.
                "pageNumber" if value == "0" => {}
                "pageNumber" => return Err(wrong("go on with prevId, the nextBatchPrevId of the page before")),
                _ => {
                    return Err(ApiRefused::invalid(format!(
                        "{:?} is no parameter of this list",
                        shortened(name)
                    )));
                }
            }
            let filter = &asked.filter;
            let longest = [
                filter.kinds.len(),
                filter.statuses.len(),
                filter.currencies.len(),
                filter.connections.len(),
            ];
            if longest.into_iter().any(|count| count > VALUES_MAX) {
                return Err(wrong(&format!("has more than {VALUES_MAX} values")));
            }
        }
        Ok(asked)
    }
}

fn shortened(name: &str) -> String {
    name.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_the_parameters_of_a_query() {
        let read = |query, body: &str| ListParameters::read(query, body.as_bytes()).map(|parameters| parameters.0);
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let nothing: [(String, String); 0] = [];
        for body in ["", "{}", " { } "] {
            assert_eq!(read(None, body).expect("parameters"), nothing, "{body}");
        }
        let empty = read(None, r#"{"statuses":[]}"#).expect("parameters");
        assert_eq!(empty, [pair("statuses", "")]);
        let body = r#"{"statuses":["reserved","cleared"],"pageSize":2,"currencies":"BTC,ETH"}"#;
        let all = read(Some("types=allocation&pageSize=1"), body).expect("parameters");
        assert_eq!(all[..2], [pair("types", "allocation"), pair("pageSize", "1")]);
        let of_body = [
            pair("currencies", "BTC,ETH"),
            pair("pageSize", "2"),
            pair("statuses", "reserved"),
            pair("statuses", "cleared"),
        ];
        assert_eq!(all[2..], of_body);
        for wrong in [
            "x",
            "[]",
            "null",
            "\"a\"",
            r#"{"a":null}"#,
            r#"{"a":[[1]]}"#,
            r#"{"a":{}}"#,
            r#"{"a":true}"#,
            "{} {}",
            r#"{"a":1,"a":2}"#,
        ] {
            assert!(read(None, wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_receipts_address_leads_back_to_its_nonce() {
        for nonce in ["n-1", "a/b", "..", ".", "a b+c%", "\u{e4}\u{1f600}", "?nonce=x#", "..."] {
            let address = receipt_address("acme", nonce);
            assert!(address.is_ascii() && !address.contains([' ', '#']), "{address}");
            let back = match address.split_once("?nonce=") {
                Some((path, encoded)) => {
                    assert_eq!(path, format!("{ROOT}/acme/receipts"));
                    nonce_of(Some(&format!("nonce={encoded}"))).expect("a nonce")
                }
                None => {
                    let last = address.rsplit('/').next().expect("a last part");
                    percent_encoding::percent_decode_str(last)
                        .decode_utf8()
                        .expect("UTF-8")
                        .into_owned()
                }
            };
            assert_eq!(back, nonce, "{address}");
        }
    }
}
