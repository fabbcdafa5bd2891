//! The database's roles: what they are, and what of them is missing.

use uuid::Uuid;

use super::{Desk, Refusal};
use crate::{
    config::{Secret, Settings},
    store::{
        self,
        approvals::ApprovalLimits,
        roles::{DatabaseRole, RoleFound, RoleStanding},
    },
};

/// A login that a program made for a while.
#[derive(Clone, Debug)]
pub struct MadeLogin {
    pub name: String,
    /// The desk's own, with this login.
    pub database_url: Secret,
}

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

    /// Makes a login of a new name that begins so, a member of these roles and of nothing else, and sees that the server lets it
    /// in. Where it does not, it is taken away again.
    ///
    /// # Errors
    /// The database is away; the user may not make logins; the server does not let it in.
    pub async fn make_login(&self, begins: &str, roles: &[DatabaseRole]) -> Result<MadeLogin, Refusal> {
        let chance = Uuid::new_v4().simple().to_string();
        let name = format!("{begins}_{}", chance.get(..8).unwrap_or(&chance));
        let password = Uuid::new_v4().simple().to_string();
        self.store.make_login(&name, &password, roles).await?;
        let database_url = Secret::new(store::with_login(self.settings.database.url.expose(), &name, &password));
        let mut settings = self.settings.clone();
        settings.database.url = database_url.clone();
        let let_in = async {
            let there = Self::open(&settings)?;
            for role in roles {
                let standing = there.role_standing(*role).await?;
                if !standing.is_member || standing.user != name {
                    return Err(Refusal::ours(format!("the server takes {name} for {}", standing.user)));
                }
            }
            Ok(())
        };
        if let Err(refusal) = let_in.await {
            self.drop_login(&name).await?;
            return Err(refusal);
        }
        Ok(MadeLogin { name, database_url })
    }

    /// Takes such a login away.
    ///
    /// # Errors
    /// The database is away, or refuses.
    pub async fn drop_login(&self, name: &str) -> Result<(), Refusal> {
        Ok(self.store.drop_login(name).await?)
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
