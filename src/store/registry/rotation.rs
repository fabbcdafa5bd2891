//! One key after another: the new one with the old ones' grace, what its owner signs to prove it, when keys end, and when
//! each was used last.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    By, Registered,
    keys::{KEY_COLUMNS, KeyRecord, NewKey, Registering, about_key, key, outcome_of, register},
    note,
};
use crate::{
    domain::{
        calendar::{CalendarTime, rfc3339},
        notice::PartnerNotice,
        signature::{PublicKey, key_challenge},
    },
    store::{Store, StoreError, outbox::notice_row, time::time},
};

/// A key that takes the place of others.
#[derive(Clone, Debug)]
pub struct Rotation {
    pub new: NewKey,
    /// How long the others go on counting, at most.
    pub grace: Duration,
}

/// The new key, the partner's other keys that end earlier now, and those that begin only afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rotated {
    pub key: KeyRecord,
    pub ending: Vec<KeyRecord>,
    pub later: Vec<KeyRecord>,
}

/// What the owner of a key is to sign.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Challenge {
    pub enterprise_id: String,
    pub public_key: String,
    pub challenge: String,
    #[serde(serialize_with = "time")]
    pub expires_at: Timestamp,
}

/// What came of asking for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Challenged {
    Made(Challenge),
    /// The key is another partner's.
    Conflict(KeyRecord),
    NoPartner,
}

/// A partner that has no valid key any more from then on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndingPartner {
    pub enterprise_id: String,
    pub ends_at: CalendarTime,
    /// The key that ends then, as hex; of several the smallest.
    pub public_key: String,
    pub registered_at: Timestamp,
}

impl EndingPartner {
    fn notice(&self) -> PartnerNotice {
        PartnerNotice::KeyEnding {
            enterprise_id: self.enterprise_id.clone(),
            public_key: self.public_key.clone(),
            ends_at: self.ends_at.timestamp(),
            registered_at: self.registered_at,
        }
    }
}

impl Store {
    /// Registers a key that takes the place of the partner's others: those end when the grace is over, unless they end
    /// earlier anyway. One that begins only then was registered to come after all of them, and is left, and told. Said again it
    /// changes nothing.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn rotate_key(&self, wish: &Rotation, by: By<'_>) -> Result<Registered<Rotated>, StoreError> {
        let session = self.session("rotate_key").await?;
        session.begin().await?;
        let Rotation { new, grace } = wish;
        // Two at once would each end the other's.
        let known = session
            .query(
                "/* registry::rotate_key partner */
                SELECT clock_timestamp(),
                       date_trunc('milliseconds', clock_timestamp()) + make_interval(secs => $2)
                FROM settled.partners
                WHERE enterprise_id = $1
                FOR NO KEY UPDATE",
                &[&new.enterprise_id, &grace.as_secs_f64()],
            )
            .await?;
        let Some(row) = known.first() else {
            session.rollback().await;
            return Ok(Registered::NoPartner);
        };
        let (now, end): (CalendarTime, Timestamp) = (row.get(0), row.get(1));
        let Registering { came, earlier } = match register(&session, new, now).await {
            Ok(registering) => registering,
            Err(error) => {
                session.rollback().await;
                return Err(error);
            }
        };
        let (Registered::Added(stored) | Registered::Updated(stored) | Registered::Exists(stored)) = &came else {
            session.rollback().await;
            return Ok(came.map(|key| Rotated {
                key,
                ending: Vec::new(),
                later: Vec::new(),
            }));
        };
        let rows = session
            .query(
                &format!(
                    "/* registry::rotate_key others */
                    UPDATE settled.partner_keys AS k
                    SET valid_until = $3
                    WHERE k.enterprise_id = $1
                      AND k.public_key <> $2
                      AND k.revoked_at IS NULL
                      AND k.valid_from < $3
                      AND (k.valid_until IS NULL OR k.valid_until > $3)
                    RETURNING {KEY_COLUMNS}"
                ),
                &[&new.enterprise_id, &new.public_key.as_bytes().as_slice(), &end],
            )
            .await?;
        let mut ending: Vec<KeyRecord> = rows.iter().map(key).collect();
        ending.sort_by(|left, right| left.public_key.cmp(&right.public_key));
        let rows = session
            .query(
                &format!(
                    "/* registry::rotate_key later */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys AS k
                    WHERE k.enterprise_id = $1
                      AND k.public_key <> $2
                      AND k.revoked_at IS NULL
                      AND k.valid_from >= $3
                    ORDER BY k.valid_from, k.public_key"
                ),
                &[&new.enterprise_id, &new.public_key.as_bytes().as_slice(), &end],
            )
            .await?;
        let rotated = Rotated {
            key: stored.clone(),
            ending,
            later: rows.iter().map(key).collect(),
        };
        if matches!(came, Registered::Exists(_)) && rotated.ending.is_empty() {
            session.rollback().await;
            return Ok(Registered::Exists(rotated));
        }
        let mut outcome = outcome_of(stored, earlier.as_ref());
        let names: Vec<&str> = rotated.ending.iter().map(|key| key.public_key.as_str()).collect();
        outcome["ending"] = json!(names);
        outcome["endingAt"] = json!(rfc3339(end));
        note(&session, by, "key rotate", &about_key(stored), &outcome).await?;
        session.commit().await?;
        Ok(match came {
            Registered::Added(_) => Registered::Added(rotated),
            // The others end earlier now, if nothing else.
            _ => Registered::Updated(rotated),
        })
    }

    /// Makes what the owner of a key is to sign, in place of what was made for it before. `salt` is drawn for this once.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn challenge_key(
        &self,
        enterprise_id: &str,
        public_key: PublicKey,
        salt: Uuid,
        lasts: Duration,
        by: By<'_>,
    ) -> Result<Challenged, StoreError> {
        let session = self.session("challenge_key").await?;
        session.begin().await?;
        let bytes = public_key.as_bytes().as_slice();
        let rows = session
            .query(
                "/* registry::challenge_key partner */
                SELECT date_trunc('milliseconds', clock_timestamp()) + make_interval(secs => $2)
                FROM settled.partners
                WHERE enterprise_id = $1
                FOR KEY SHARE",
                &[&enterprise_id, &lasts.as_secs_f64()],
            )
            .await?;
        let Some(expires_at) = rows.first().map(|row| row.get::<_, Timestamp>(0)) else {
            session.rollback().await;
            return Ok(Challenged::NoPartner);
        };
        let rows = session
            .query(
                &format!(
                    "/* registry::challenge_key key */
                    SELECT {KEY_COLUMNS}
                    FROM settled.partner_keys AS k
                    WHERE k.public_key = $1
                      AND k.enterprise_id <> $2"
                ),
                &[&bytes, &enterprise_id],
            )
            .await?;
        if let Some(anothers) = rows.first().map(key) {
            session.rollback().await;
            return Ok(Challenged::Conflict(anothers));
        }
        let challenge = key_challenge(enterprise_id, public_key, salt, expires_at);
        session
            .execute(
                "/* registry::challenge_key */
                INSERT INTO settled.key_challenges (enterprise_id, public_key, challenge, expires_at)
                VALUES ($1, $2, $3, $4)
                ON CONFLICT (enterprise_id, public_key) DO UPDATE
                SET challenge = excluded.challenge,
                    expires_at = excluded.expires_at",
                &[&enterprise_id, &bytes, &challenge, &expires_at],
            )
            .await?;
        let about = json!({"enterpriseId": enterprise_id, "publicKey": public_key.to_hex()});
        let outcome = json!({"expiresAt": rfc3339(expires_at)});
        note(&session, by, "key challenge", &about, &outcome).await?;
        session.commit().await?;
        Ok(Challenged::Made(Challenge {
            enterprise_id: enterprise_id.to_owned(),
            public_key: public_key.to_hex(),
            challenge,
            expires_at,
        }))
    }

    /// Active partners that have no valid key any more within this time, as far as keys are registered now; those that have
    /// none now are not among them, nor those that left to another cell, which speaks for them.
    ///
    /// # Errors
    /// The database is away.
    pub async fn keys_ending(&self, within: Duration) -> Result<Vec<EndingPartner>, StoreError> {
        let rows = self
            .session("keys_ending")
            .await?
            .query(
                "/* registry::keys_ending */
                SELECT p.enterprise_id, max(k.valid_until) AS ends_at,
                       (array_agg(k.public_key ORDER BY k.valid_until DESC, k.public_key))[1] AS public_key,
                       (array_agg(k.created_at ORDER BY k.valid_until DESC, k.public_key))[1] AS registered_at
                FROM settled.partners AS p
                JOIN settled.partner_keys AS k ON k.enterprise_id = p.enterprise_id
                WHERE p.suspended_at IS NULL
                  AND p.left_at IS NULL
                  AND k.revoked_at IS NULL
                  AND (k.valid_until IS NULL OR k.valid_until > clock_timestamp())
                GROUP BY p.enterprise_id
                HAVING count(*) = count(k.valid_until)
                   AND max(k.valid_until) <= clock_timestamp() + make_interval(secs => $1)
                ORDER BY ends_at, p.enterprise_id",
                &[&within.as_secs_f64()],
            )
            .await?;
        Ok(rows
            .iter()
            .map(|row| EndingPartner {
                enterprise_id: row.get(0),
                ends_at: row.get(1),
                public_key: hex::encode(row.get::<_, &[u8]>(2)),
                registered_at: row.get(3),
            })
            .collect())
    }

    /// Puts the event that its last key ends into the outbox for each of these partners, for a relay. The row bears the event's
    /// id, so that of several workers the first does it, as long as the event is not published.
    ///
    /// # Errors
    /// The database is away or refuses; nothing of it will be told, unless `at_commit` says that it is unknown.
    pub async fn tell_keys_ending(&self, partners: &[EndingPartner]) -> Result<(), StoreError> {
        let Some(first) = partners.first() else {
            return Ok(());
        };
        let (format, _) = notice_row(&first.notice())?;
        let mut ids = Vec::new();
        let mut contents = Vec::new();
        for partner in partners {
            let notice = partner.notice();
            ids.push(notice.event_id());
            contents.push(notice_row(&notice)?.1);
        }
        self.session("tell_keys_ending")
            .await?
            .execute(
                // In order of ids, so that two workers never wait for each other.
                "/* registry::tell_keys_ending */
                INSERT INTO settled.outbox (batch_id, format, publications, count, created_at, leased_until)
                SELECT n.id, $3::smallint, n.content, 1, clock_timestamp(), clock_timestamp()
                FROM unnest($1::uuid[], $2::bytea[]) AS n (id, content)
                ORDER BY n.id
                ON CONFLICT (batch_id) DO NOTHING",
                &[&ids, &contents, &format],
            )
            .await
            .map(drop)
    }

    /// Writes down that these keys proved messages, each so long ago.
    ///
    /// # Errors
    /// The database is away or refuses: they may be told again.
    pub async fn note_key_uses(&self, uses: &[(PublicKey, Duration)]) -> Result<(), StoreError> {
        if uses.is_empty() {
            return Ok(());
        }
        let keys: Vec<&[u8]> = uses.iter().map(|(key, _)| key.as_bytes().as_slice()).collect();
        let ago: Vec<f64> = uses.iter().map(|(_, ago)| ago.as_secs_f64()).collect();
        self.session("note_key_uses")
            .await?
            .execute(
                // In key order, so that two workers never wait for each other.
                "/* registry::note_key_uses */
                INSERT INTO settled.key_uses AS u (public_key, last_used_at)
                SELECT k.public_key,
                       date_trunc('milliseconds', statement_timestamp() - make_interval(secs => n.ago))
                FROM unnest($1::bytea[], $2::float8[]) AS n (public_key, ago)
                JOIN settled.partner_keys AS k ON k.public_key = n.public_key
                ORDER BY k.public_key
                ON CONFLICT (public_key) DO UPDATE
                SET last_used_at = greatest(u.last_used_at, excluded.last_used_at)",
                &[&keys, &ago],
            )
            .await
            .map(drop)
    }
}
