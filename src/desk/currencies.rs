//! What partners call the currencies.

use super::{Desk, Refusal};
use crate::{
    domain::currency::SYMBOLS_MAX,
    store::registry::{By, Mapped, NewSymbol, SymbolRecord},
};

/// What mapping a symbol came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SymbolMapped {
    Added(SymbolRecord),
    /// It meant that already.
    Exists(SymbolRecord),
    /// It meant another currency, this one.
    Replaced(SymbolRecord, String),
}

impl Desk {
    /// Says what a partner's symbol means, from the next batch on.
    ///
    /// # Errors
    /// There is no such partner, it has too many symbols, or the symbol means another currency and is not to be replaced; the
    /// database is away.
    pub async fn map_symbol(&self, wish: &NewSymbol, by: By<'_>) -> Result<SymbolMapped, Refusal> {
        let mapped = self.patiently(async || self.store.map_symbol(wish, by).await).await?;
        let NewSymbol {
            enterprise_id, symbol, ..
        } = wish;
        Err(match mapped {
            Mapped::Added(record) => return Ok(SymbolMapped::Added(record)),
            Mapped::Exists(record) => return Ok(SymbolMapped::Exists(record)),
            Mapped::Replaced(record, was) => return Ok(SymbolMapped::Replaced(record, was)),
            Mapped::Conflict(record) => Refusal::refused(format!(
                "{symbol} of partner {enterprise_id} means {}; nothing was changed",
                record.currency
            ))
            .hint("if it is to mean another currency from now on, say so with --replace"),
            Mapped::NoPartner => Refusal::no_partner(enterprise_id),
            Mapped::Full => Refusal::refused(format!(
                "partner {enterprise_id} has {SYMBOLS_MAX} symbols, and a partner may have no more; nothing was changed"
            ))
            .hint("`settled currency list` shows them, `settled currency unmap` takes away what is not used"),
        })
    }

    /// Ends what a partner's symbol means, from the next batch on.
    ///
    /// # Errors
    /// There is no such partner, or the symbol is not mapped; the database is away.
    pub async fn unmap_symbol(&self, enterprise_id: &str, symbol: &str, by: By<'_>) -> Result<SymbolRecord, Refusal> {
        let ended = self
            .patiently(async || self.store.unmap_symbol(enterprise_id, symbol, by).await)
            .await?;
        if let Some(ended) = ended {
            return Ok(ended);
        }
        if self.store.partner(enterprise_id).await?.is_none() {
            return Err(Refusal::no_partner(enterprise_id));
        }
        Err(
            Refusal::refused(format!("{symbol} of partner {enterprise_id} is not mapped"))
                .hint("`settled currency list` shows what is"),
        )
    }

    /// Every symbol that counts now, or those of a partner; with `past` also what they meant before.
    ///
    /// # Errors
    /// The database is away.
    pub async fn symbols(&self, enterprise_id: Option<&str>, past: bool) -> Result<Vec<SymbolRecord>, Refusal> {
        Ok(self.store.symbols(enterprise_id, past).await?)
    }
}
