//! The outbox: one row a batch, holding everything it publishes, owned by a lease.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    Fate, Session, Store, StoreError,
    allocations::{allocation, select_allocations},
    write::{Rows, Write, params},
};
use crate::{
    domain::{
        allocation::Allocation,
        delivery::{BatchId, Properties, Publication, PublicationKind},
        event,
        kept::{self, Kept, Named},
        notice::PartnerNotice,
    },
    fail::Point,
};

/// The format of stored properties, and of publications that are kept whole. Version N reads N and N-1.
pub(super) const FORMAT: i16 = 1;
/// The format of a batch's row, in which settlements' events are named only.
const NAMED: i16 = 2;
/// The format of a row that belongs to no batch: a JSON array of notices, which are made into events when they are published.
/// The trigger `told` of the partners' table writes it as well.
const NOTICES: i16 = 3;

/// A publication without its body, as stored; borrowed where it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Head<Text, Properties> {
    pub(super) kind: PublicationKind,
    pub(super) exchange: Text,
    pub(super) routing_key: Text,
    pub(super) properties: Properties,
    /// Bytes of the body.
    pub(super) body: usize,
}

impl Head<String, Properties> {
    pub(super) fn of(publication: Publication) -> Self {
        Self {
            kind: publication.kind,
            exchange: publication.exchange,
            routing_key: publication.routing_key,
            properties: publication.properties,
            body: publication.body.len(),
        }
    }

    /// How many events it tells.
    pub(super) fn events(&self) -> u64 {
        event::count_of(&Publication {
            kind: self.kind,
            exchange: String::new(),
            routing_key: String::new(),
            properties: self.properties.clone(),
            body: Vec::new(),
        })
    }
}

fn head(publication: &Publication) -> Head<&str, &Properties> {
    Head {
        kind: publication.kind,
        exchange: publication.exchange.as_str(),
        routing_key: publication.routing_key.as_str(),
        properties: &publication.properties,
        body: publication.body.len(),
    }
}

/// Takes its body from the front of `bodies`.
fn with_body(head: Head<String, Properties>, bodies: &mut &[u8]) -> Result<Publication, String> {
    let (body, rest) = bodies.split_at_checked(head.body).ok_or_else(cut_short)?;
    *bodies = rest;
    Ok(Publication {
        kind: head.kind,
        exchange: head.exchange,
        routing_key: head.routing_key,
        properties: head.properties,
        body: body.to_vec(),
    })
}

/// Format 1: the length of the heads (u32, big endian), the heads as a JSON array, then the bodies end to end.
///
/// # Errors
/// They can not be written: a fault of ours. What can not be read again is not stored.
pub fn encode(publications: &[Publication]) -> Result<Vec<u8>, StoreError> {
    let heads: Vec<Head<&str, &Properties>> = publications.iter().map(head).collect();
    let heads = serde_json::to_vec(&heads).map_err(|error| unwritable(&error))?;
    let len = u32::try_from(heads.len()).map_err(|error| unwritable(&error))?;
    let mut bytes = Vec::with_capacity(4 + heads.len() + publications.iter().map(|p| p.body.len()).sum::<usize>());
    bytes.extend(len.to_be_bytes());
    bytes.extend(heads);
    for publication in publications {
        bytes.extend(&publication.body);
    }
    Ok(bytes)
}

/// Format 2: the length of the contents (u32, big endian), the contents as JSON, then what they speak of, end to end: 16 bytes
/// for each settlement's event, which is made again of the record of that allocation, and whatever else is published as its
/// body.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents<Text, Properties> {
    /// The `source` of the events that are made again: the setting may be another one by then.
    source: Text,
    parts: Vec<Part<Text, Properties>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
enum Part<Text, Properties> {
    Whole(Head<Text, Properties>),
    /// So many events of settlements, each a message.
    Events(Run),
    /// So many that are one message.
    Array(Run),
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    count: usize,
    /// Of those events that carry one, by their place in the run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    traceparents: BTreeMap<usize, String>,
}

impl Run {
    fn add(&mut self, named: &Named, bytes: &mut Vec<u8>) {
        if let Some(traceparent) = &named.traceparent {
            self.traceparents.insert(self.count, traceparent.clone());
        }
        self.count += 1;
        bytes.extend(named.allocation_id.as_bytes());
    }

    /// Takes its names from the front of `bytes`.
    fn take(&self, bytes: &mut &[u8]) -> Result<Vec<Named>, String> {
        (0..self.count)
            .map(|place| {
                let (id, rest) = bytes.split_first_chunk::<16>().ok_or_else(cut_short)?;
                *bytes = rest;
                Ok(Named {
                    allocation_id: Uuid::from_bytes(*id),
                    traceparent: self.traceparents.get(&place).cloned(),
                })
            })
            .collect()
    }
}

/// # Errors
/// They can not be written: a fault of ours.
fn encode_named(publications: &[Publication], kept: &[Kept], source: &str) -> Result<Vec<u8>, StoreError> {
    let mut parts: Vec<Part<&str, &Properties>> = Vec::new();
    let mut rest = Vec::new();
    for (place, publication) in publications.iter().enumerate() {
        match kept.get(place) {
            Some(Kept::Event(named)) => {
                if !matches!(parts.last(), Some(Part::Events(_))) {
                    parts.push(Part::Events(Run::default()));
                }
                if let Some(Part::Events(run)) = parts.last_mut() {
                    run.add(named, &mut rest);
                }
            }
            Some(Kept::Array(names)) => {
                let mut run = Run::default();
                for named in names {
                    run.add(named, &mut rest);
                }
                parts.push(Part::Array(run));
            }
            Some(Kept::Whole) | None => {
                parts.push(Part::Whole(head(publication)));
                rest.extend(&publication.body);
            }
        }
    }
    let contents = serde_json::to_vec(&Contents { source, parts }).map_err(|error| unwritable(&error))?;
    let len = u32::try_from(contents.len()).map_err(|error| unwritable(&error))?;
    let mut bytes = Vec::with_capacity(4 + contents.len() + rest.len());
    bytes.extend(len.to_be_bytes());
    bytes.extend(contents);
    bytes.extend(rest);
    Ok(bytes)
}

/// What a row holds: publications, and in between what is made again.
pub(super) struct RowContent {
    source: String,
    parts: Vec<(Kept, Option<Publication>)>,
    notices: Vec<PartnerNotice>,
}

impl RowContent {
    fn read(format: i16, bytes: &[u8]) -> Result<Self, String> {
        if format == NOTICES {
            return Ok(Self {
                source: String::new(),
                parts: Vec::new(),
                notices: serde_json::from_slice(bytes)
                    .map_err(|error| format!("its notices can not be read: {error}"))?,
            });
        }
        if format != NAMED {
            let whole = decode(format, bytes)?.into_iter();
            return Ok(Self {
                source: String::new(),
                notices: Vec::new(),
                parts: whole.map(|publication| (Kept::Whole, Some(publication))).collect(),
            });
        }
        let (len, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut_short)?;
        let (contents, mut rest) = rest
            .split_at_checked(u32::from_be_bytes(*len) as usize)
            .ok_or_else(cut_short)?;
        let contents: Contents<String, Properties> =
            serde_json::from_slice(contents).map_err(|error| format!("its contents can not be read: {error}"))?;
        let mut parts = Vec::new();
        for part in contents.parts {
            match part {
                Part::Whole(head) => parts.push((Kept::Whole, Some(with_body(head, &mut rest)?))),
                Part::Events(run) => {
                    let names = run.take(&mut rest)?;
                    parts.extend(names.into_iter().map(|named| (Kept::Event(named), None)));
                }
                Part::Array(run) => parts.push((Kept::Array(run.take(&mut rest)?), None)),
            }
        }
        Ok(Self {
            source: contents.source,
            parts,
            notices: Vec::new(),
        })
    }

    /// The allocations whose records are needed.
    fn wanted(&self) -> Vec<Uuid> {
        let names = self.parts.iter().flat_map(|(kept, _)| kept.names());
        let ids: BTreeSet<Uuid> = names.map(|named| named.allocation_id).collect();
        ids.into_iter().collect()
    }

    /// `source` is that of the notices' events: the trigger that writes them knows none.
    fn publications(self, records: &HashMap<Uuid, Allocation>, source: &str) -> Result<Vec<Publication>, String> {
        let notices: Vec<_> = self.notices.iter().map(|notice| Ok(notice.event(source))).collect();
        let source = self.source;
        self.parts
            .into_iter()
            .map(|(kept, publication)| {
                publication
                    .or_else(|| kept::told_of(&kept, records, &source))
                    .ok_or_else(|| {
                        let ids: Vec<String> = kept
                            .names()
                            .iter()
                            .map(|named| named.allocation_id.to_string())
                            .collect();
                        format!(
                            "the record of what it tells of is not that of a settlement: {}",
                            ids.join(", ")
                        )
                    })
            })
            .chain(notices)
            .collect()
    }
}

/// Publications of rows, with what is named in them made again: one question for the records of all rows.
///
/// # Errors
/// The database is away or refuses. Of each row that can not be read, why.
pub(super) async fn made_again(
    session: &Session,
    rows: &[(i16, &[u8])],
    source: &str,
) -> Result<Vec<Result<Vec<Publication>, String>>, StoreError> {
    let held: Vec<Result<RowContent, String>> = rows
        .iter()
        .map(|(format, bytes)| RowContent::read(*format, bytes))
        .collect();
    let ids: BTreeSet<Uuid> = held.iter().flatten().flat_map(RowContent::wanted).collect();
    let ids: Vec<Uuid> = ids.into_iter().collect();
    let mut records = HashMap::new();
    if !ids.is_empty() {
        let sql = select_allocations("outbox::made_again", "WHERE a.id = ANY ($1)");
        for row in session.query(&sql, &[&ids]).await? {
            let record = allocation(session, &row)?;
            records.insert(record.id, record);
        }
    }
    let publications = |held: Result<RowContent, String>| held.and_then(|held| held.publications(&records, source));
    Ok(held.into_iter().map(publications).collect())
}

fn cut_short() -> String {
    "it is cut short".to_owned()
}

pub(super) fn unwritable(error: &dyn std::error::Error) -> StoreError {
    StoreError::ours(
        "outbox",
        format!("what is to be published or kept can not be written: {error}"),
    )
}

/// How many publications a stored row holds.
///
/// # Errors
/// It can not be read.
pub fn count_of_row(format: i16, bytes: &[u8]) -> Result<usize, String> {
    RowContent::read(format, bytes).map(|row| row.parts.len() + row.notices.len())
}

/// Of all of a row's publications.
type Heads = Vec<Head<String, Properties>>;

/// The heads, and the bodies end to end, or as much of them as there is.
fn parts(format: i16, bytes: &[u8]) -> Result<(Heads, &[u8]), String> {
    if format != FORMAT {
        return Err(format!(
            "it has format {format}; this version reads formats {FORMAT}, {NAMED} and {NOTICES}"
        ));
    }
    let (len, rest) = bytes.split_first_chunk::<4>().ok_or_else(cut_short)?;
    let (heads, bodies) = rest
        .split_at_checked(u32::from_be_bytes(*len) as usize)
        .ok_or_else(cut_short)?;
    let heads: Heads = serde_json::from_slice(heads).map_err(|error| format!("its heads can not be read: {error}"))?;
    Ok((heads, bodies))
}

/// The heads alone.
pub(super) fn heads(format: i16, bytes: &[u8]) -> Result<Heads, String> {
    parts(format, bytes).map(|(heads, _)| heads)
}

fn decode(format: i16, bytes: &[u8]) -> Result<Vec<Publication>, String> {
    let (heads, mut bodies) = parts(format, bytes)?;
    heads.into_iter().map(|head| with_body(head, &mut bodies)).collect()
}

/// Properties as stored beside a parked body.
pub(super) fn properties_text(properties: &Properties) -> Result<String, StoreError> {
    serde_json::to_string(properties).map_err(|error| unwritable(&error))
}

/// Reads what [`properties_text`] wrote, unless it is in a format that this version does not read.
pub(super) fn properties(row: &Row) -> Option<Properties> {
    (row.get::<_, i16>("format") == FORMAT)
        .then(|| serde_json::from_str(row.get("properties")).ok())
        .flatten()
}

const DELETE: &str = "/* outbox::delete */ DELETE FROM settled.outbox WHERE batch_id = ANY ($1)";

/// A batch's row: format, content, and how many events and dead letters it tells.
///
/// # Errors
/// They can not be written: a fault of ours.
pub(super) fn row(
    publications: &[Publication],
    kept: &[Kept],
    source: &str,
) -> Result<(i16, Vec<u8>, i32), StoreError> {
    let count: u64 = publications.iter().map(event::count_of).sum();
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    Ok((NAMED, encode_named(publications, kept, source)?, count))
}

/// The content of a row that holds one notice, and its format.
///
/// # Errors
/// It can not be written: a fault of ours.
pub(super) fn notice_row(notice: &PartnerNotice) -> Result<(i16, Vec<u8>), StoreError> {
    let content = serde_json::to_vec(&[notice]).map_err(|error| unwritable(&error))?;
    Ok((NOTICES, content))
}

/// Deletes rows whose publications are all confirmed. How many there still were does not matter: a relay may have been
/// quicker, or the commit that deleted them was not known to have succeeded.
pub(super) fn delete<'a>(ids: &[BatchId]) -> Write<'a> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    Write::unless(ids.is_empty(), DELETE, Rows::Any, params![ids])
}

/// A row whose lease had run out, now ours.
pub struct TakenRow {
    /// The row's own: to renew and to delete it by.
    pub row: BatchId,
    /// Whose publications these are.
    pub batch_id: BatchId,
    pub publications: Vec<Publication>,
    /// How long ago it was written.
    pub age: Duration,
}

/// How much is in the outbox.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backlog {
    pub rows: u64,
    pub publications: u64,
    pub oldest: Duration,
    /// Publications set aside because the broker refused them.
    pub refused: u64,
}

impl Store {
    /// Deletes confirmed rows in a statement of its own.
    ///
    /// # Errors
    /// The rows may still be there: ask again.
    pub async fn delete_published(&self, ids: &[BatchId]) -> Result<(), StoreError> {
        let session = self.session("delete_published").await?;
        session.pass(Point::BeforeOutboxDelete).await?;
        delete(ids).send(&session).await?;
        session.pass(Point::AfterOutboxDelete).await
    }

    /// Renews leases while their owner is still publishing.
    ///
    /// # Errors
    /// The leases may run out, and a relay publish the same again.
    pub async fn renew_leases(&self, ids: &[BatchId], lease: Duration) -> Result<(), StoreError> {
        self.session("renew_leases")
            .await?
            .execute(
                "/* outbox::renew_leases */
                UPDATE settled.outbox
                SET leased_until = clock_timestamp() + make_interval(secs => $2)
                WHERE batch_id = ANY ($1)",
                &[&ids, &lease.as_secs_f64()],
            )
            .await
            .map(drop)
    }

    /// Takes one row whose lease has run out, if there is one. `source` is that of events that are made only now.
    ///
    /// # Errors
    /// The database is away, or the row can not be read by this version.
    pub async fn take_abandoned(&self, lease: Duration, source: &str) -> Result<Option<TakenRow>, StoreError> {
        let session = self.session("take_abandoned").await?;
        let rows = session
            .query(
                "/* outbox::take_abandoned */
                UPDATE settled.outbox
                SET leased_until = clock_timestamp() + make_interval(secs => $1)
                WHERE batch_id = (
                    SELECT batch_id
                    FROM settled.outbox
                    WHERE leased_until < statement_timestamp()
                    ORDER BY created_at
                    LIMIT 1
                    FOR UPDATE SKIP LOCKED
                )
                RETURNING batch_id, of_batch, format, publications,
                          extract(epoch FROM clock_timestamp() - created_at)::float8 AS age",
                &[&lease.as_secs_f64()],
            )
            .await?;
        let Some(row) = rows.first() else {
            return Ok(None);
        };
        session.pass(Point::RelayTaken).await?;
        // What a worker left behind may be nowhere else yet; whoever commits after it waits for its standbys too.
        session.nobody_cut_its_wait()?;
        let own: Uuid = row.get("batch_id");
        let batch_id = row.get::<_, Option<Uuid>>("of_batch").unwrap_or(own);
        let stored = [(row.get("format"), row.get("publications"))];
        let made = made_again(&session, &stored, source)
            .await?
            .pop()
            .unwrap_or_else(|| Ok(Vec::new()));
        let publications = made.map_err(|why| {
            StoreError::new(
                "take_abandoned",
                Fate::Ours,
                format!("the outbox row {own} can not be read: {why}"),
            )
        })?;
        Ok(Some(TakenRow {
            row: own,
            batch_id,
            publications,
            age: Duration::from_secs_f64(row.get::<_, f64>("age").max(0.0)),
        }))
    }

    /// Sets publications aside that the broker refuses.
    ///
    /// # Errors
    /// They are still in the outbox row.
    pub async fn set_aside(&self, id: BatchId, publication: &Publication, refusal: &str) -> Result<(), StoreError> {
        self.session("set_aside")
            .await?
            .execute(
                "/* outbox::set_aside */
                INSERT INTO settled.outbox_refused (batch_id, format, publications, refusal)
                VALUES ($1, $2, $3, $4)
                ON CONFLICT (batch_id, digest) DO NOTHING",
                &[&id, &FORMAT, &encode(std::slice::from_ref(publication))?, &refusal],
            )
            .await
            .map(drop)
    }

    /// How many publications are set aside because the broker refused them, and since when; none where there are none.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn outbox_refused(&self) -> Result<Option<(i64, Timestamp)>, StoreError> {
        let rows = self
            .session("outbox_refused")
            .await?
            .query(
                "/* outbox::outbox_refused */ SELECT count(*), min(at) FROM settled.outbox_refused",
                &[],
            )
            .await?;
        Ok(rows
            .first()
            .and_then(|row| row.get::<_, Option<Timestamp>>(1).map(|oldest| (row.get(0), oldest))))
    }

    /// How much waits to be published.
    ///
    /// # Errors
    /// The database is away.
    pub async fn backlog(&self) -> Result<Backlog, StoreError> {
        let session = self.session("backlog").await?;
        let rows = session
            .query(
                "/* outbox::backlog */
                SELECT count(*), coalesce(sum(count), 0)::bigint,
                       coalesce(extract(epoch FROM clock_timestamp() - min(created_at)), 0)::float8,
                       (SELECT count(*) FROM settled.outbox_refused)
                FROM settled.outbox",
                &[],
            )
            .await?;
        let natural = |number: i64| u64::try_from(number).unwrap_or_default();
        let row = session.one(&rows)?;
        Ok(Backlog {
            rows: natural(row.get(0)),
            publications: natural(row.get(1)),
            oldest: Duration::from_secs_f64(row.get::<_, f64>(2).max(0.0)),
            refused: natural(row.get(3)),
        })
    }
}
