//! The database's roles: what they are, and what of them is missing.

use super::{Desk, Refusal};
use crate::{
    config::Settings,
    store::{
        approvals::ApprovalLimits,
        roles::{DatabaseRole, RoleFound, RoleStanding},
    },
};

impl Desk {
    /// The desk of the database as `settled migrate` reaches it; it is not connected yet.
    ///
    /// # Errors
    /// A setting of the database is missing or wrong.
    pub fn open_as_owner(settings: &Settings) -> Result<Self, Refusal> {
        let mut settings = settings.clone();
        if !settings.database.migrate_url.is_empty() {
            settings.database.url = settings.database.migrate_url.clone();
        }
        Self::open(&settings)
    }

    /// Makes the roles what they are; and with limits, keeps in the database what takes two people.
    ///
    /// # Errors
    /// The database is away; its schema is not the one that this program is written for; the user may not do it.
    pub async fn apply_roles(&self, limits: Option<&ApprovalLimits>) -> Result<(), Refusal> {
        self.check_schema().await?;
        Ok(self.store.apply_roles(limits).await?)
    }

    /// How whoever is logged in stands to a role.
    ///
    /// # Errors
    /// The database is away.
    pub async fn role_standing(&self, role: DatabaseRole) -> Result<RoleStanding, Refusal> {
        Ok(self.store.role_standing(role, false).await?)
    }

    /// A role by itself, and what it lacks; None where it is not there.
    ///
    /// # Errors
    /// The database is away.
    pub async fn role(&self, role: DatabaseRole) -> Result<Option<(RoleFound, RoleStanding)>, Refusal> {
        let Some(found) = self.store.role_found(role).await? else {
            return Ok(None);
        };
        Ok(Some((found, self.store.role_standing(role, true).await?)))
    }
}
