//! Loads what a batch may touch, under locks.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::join;
use jiff::Timestamp;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    domain::{
        currency::Symbols,
        message::{Content, MessageRef},
        reason::Reason,
        receipt::{Receipt, ReceiptKey},
        signature::{PublicKey, Signer},
        snapshot::{KeyStanding, Parked, Partner, RegisteredKey, Snapshot, Whereabouts},
        verdict::VerdictKind,
    },
    fail::Point,
    store::{
        Session, StoreError,
        allocations::{allocation, select_allocations},
        row::{InOrder, corrupt},
        told,
    },
};

/// What a batch names, and so may touch. In order, each once.
#[derive(Debug, Default)]
struct Wanted<'a> {
    allocations: Vec<Uuid>,
    receipts: Vec<Uuid>,
    enterprises: BTreeSet<&'a str>,
    /// The keys that signed.
    signers: BTreeSet<&'a PublicKey>,
    /// A message that was parked is among them.
    has_parked: bool,
}

impl<'a> Wanted<'a> {
    fn of(batch: &[MessageRef<'a>]) -> Self {
        let mut wanted = Self::default();
        for content in contents(batch) {
            wanted.allocations.push(content.update.id);
            wanted.allocations.extend(&content.signed_ids);
            wanted.receipts.extend(content.receipt_keys().map(|key| key.0));
            wanted.enterprises.insert(&content.update.enterprise_id);
            if let Signer::Key(key) = &content.signer {
                wanted.signers.insert(key);
            }
        }
        for ids in [&mut wanted.allocations, &mut wanted.receipts] {
            ids.sort_unstable();
            ids.dedup();
        }
        wanted.has_parked = batch.iter().any(|message| message.delivery.source.is_parked());
        wanted
    }
}

fn contents<'a>(batch: &[MessageRef<'a>]) -> impl Iterator<Item = &'a Content> {
    batch.iter().filter_map(|message| message.facts.content.as_deref().ok())
}

/// The moment, the partners with their keys, whose the keys are that signed, and the partners' symbols, a row for all of one.
/// A key that signed for one partner may be another's. There is a row even where nobody is known, since there is a moment.
const LOAD_REGISTRY: &str = "\
    /* batch::load registry */
    SELECT date_trunc('milliseconds', n.moment) AS moment, p.enterprise_id, p.broker_user,
           p.suspended_at IS NOT NULL AS suspended, p.async_allocations, p.async_deallocations, k.public_key,
           k.revoked_at IS NOT NULL AS revoked, k.reinstated_at IS NOT NULL AS reinstated,
           NULL::text AS owner, NULL::boolean AS early, NULL::boolean AS expired,
           p.quarantined_at IS NOT NULL AS quarantined, p.moving IS NOT NULL AS is_moving, p.left_at IS NOT NULL AS has_left,
           NULL::text[] AS symbols, NULL::text[] AS currencies
    FROM (SELECT clock_timestamp() AS moment) AS n
    LEFT JOIN settled.partners AS p
      ON p.enterprise_id = ANY ($1)
    LEFT JOIN settled.partner_keys AS k
      ON k.enterprise_id = p.enterprise_id
     AND (k.revoked_at IS NOT NULL
       OR (k.valid_from <= clock_timestamp()
      AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())))
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, NULL, NULL, s.public_key, NULL, NULL,
           s.enterprise_id, s.valid_from > clock_timestamp(), coalesce(s.valid_until <= clock_timestamp(), false), NULL,
           NULL, NULL, NULL, NULL
    FROM settled.partner_keys AS s
    WHERE s.public_key = ANY ($2)
    UNION ALL
    SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, y.enterprise_id, NULL, NULL, NULL, NULL,
           NULL, array_agg(y.symbol), array_agg(y.currency)
    FROM settled.currency_symbols AS y
    WHERE y.enterprise_id = ANY ($1)
      AND y.until IS NULL
    GROUP BY y.enterprise_id";

/// What was refused because its key was revoked then. Asked only where a message is signed with a key that was reinstated;
/// after the keys, so that whatever was refused before that is seen.
const LOAD_DISTRUSTED: &str = "\
    /* batch::load distrusted */
    SELECT d.public_key, d.payload_digest
    FROM settled.distrusted AS d
    JOIN unnest($1::bytea[], $2::bytea[]) AS n (public_key, payload_digest)
      ON n.public_key = d.public_key
     AND n.payload_digest = d.payload_digest";

const LOAD_PARKED: &str = "\
    /* batch::load parked */
    SELECT key, seq, parked_at, until, attempts, also_reply
    FROM settled.parked
    WHERE key = ANY ($1)";

/// Where messages may be parked, one batch at a time counts and parks for a partner: others that counted at the same
/// moment would each fill the same room. In the order of the keys, so that two batches never wait for each other. What is
/// locked is a number of ours, since there may be no row yet; it goes with the transaction.
const LOCK_PARKING: &str = "\
    /* batch::load lock parking */
    SELECT pg_advisory_xact_lock(7236102, w.key)
    FROM (
        SELECT DISTINCT hashtext(w.enterprise_id) AS key
        FROM unnest($1::text[]) AS w (enterprise_id)
        ORDER BY key
    ) AS w";

const LOAD_PARKED_COUNTS: &str = "\
    /* batch::load parked counts */
    SELECT enterprise_id, count(*), sum(bytes)::bigint
    FROM settled.parked
    WHERE enterprise_id = ANY ($1)
    GROUP BY enterprise_id";

fn load_allocations(lock: bool) -> String {
    let rest = if lock {
        "WHERE a.id = ANY ($1) ORDER BY a.id FOR NO KEY UPDATE OF a"
    } else {
        "WHERE a.id = ANY ($1)"
    };
    select_allocations("batch::load allocations", rest)
}

fn load_receipts(lock: bool) -> String {
    let rest = if lock { "ORDER BY key FOR NO KEY UPDATE" } else { "" };
    format!(
        "/* batch::load receipts */
        SELECT key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
               public_key, first_seen, last_seen, voided_at IS NOT NULL
        FROM settled.receipts
        WHERE key = ANY ($1)
        {rest}"
    )
}

/// Loads what the batch may touch. Locks first, and the rest in later statements, so that they see what committed while
/// the locks were awaited. One round trip; a second one only where a message waits for its allocation, or names one that is
/// not there, since it may be parked: who parks is locked then, and the registry is loaded anew.
pub(super) async fn load(
    session: &Session,
    batch: &[MessageRef<'_>],
    patience: Option<Duration>,
) -> Result<Snapshot, StoreError> {
    let wanted = &Wanted::of(batch);
    let lock = patience.is_some();
    let (allocations, receipts) = (load_allocations(lock), load_receipts(lock));
    // What is asked together is prepared before, so that it leaves together and in its order on a fresh connection too.
    for sql in [&allocations, &receipts, LOAD_REGISTRY] {
        session.prepare(sql).await?;
    }
    let (allocation_ids, keys) = (&wanted.allocations, &wanted.receipts);
    let begin = async {
        if let Some(patience) = patience {
            session.begin_impatient(patience).await?;
            session.pass(Point::AfterBegin).await
        } else {
            session.begin_read_only().await
        }
    };
    let answers = join!(
        begin,
        async { session.query(&allocations, &[allocation_ids]).await },
        async { session.query(&receipts, &[keys]).await },
        load_registry(session, wanted),
    );
    answers.0?;
    let mut snapshot = Snapshot::default();
    for row in answers.1? {
        let allocation = allocation(session, &row)?;
        snapshot.allocations.insert(allocation.id, Arc::new(allocation));
    }
    for row in answers.2? {
        let (key, receipt) = receipt(session, &row)?;
        snapshot.receipts.insert(key, receipt);
    }
    let mut registry = answers.3?;
    // Who speaks of an allocation that is not there: the message may be parked.
    let unknown: BTreeSet<&str> = contents(batch)
        .filter(|content| !snapshot.allocations.contains_key(&content.update.id))
        .map(|content| content.update.enterprise_id.as_str())
        .collect();
    // Who is parked has a receipt that says so, and only who has locked that changes either.
    let waits = |receipt: &Receipt| receipt.verdict == VerdictKind::Parked;
    let nobody_parked = !wanted.has_parked && !snapshot.receipts.values().any(waits);
    if !session.skips(unknown.is_empty() && nobody_parked) {
        for sql in [LOCK_PARKING, LOAD_PARKED, LOAD_PARKED_COUNTS] {
            session.prepare(sql).await?;
        }
        let nobody_unknown = session.skips(unknown.is_empty());
        let enterprises: Vec<&str> = unknown.into_iter().collect();
        let answers = join!(
            async {
                if !lock || nobody_unknown {
                    return Ok(Vec::new());
                }
                session.query(LOCK_PARKING, &[&enterprises]).await
            },
            async {
                if nobody_unknown {
                    return Ok(None);
                }
                load_registry(session, wanted).await.map(Some)
            },
            async { session.query(LOAD_PARKED, &[keys]).await },
            async {
                if nobody_unknown {
                    return Ok(Vec::new());
                }
                session.query(LOAD_PARKED_COUNTS, &[&enterprises]).await
            },
        );
        answers.0?;
        if let Some(anew) = answers.1? {
            registry = anew;
        }
        snapshot.parked = parked(session, &answers.2?)?;
        for row in answers.3? {
            let count: i64 = row.get(1);
            let count = u64::try_from(count).map_err(|_| corrupt(session, "a number of parked messages"))?;
            snapshot.parked_counts.insert(row.get(0), count);
            let bytes: i64 = row.get(2);
            let bytes = u64::try_from(bytes).map_err(|_| corrupt(session, "a number of parked bytes"))?;
            snapshot.parked_bytes.insert(row.get(0), bytes);
        }
    }
    recall_newer(session, &mut snapshot).await?;
    snapshot.distrusted = load_distrusted(session, batch, &registry.reinstated).await?;
    snapshot.registered = registry.registered;
    snapshot.parked_bytes_of_all = session.parked_bytes;
    snapshot.partners = registry.partners;
    snapshot.now = registry.now;
    session.pass(Point::AfterLoad).await?;
    Ok(snapshot)
}

/// Who may speak, loaded after the locks.
struct Registry {
    now: Timestamp,
    partners: HashMap<String, Partner>,
    /// Keys that were revoked once and are not any more.
    reinstated: HashSet<PublicKey>,
    /// Whose the keys are that signed.
    registered: HashMap<PublicKey, RegisteredKey>,
}

async fn load_registry(session: &Session, wanted: &Wanted<'_>) -> Result<Registry, StoreError> {
    let enterprises: Vec<&str> = wanted.enterprises.iter().copied().collect();
    let signers: Vec<&[u8]> = wanted.signers.iter().map(|key| key.as_bytes().as_slice()).collect();
    let rows = session.query(LOAD_REGISTRY, &[&enterprises, &signers]).await?;
    let mut symbols = symbols(&rows);
    let mut registry = Registry {
        now: session.one(&rows)?.get("moment"),
        partners: HashMap::new(),
        reinstated: HashSet::new(),
        registered: HashMap::new(),
    };
    for row in &rows {
        let key = match row.get::<_, Option<&[u8]>>("public_key") {
            Some(bytes) => Some(public_key(session, bytes)?),
            None => None,
        };
        if let (Some(enterprise_id), Some(key)) = (row.get("owner"), key) {
            let standing = match (row.get("early"), row.get("expired")) {
                (true, _) => KeyStanding::Early,
                (false, true) => KeyStanding::Expired,
                (false, false) => KeyStanding::Valid,
            };
            registry.registered.insert(
                key,
                RegisteredKey {
                    enterprise_id,
                    standing,
                },
            );
        }
        let Some(enterprise_id) = row.get("enterprise_id") else {
            continue;
        };
        let partner = registry.partners.entry(enterprise_id).or_insert_with(|| Partner {
            broker_user: row.get("broker_user"),
            suspended: row.get("suspended"),
            quarantined: row.get("quarantined"),
            whereabouts: match (row.get("is_moving"), row.get("has_left")) {
                (false, _) => Whereabouts::Here,
                (true, false) => Whereabouts::OnItsWay,
                (true, true) => Whereabouts::Elsewhere,
            },
            symbols: symbols.remove(row.get::<_, &str>("enterprise_id")).unwrap_or_default(),
            async_allocations: row.get("async_allocations"),
            async_deallocations: row.get("async_deallocations"),
            keys: Vec::new(),
            revoked: Vec::new(),
        });
        let Some(key) = key else { continue };
        if row.get("revoked") {
            partner.revoked.push(key);
        } else {
            partner.keys.push(key);
            if row.get("reinstated") {
                registry.reinstated.insert(key);
            }
        }
    }
    Ok(registry)
}

/// What each partner calls the currencies.
fn symbols(rows: &[Row]) -> HashMap<String, Symbols> {
    let mut of_all = HashMap::new();
    for row in rows {
        if let (Some(owner), Some(symbols), Some(currencies)) = (
            row.get::<_, Option<String>>("owner"),
            row.get::<_, Option<Vec<String>>>("symbols"),
            row.get::<_, Option<Vec<String>>>("currencies"),
        ) {
            of_all.insert(owner, symbols.into_iter().zip(currencies).collect());
        }
    }
    of_all
}

fn parked(session: &Session, rows: &[Row]) -> Result<HashMap<ReceiptKey, Parked>, StoreError> {
    let mut parked = HashMap::new();
    for row in rows {
        let attempts: i32 = row.get("attempts");
        let waiting = Parked {
            seq: row.get("seq"),
            parked_at: row.get("parked_at"),
            until: row.get("until"),
            attempts: u32::try_from(attempts).map_err(|_| corrupt(session, "a number of attempts"))?,
            // What a later version wrote is best effort like every reply.
            also: row
                .get::<_, Option<&str>>("also_reply")
                .and_then(|text| serde_json::from_str(text).ok()),
        };
        parked.insert(ReceiptKey(row.get("key")), waiting);
    }
    Ok(parked)
}

/// Which of a batch's signed texts were refused because their key, reinstated since, was revoked.
async fn load_distrusted(
    session: &Session,
    batch: &[MessageRef<'_>],
    reinstated: &HashSet<PublicKey>,
) -> Result<HashSet<(PublicKey, [u8; 32])>, StoreError> {
    if session.skips(reinstated.is_empty()) {
        return Ok(HashSet::new());
    }
    let (keys, digests): (Vec<&[u8]>, Vec<&[u8]>) = contents(batch)
        .filter_map(|content| match &content.signer {
            Signer::Key(key) if reinstated.contains(key) => {
                Some((key.as_bytes().as_slice(), content.payload_digest.as_slice()))
            }
            Signer::Key(_) | Signer::Malformed(_) | Signer::Unrecoverable | Signer::Unread => None,
        })
        .unzip();
    if session.skips(keys.is_empty()) {
        return Ok(HashSet::new());
    }
    let mut distrusted = HashSet::new();
    for row in session.query(LOAD_DISTRUSTED, &[&keys, &digests]).await? {
        let digest = row.get::<_, &[u8]>(1).try_into();
        let digest = digest.map_err(|_| corrupt(session, "a digest"))?;
        distrusted.insert((public_key(session, row.get(0))?, digest));
    }
    Ok(distrusted)
}

/// Of receipts whose reason a newer version wrote: what that version told, so that it is told again. Asked only where there
/// are such.
async fn recall_newer(session: &Session, snapshot: &mut Snapshot) -> Result<(), StoreError> {
    let is_newer = |receipt: &&mut Receipt| receipt.reason.is_some_and(Reason::is_newer);
    let event_ids: Vec<Uuid> = snapshot
        .receipts
        .values_mut()
        .filter(is_newer)
        .map(|receipt| receipt.event_id)
        .collect();
    if session.skips(event_ids.is_empty()) {
        return Ok(());
    }
    let told = told::reasons(session, &event_ids).await?;
    for (key, receipt) in &mut snapshot.receipts {
        if let (Some(reason), Some((said, detail))) = (&mut receipt.reason, told.get(&receipt.event_id))
            && reason.as_str() == said.as_str()
        {
            *reason = *said;
            snapshot.newer_details.insert(*key, detail.clone());
        }
    }
    Ok(())
}

fn public_key(session: &Session, bytes: &[u8]) -> Result<PublicKey, StoreError> {
    PublicKey::stored(bytes).ok_or_else(|| corrupt(session, "a public key"))
}

/// Reads a row of [`load_receipts`], its key apart.
fn receipt(session: &Session, row: &Row) -> Result<(ReceiptKey, Receipt), StoreError> {
    let read = || {
        let mut column = InOrder::of(row);
        let key = ReceiptKey(column.take());
        // In the order of the SELECT.
        let receipt = Receipt {
            enterprise_id: column.take(),
            nonce: column.take(),
            payload_digest: column.take::<&[u8]>().try_into().ok()?,
            message_digest: column.take::<&[u8]>().try_into().ok()?,
            verdict: VerdictKind::parse(column.take())?,
            reason: column.take::<Option<&str>>().map(Reason::written),
            allocation_id: column.take(),
            event_id: column.take(),
            public_key: PublicKey::stored(column.take())?,
            first_seen: column.take(),
            last_seen: column.take(),
            voided: column.take(),
        };
        Some((key, receipt))
    };
    read().ok_or_else(|| corrupt(session, "a receipt"))
}
