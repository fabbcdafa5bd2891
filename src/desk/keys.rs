//! Partners' keys: one that takes the place of others, and what its owner signs to prove it.

use std::time::Duration;

use serde::Serialize;
use uuid::Uuid;

use super::{Desk, Refusal};
use crate::{
    domain::{
        calendar::{CalendarTime, rfc3339},
        signature::{KeyError, PublicKey},
    },
    store::registry::{
        By, Challenge, Challenged, KeyProof, KeyRecord, NewKey, Registered, Rotated, Rotation, Unproven,
    },
};

/// A key that is to take the place of a partner's others.
#[derive(Clone, Debug)]
pub struct KeyRotation {
    pub enterprise_id: String,
    pub public_key: PublicKey,
    /// How long the others go on counting.
    pub grace: Duration,
    pub valid_until: Option<CalendarTime>,
    pub proof: Option<String>,
}

/// What became of it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyRotated {
    /// `rotated`; `exists`: it was so before.
    pub result: &'static str,
    pub key: KeyRecord,
    /// The others that end earlier now.
    pub ending: Vec<KeyRecord>,
    /// The others that begin only when the grace is over, or later: they were left as they are.
    pub later: Vec<KeyRecord>,
}

/// Whether a key may be registered at all.
///
/// # Errors
/// Everybody can sign with it.
pub fn acceptable(key: PublicKey) -> Result<PublicKey, KeyError> {
    if key.is_trivial() {
        return Err(KeyError::Trivial);
    }
    Ok(key)
}

/// A key that is revoked does not come back by being added.
pub fn revoked(key: &KeyRecord) -> Refusal {
    let reinstate = format!(
        "settled key reinstate --enterprise-id {} --public-key {} --reason \"...\"",
        key.enterprise_id, key.public_key
    );
    let since = key.revoked_at.map(rfc3339).unwrap_or_default();
    Refusal::refused(format!(
        "key {} of {} was revoked at {since}, and adding it does not undo that; `{reinstate}` does; nothing was changed",
        key.public_key, key.enterprise_id
    ))
    .hint("if it may have been in wrong hands, register a new key instead")
}

/// A key belongs to one partner.
pub fn anothers(key: &KeyRecord) -> Refusal {
    Refusal::refused(format!(
        "the key belongs to partner {}; a key can not be of two partners",
        key.enterprise_id
    ))
    .hint("have the partner make a key of its own, which nobody else has")
}

/// Why a key is not taken without a proof, or with this one.
pub fn unproven(why: Unproven, enterprise_id: &str, key: PublicKey) -> Refusal {
    let ask = format!("settled key challenge --enterprise-id {enterprise_id} --public-key {key}");
    match why {
        Unproven::Missing => Refusal::usage(
            "registry.key_proof_required is on: a key is registered with --proof only; nothing was changed",
        )
        .hint(format!(
            "`{ask}` prints what its owner is to sign; give the signature as --proof"
        )),
        Unproven::NoChallenge => {
            Refusal::refused("there is nothing that this key was to sign, or not any more; nothing was changed")
                .hint(format!("`{ask}` prints it anew"))
        }
        Unproven::Wrong => Refusal::refused(
            "the proof is no signature of what this key was to sign, made with this key; nothing was changed",
        )
        .hint(format!(
            "its owner signs the very text that `{ask}` printed, as it signs payloads; asked again, it is another text"
        )),
    }
}

impl Desk {
    /// What shows that a key is its owner's, by what was given and what the settings want.
    pub fn proof(&self, signature: Option<String>) -> KeyProof {
        KeyProof {
            signature,
            required: self.settings.registry.key_proof_required,
        }
    }

    /// Registers a key; the partner's others end when the grace is over.
    ///
    /// # Errors
    /// The key will not do, is another's or revoked; there is no such partner; the database is away.
    pub async fn rotate_key(&self, wish: &KeyRotation, by: By<'_>) -> Result<KeyRotated, Refusal> {
        let public_key =
            acceptable(wish.public_key).map_err(|error| Refusal::usage(format!("--public-key: {error}")))?;
        let rotation = Rotation {
            new: NewKey {
                enterprise_id: wish.enterprise_id.clone(),
                public_key,
                valid_from: None,
                valid_until: wish.valid_until,
                proof: self.proof(wish.proof.clone()),
            },
            grace: wish.grace,
        };
        let registered = self
            .patiently(async || self.store.rotate_key(&rotation, by).await)
            .await?;
        let told = |result, Rotated { key, ending, later }| KeyRotated {
            result,
            key,
            ending,
            later,
        };
        match registered {
            Registered::Added(rotated) | Registered::Updated(rotated) => Ok(told("rotated", rotated)),
            Registered::Exists(rotated) => Ok(told("exists", rotated)),
            Registered::Conflict(rotated) => Err(anothers(&rotated.key)),
            Registered::Revoked(rotated) => Err(revoked(&rotated.key)),
            Registered::NoPartner => Err(Refusal::no_partner(&wish.enterprise_id)),
            Registered::NeverValid => Err(Refusal::usage("--valid-until is over; nothing was changed")
                .hint("leave it out, or name a time that is to come")),
            Registered::Unproven(why) => Err(unproven(why, &wish.enterprise_id, public_key)),
        }
    }

    /// What the owner of a key is to sign, made anew.
    ///
    /// # Errors
    /// The key will not do, or is another's; there is no such partner; the database is away.
    pub async fn challenge_key(
        &self,
        enterprise_id: &str,
        public_key: PublicKey,
        by: By<'_>,
    ) -> Result<Challenge, Refusal> {
        let key = acceptable(public_key).map_err(|error| Refusal::usage(format!("--public-key: {error}")))?;
        let lasts = self.settings.registry.key_challenge_lasts;
        let made = self
            .patiently(async || {
                let salt = Uuid::new_v4();
                self.store.challenge_key(enterprise_id, key, salt, lasts, by).await
            })
            .await?;
        match made {
            Challenged::Made(challenge) => Ok(challenge),
            Challenged::Conflict(key) => Err(anothers(&key)),
            Challenged::NoPartner => Err(Refusal::no_partner(enterprise_id)),
        }
    }
}
