//! What partners call the currencies.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::Row;

use super::{By, note};
use crate::{
    domain::currency::{Meaning, SYMBOLS_MAX, SymbolLives},
    store::{
        Session, Store, StoreError,
        time::{maybe_time, time},
    },
};

/// A partner's symbol and the currency that it means, or meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SymbolRecord {
    pub enterprise_id: String,
    pub symbol: String,
    pub currency: String,
    #[serde(serialize_with = "time")]
    pub since: Timestamp,
    /// None: it counts now.
    #[serde(serialize_with = "maybe_time")]
    pub until: Option<Timestamp>,
}

const SYMBOL_COLUMNS: &str = "enterprise_id, symbol, currency, since, until";

fn symbol(row: &Row) -> SymbolRecord {
    SymbolRecord {
        enterprise_id: row.get("enterprise_id"),
        symbol: row.get("symbol"),
        currency: row.get("currency"),
        since: row.get("since"),
        until: row.get("until"),
    }
}

/// A symbol to map.
#[derive(Clone, Debug)]
pub struct NewSymbol {
    pub enterprise_id: String,
    pub symbol: String,
    pub currency: String,
    /// Also where it means another currency now.
    pub replace: bool,
}

/// What mapping a symbol came to, with the record as it is stored now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mapped {
    Added(SymbolRecord),
    /// It meant that already.
    Exists(SymbolRecord),
    /// It meant another currency, this one.
    Replaced(SymbolRecord, String),
    /// It means another currency, which stands.
    Conflict(SymbolRecord),
    NoPartner,
    /// The partner has as many symbols as it may have.
    Full,
}

/// Holds a partner's symbols until the transaction ends: who maps one waits for who maps another. False: there is no such
/// partner.
async fn hold(session: &Session, enterprise_id: &str) -> Result<bool, StoreError> {
    let rows = session
        .query(
            "/* symbols::hold */
            SELECT 1
            FROM settled.partners
            WHERE enterprise_id = $1
            FOR NO KEY UPDATE",
            &[&enterprise_id],
        )
        .await?;
    Ok(!rows.is_empty())
}

/// Ends what a symbol means now.
async fn end(session: &Session, enterprise_id: &str, named: &str) -> Result<Option<SymbolRecord>, StoreError> {
    let rows = session
        .query(
            &format!(
                "/* symbols::end */
                UPDATE settled.currency_symbols
                SET until = clock_timestamp()
                WHERE enterprise_id = $1
                  AND symbol = $2
                  AND until IS NULL
                RETURNING {SYMBOL_COLUMNS}"
            ),
            &[&enterprise_id, &named],
        )
        .await?;
    Ok(rows.first().map(symbol))
}

impl Store {
    /// Says what a partner's symbol means, from the next batch on.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn map_symbol(&self, wish: &NewSymbol, by: By<'_>) -> Result<Mapped, StoreError> {
        let session = self.session("map_symbol").await?;
        session.begin().await?;
        if !hold(&session, &wish.enterprise_id).await? {
            session.rollback().await;
            return Ok(Mapped::NoPartner);
        }
        let rows = session
            .query(
                &format!(
                    "/* symbols::map_symbol before */
                    SELECT {SYMBOL_COLUMNS}
                    FROM settled.currency_symbols
                    WHERE enterprise_id = $1
                      AND until IS NULL"
                ),
                &[&wish.enterprise_id],
            )
            .await?;
        let mut known = rows.iter().map(symbol);
        let before = known.find(|record| record.symbol == wish.symbol);
        let stands = match &before {
            Some(record) if record.currency == wish.currency => Some(Mapped::Exists(record.clone())),
            Some(record) if !wish.replace => Some(Mapped::Conflict(record.clone())),
            None if rows.len() >= SYMBOLS_MAX => Some(Mapped::Full),
            Some(_) | None => None,
        };
        if let Some(stands) = stands {
            session.rollback().await;
            return Ok(stands);
        }
        let was = end(&session, &wish.enterprise_id, &wish.symbol).await?;
        let rows = session
            .query(
                &format!(
                    "/* symbols::map_symbol */
                    INSERT INTO settled.currency_symbols (enterprise_id, symbol, currency, since)
                    VALUES ($1, $2, $3, clock_timestamp())
                    RETURNING {SYMBOL_COLUMNS}"
                ),
                &[&wish.enterprise_id, &wish.symbol, &wish.currency],
            )
            .await?;
        let now = symbol(session.one(&rows)?);
        let about = json!({"enterpriseId": now.enterprise_id, "symbol": now.symbol});
        let was = was.map(|record| record.currency);
        let outcome = json!({"currency": now.currency, "was": was});
        note(&session, by, "currency map", &about, &outcome).await?;
        session.commit().await?;
        Ok(match was {
            Some(was) => Mapped::Replaced(now, was),
            None => Mapped::Added(now),
        })
    }

    /// Ends what a partner's symbol means, from the next batch on: it means the currency of its own name then. None if it meant
    /// nothing.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn unmap_symbol(
        &self,
        enterprise_id: &str,
        named: &str,
        by: By<'_>,
    ) -> Result<Option<SymbolRecord>, StoreError> {
        let session = self.session("unmap_symbol").await?;
        session.begin().await?;
        let is_known = hold(&session, enterprise_id).await?;
        let Some(ended) = end(&session, enterprise_id, named).await?.filter(|_| is_known) else {
            session.rollback().await;
            return Ok(None);
        };
        let about = json!({"enterpriseId": ended.enterprise_id, "symbol": ended.symbol});
        note(&session, by, "currency unmap", &about, &json!({"was": ended.currency})).await?;
        session.commit().await?;
        Ok(Some(ended))
    }

    /// Every symbol that counts now, or those of one partner; with `past` also what they meant before.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn symbols(&self, enterprise_id: Option<&str>, past: bool) -> Result<Vec<SymbolRecord>, StoreError> {
        let rows = self
            .session("symbols")
            .await?
            .query(
                &format!(
                    "/* symbols::symbols */
                    SELECT {SYMBOL_COLUMNS}
                    FROM settled.currency_symbols
                    WHERE (enterprise_id = $1 OR $1 IS NULL)
                      AND (until IS NULL OR $2)
                    ORDER BY enterprise_id, symbol, since, id"
                ),
                &[&enterprise_id, &past],
            )
            .await?;
        Ok(rows.iter().map(symbol).collect())
    }

    /// Everything that symbols ever meant, for proving old signatures.
    ///
    /// # Errors
    /// The database is away.
    pub async fn symbol_lives(&self) -> Result<SymbolLives, StoreError> {
        let mut lives = SymbolLives::default();
        for record in self.symbols(None, true).await? {
            let meaning = Meaning {
                currency: record.currency,
                since: record.since,
                until: record.until,
            };
            lives.add(&record.enterprise_id, &record.symbol, meaning);
        }
        Ok(lives)
    }
}
