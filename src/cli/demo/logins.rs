//! Who does what with the demo's database: a worker that owns nothing, and whoever registers and reserves, each with a login of
//! its own, as a deployment has them.

use super::Teller;
use crate::{
    cli::{Context, Failure},
    config::Secret,
    desk::{DatabaseRole, Desk, MadeLogin, Refusal},
};

pub(super) struct Logins {
    desk: Desk,
    /// What the demo was given: it migrates, and adds up at the end.
    given: Secret,
    /// None where the given one does everything.
    made: Option<Made>,
}

struct Made {
    worker: MadeLogin,
    registrar: MadeLogin,
}

impl Logins {
    /// Makes the roles and two logins. Where that is not allowed, as on some managed servers, it says so, and all is done with the
    /// login that was given.
    pub(super) async fn make(context: &Context, teller: &Teller) -> Result<Self, Failure> {
        let desk = context.desk()?;
        let made = match made(&desk).await {
            Ok(made) => {
                teller.say(&format!(
                    "the worker logs in as {}, a member of settled_worker, which owns nothing;",
                    made.worker.name
                ));
                teller.say(&format!("  {} registers partners and reserves", made.registrar.name));
                Some(made)
            }
            Err(refusal) => {
                teller.say(
                    "no logins can be made here, so the one that was given does everything, the worker's part too:",
                );
                teller.say(&format!("  {}", refusal.message));
                None
            }
        };
        Ok(Self {
            desk,
            given: context.settings.database_url()?.clone(),
            made,
        })
    }

    /// Where the worker finds its database.
    pub(super) fn works(&self) -> &Secret {
        self.made.as_ref().map_or(&self.given, |made| &made.worker.database_url)
    }

    /// Where whoever registers and reserves finds it.
    pub(super) fn registers(&self) -> &Secret {
        self.made
            .as_ref()
            .map_or(&self.given, |made| &made.registrar.database_url)
    }

    /// Takes the logins away again. The roles stay with the tables that they have rights on; nobody logs in as one.
    pub(super) async fn forget(&self, teller: &Teller) {
        for login in self.made.iter().flat_map(|made| [&made.worker, &made.registrar]) {
            if let Err(refusal) = self.desk.drop_login(&login.name).await {
                teller.alarm(&format!("the login {} is still there: {}", login.name, refusal.message));
            }
        }
    }
}

async fn made(desk: &Desk) -> Result<Made, Refusal> {
    desk.apply_roles(None).await?;
    let worker = desk.make_login("settled_demo_worker", &[DatabaseRole::Worker]).await?;
    let roles = [DatabaseRole::Registrar, DatabaseRole::Custody];
    match desk.make_login("settled_demo_registrar", &roles).await {
        Ok(registrar) => Ok(Made { worker, registrar }),
        Err(refusal) => {
            desk.drop_login(&worker.name).await?;
            Err(refusal)
        }
    }
}
