//! What a client or a partner may see of its own.

use std::borrow::Cow;

use uuid::Uuid;

use super::{Desk, Page, ReceiptRecord, Refusal};
use crate::domain::{allocation::Allocation, currency::Symbols};
pub use crate::store::owned::{ConnectionBalance, OwnedBy, OwnedFilter, PartnerBalance};

/// What stands on a partner's connections.
#[derive(Clone, Debug)]
pub struct PartnerBalances {
    /// On all of them, by currency.
    pub all: Vec<PartnerBalance>,
    /// On each of a page of them, by connection.
    pub each: Vec<ConnectionBalance>,
    /// The last connection of this page, where there are more.
    pub more_after: Option<Uuid>,
}

impl Desk {
    /// One allocation, if it is the owner's.
    ///
    /// # Errors
    /// The database is away.
    pub async fn owned_allocation(&self, owner: OwnedBy<'_>, id: Uuid) -> Result<Option<Allocation>, Refusal> {
        Ok(self.store.owned_allocation(owner, id).await?)
    }

    /// A page of the owner's allocations, the oldest first, after the one of an id: so many of them at most, and no more once
    /// these bytes are reached. None: the owner has no such one.
    ///
    /// # Errors
    /// The database is away.
    pub async fn owned_allocations(
        &self,
        owner: OwnedBy<'_>,
        filter: &OwnedFilter,
        after: Option<Uuid>,
        bounds: (i64, i64),
    ) -> Result<Option<Page<Allocation>>, Refusal> {
        let after = match after {
            None => None,
            Some(id) => match self.store.owned_allocation(owner, id).await? {
                Some(last) => Some((last.created_at, last.id)),
                None => return Ok(None),
            },
        };
        let filter = self.meant(owner, filter).await?;
        let (items, more) = self.store.owned_allocations(owner, &filter, after, bounds).await?;
        Ok(Some(Page { items, more }))
    }

    /// The same in the books' words: a partner names currencies as it does in its updates.
    async fn meant<'f>(&self, owner: OwnedBy<'_>, filter: &'f OwnedFilter) -> Result<Cow<'f, OwnedFilter>, Refusal> {
        let enterprise_id = match owner {
            OwnedBy::Partner(enterprise_id) if !filter.currencies.is_empty() => enterprise_id,
            OwnedBy::Partner(_) | OwnedBy::Client(_) => return Ok(Cow::Borrowed(filter)),
        };
        let records = self.store.symbols(Some(enterprise_id), false).await?;
        let symbols: Symbols = records
            .into_iter()
            .map(|record| (record.symbol, record.currency))
            .collect();
        let mut filter = filter.clone();
        for currency in &mut filter.currencies {
            *currency = symbols.currency_of(currency).to_owned();
        }
        Ok(Cow::Owned(filter))
    }

    /// What stands on a partner's connections, so many of them at most.
    ///
    /// # Errors
    /// The database is away.
    pub async fn partner_balances(
        &self,
        enterprise_id: &str,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<PartnerBalances, Refusal> {
        let (all, mut each) = self
            .store
            .partner_balances(enterprise_id, after, limit.saturating_add(1))
            .await?;
        // One connection has a row for each currency.
        let mut connections: Vec<Uuid> = each.iter().map(|row| row.connection_id).collect();
        connections.dedup();
        let shown = usize::try_from(limit).unwrap_or(usize::MAX);
        let more_after = (connections.len() > shown)
            .then(|| connections.get(shown.saturating_sub(1)).copied())
            .flatten();
        if let Some(beyond) = connections.get(shown) {
            each.retain(|row| row.connection_id != *beyond);
        }
        Ok(PartnerBalances { all, each, more_after })
    }

    /// What became of a partner's nonce, without what only an operator knows of it; none where it was never seen.
    ///
    /// # Errors
    /// The database is away.
    pub async fn partners_receipt(&self, enterprise_id: &str, nonce: &str) -> Result<Option<ReceiptRecord>, Refusal> {
        Ok(self.store.receipt(enterprise_id, nonce).await?)
    }
}
