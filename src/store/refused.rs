//! What waits to be published and what the broker refused, for an operator; and putting the refused back into the outbox.
//!
//! A publication that is put back gets an outbox row with an id of its own: whoever had its batch's row may still delete by
//! the batch's id once more.

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Store, StoreError,
    audit::{Act, write_audit},
    outbox::{self, Head},
    time::time,
};
use crate::domain::delivery::{BatchId, Properties, PublicationKind};

/// The heads of a row's publications with their length before them, without the bodies.
const HEADS: &str = "\
    format, substring(publications FROM 1 FOR (4 + least(
        ('x' || encode(substring(publications FROM 1 FOR 4), 'hex'))::bit(32)::bigint, octet_length(publications)
    ))::integer) AS heads, octet_length(publications)::bigint AS bytes";

/// Where a publication stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum PublicationStanding {
    /// In the outbox: to be published, or to be confirmed.
    Waiting,
    /// The broker refused it when it was published alone.
    Refused,
}

/// A publication that nobody was told yet.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pending {
    pub state: PublicationStanding,
    /// Of what was refused: what it is put back by.
    pub id: Option<i64>,
    pub batch_id: BatchId,
    /// None from here on: it is in a format that this version does not read.
    pub kind: Option<PublicationKind>,
    pub exchange: Option<String>,
    pub routing_key: Option<String>,
    pub message_id: Option<String>,
    /// Of its body; of all that is stored, where it can not be read.
    pub bytes: u64,
    /// Why the broker refused it.
    pub why: Option<String>,
    #[serde(serialize_with = "time")]
    pub since: Timestamp,
}

/// A refused publication that is in the outbox again.
#[derive(Clone, Debug)]
pub struct Put {
    pub pending: Pending,
    digest: Vec<u8>,
}

/// What putting back came to.
#[derive(Clone, Debug, Default)]
pub struct PutBack {
    pub put: Vec<Put>,
    /// What stays as it was, and why.
    pub left: Vec<(i64, String)>,
    /// More are refused than one act takes.
    pub more: bool,
    /// None where nothing was put back.
    pub audit_id: Option<i64>,
}

/// What became of one that was put back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Became {
    Waiting,
    /// The broker confirmed it.
    Published,
    /// Refused again: its new number, and why.
    Refused(i64, String),
}

fn pending(
    row: &Row,
    state: PublicationStanding,
    batch_id: BatchId,
    head: Option<Head<String, Properties>>,
) -> Pending {
    let stored = u64::try_from(row.get::<_, i64>("bytes")).unwrap_or_default();
    let (id, why) = match state {
        PublicationStanding::Waiting => (None, None),
        PublicationStanding::Refused => (Some(row.get("id")), Some(row.get("refusal"))),
    };
    Pending {
        state,
        id,
        batch_id,
        bytes: head.as_ref().map_or(stored, |head| head.body as u64),
        kind: head.as_ref().map(|head| head.kind),
        message_id: head.as_ref().and_then(|head| head.properties.message_id.clone()),
        exchange: head.as_ref().map(|head| head.exchange.clone()),
        routing_key: head.map(|head| head.routing_key),
        why,
        since: row.get("at"),
    }
}

impl Store {
    /// Refused publications after a number, the oldest first.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn refused_publications(&self, after: i64, limit: i64) -> Result<Vec<Pending>, StoreError> {
        let rows = self
            .session("refused_publications")
            .await?
            .query(
                &format!(
                    "/* refused::refused_publications */
                    SELECT id, batch_id, refusal, at, {HEADS}
                    FROM settled.outbox_refused
                    WHERE id > $1
                    ORDER BY id
                    LIMIT $2"
                ),
                &[&after, &limit],
            )
            .await?;
        let one = |row: &Row| {
            let head = outbox::heads(row.get("format"), row.get("heads")).ok();
            let head = head.and_then(|heads| heads.into_iter().next());
            pending(row, PublicationStanding::Refused, row.get("batch_id"), head)
        };
        Ok(rows.iter().map(one).collect())
    }

    /// Publications in the outbox, those of the oldest rows first. `source` is that of events that are made only now.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn waiting_publications(&self, limit: usize, source: &str) -> Result<Vec<Pending>, StoreError> {
        let session = self.session("waiting_publications").await?;
        let mut found = Vec::new();
        let mut after: Option<(Timestamp, Uuid)> = None;
        // Few at a time: a row may hold megabytes.
        loop {
            let (at, id) = after.unzip();
            let rows = session
                .query(
                    "/* refused::waiting_publications */
                    SELECT batch_id AS own, coalesce(of_batch, batch_id) AS batch_id, created_at AS at, format, publications,
                           octet_length(publications)::bigint AS bytes
                    FROM settled.outbox
                    WHERE $1::timestamptz IS NULL
                       OR (created_at, batch_id) > ($1, $2::uuid)
                    ORDER BY created_at, batch_id
                    LIMIT 4",
                    &[&at, &id],
                )
                .await?;
            let stored: Vec<(i16, &[u8])> = rows
                .iter()
                .map(|row| (row.get("format"), row.get("publications")))
                .collect();
            for (row, made) in rows.iter().zip(outbox::made_again(&session, &stored, source).await?) {
                let batch_id = row.get("batch_id");
                match made {
                    Ok(publications) => found.extend(publications.into_iter().map(|publication| {
                        pending(row, PublicationStanding::Waiting, batch_id, Some(Head::of(publication)))
                    })),
                    Err(_) => found.push(pending(row, PublicationStanding::Waiting, batch_id, None)),
                }
            }
            after = rows.last().map(|row| (row.get("at"), row.get("own")));
            if found.len() >= limit || after.is_none() {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Puts refused publications back into the outbox, those named or all, so many at most: no row is ours, any relay takes
    /// them at once. One whose batch still has a row of its own stays: that row holds it too.
    ///
    /// # Errors
    /// The database is away or refuses; nothing is changed then, unless `at_commit` says that it is unknown.
    pub async fn put_back(&self, act: Act<'_>, ids: Option<&[i64]>, most: usize) -> Result<PutBack, StoreError> {
        let session = self.session("put_back").await?;
        session.begin().await?;
        let limit = i64::try_from(most).unwrap_or(i64::MAX).saturating_add(1);
        let mut rows = session
            .query(
                &format!(
                    "/* refused::put_back found */
                    SELECT id, batch_id, refusal, at, digest, {HEADS},
                           EXISTS (SELECT FROM settled.outbox AS o WHERE o.batch_id = r.batch_id) AS has_row
                    FROM settled.outbox_refused AS r
                    WHERE $1::bigint[] IS NULL OR id = ANY ($1)
                    ORDER BY id
                    LIMIT $2"
                ),
                &[&ids, &limit],
            )
            .await?;
        let mut done = PutBack {
            more: rows.len() > most,
            ..PutBack::default()
        };
        rows.truncate(most);
        let mut found: Vec<(i64, Put, i32)> = Vec::new();
        for row in &rows {
            let id: i64 = row.get("id");
            let head = match outbox::heads(row.get("format"), row.get("heads")) {
                Ok(heads) => heads.into_iter().next(),
                Err(why) => {
                    done.left.push((id, why));
                    continue;
                }
            };
            let Some(head) = head else {
                done.left.push((id, "it holds no publication".to_owned()));
                continue;
            };
            if row.get("has_row") {
                let why = "its batch is still being published: try again once that is over";
                done.left.push((id, why.to_owned()));
                continue;
            }
            let count = i32::try_from(head.events()).unwrap_or(i32::MAX);
            let put = Put {
                pending: pending(row, PublicationStanding::Refused, row.get("batch_id"), Some(head)),
                digest: row.get("digest"),
            };
            found.push((id, put, count));
        }
        let known = |id: &i64| rows.iter().any(|row| row.get::<_, i64>("id") == *id);
        for id in ids.unwrap_or_default().iter().filter(|id| !known(id)) {
            done.left.push((*id, "nothing of this number is set aside".to_owned()));
        }
        let numbers: Vec<i64> = found.iter().map(|(id, _, _)| *id).collect();
        let keys: Vec<Uuid> = found.iter().map(|_| Uuid::new_v4()).collect();
        let counts: Vec<i32> = found.iter().map(|(_, _, count)| *count).collect();
        let put = session
            .query(
                "/* refused::put_back */
                WITH gone AS (
                    DELETE FROM settled.outbox_refused
                    WHERE id = ANY ($1)
                    RETURNING id, batch_id, format, publications
                )
                INSERT INTO settled.outbox (batch_id, of_batch, format, publications, count, created_at, leased_until)
                SELECT n.key, g.batch_id, g.format, g.publications, n.count, clock_timestamp(), clock_timestamp()
                FROM unnest($1::bigint[], $2::uuid[], $3::integer[]) AS n (id, key, count)
                JOIN gone AS g ON g.id = n.id
                RETURNING batch_id",
                &[&numbers, &keys, &counts],
            )
            .await?;
        let put: Vec<Uuid> = put.iter().map(|row| row.get("batch_id")).collect();
        for ((id, one, _), key) in found.into_iter().zip(keys) {
            if put.contains(&key) {
                done.put.push(one);
            } else {
                done.left.push((id, "somebody else put it back just now".to_owned()));
            }
        }
        done.left.sort_by_key(|(id, _)| *id);
        if done.put.is_empty() {
            session.rollback().await;
            return Ok(done);
        }
        let ids: Vec<i64> = done.put.iter().filter_map(|put| put.pending.id).collect();
        let outcome = json!({"putBack": ids.len(), "left": done.left.len(), "ids": ids});
        done.audit_id = Some(write_audit(&session, act, &outcome, None).await?);
        session.commit().await?;
        Ok(done)
    }

    /// What became of those, in their order.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn became(&self, put: &[Put]) -> Result<Vec<Became>, StoreError> {
        let batches: Vec<Uuid> = put.iter().map(|put| put.pending.batch_id).collect();
        let digests: Vec<&[u8]> = put.iter().map(|put| put.digest.as_slice()).collect();
        let rows = self
            .session("became")
            .await?
            .query(
                // Set aside, it is there before its row is gone.
                "/* refused::became */
                SELECT EXISTS (
                           SELECT
                           FROM settled.outbox AS o
                           WHERE o.of_batch = n.batch_id AND sha256(o.publications) = n.digest
                       ) AS waits,
                       r.id, r.refusal
                FROM unnest($1::uuid[], $2::bytea[]) WITH ORDINALITY AS n (batch_id, digest, position)
                LEFT JOIN settled.outbox_refused AS r ON r.batch_id = n.batch_id AND r.digest = n.digest
                ORDER BY n.position",
                &[&batches, &digests],
            )
            .await?;
        let one = |row: &Row| match row.get::<_, Option<i64>>("id") {
            _ if row.get("waits") => Became::Waiting,
            Some(id) => Became::Refused(id, row.get("refusal")),
            None => Became::Published,
        };
        Ok(rows.iter().map(one).collect())
    }
}
