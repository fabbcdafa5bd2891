//! Logins that a program makes for itself and takes away again.

use super::{DatabaseRole, quoted};
use crate::store::{Session, Store, StoreError};

/// How long a login is let in. Who made it takes it away; where that was killed, nobody comes in with it after this.
const LASTS: &str = "1 hour";

impl Store {
    /// Makes a login that is a member of these roles and of nothing else, for an hour at most.
    ///
    /// # Errors
    /// The database is away, or this user may not make one.
    pub async fn make_login(&self, login: &str, password: &str, roles: &[DatabaseRole]) -> Result<(), StoreError> {
        let session = self.session("make_login").await?;
        let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
        let rows = session
            .query(
                // A utility statement takes no parameters.
                "/* logins::make_login */
                SELECT format(
                           'CREATE ROLE %I LOGIN PASSWORD %L VALID UNTIL %L IN ROLE %s', $1::text, $2::text,
                           clock_timestamp() + $3::text::interval,
                           (SELECT string_agg(quote_ident(r.name), ', ') FROM unnest($4::text[]) AS r (name))
                       )",
                &[&login, &password, &LASTS, &names],
            )
            .await?;
        done(&session, "make_login", &session.one(&rows)?.get::<_, String>(0)).await
    }

    /// Takes a login away that owns nothing.
    ///
    /// # Errors
    /// The database is away, or refuses.
    pub async fn drop_login(&self, login: &str) -> Result<(), StoreError> {
        let session = self.session("drop_login").await?;
        done(
            &session,
            "drop_login",
            &format!("DROP ROLE IF EXISTS {}", quoted(login)),
        )
        .await
    }
}

async fn done(session: &Session, what: &str, statement: &str) -> Result<(), StoreError> {
    let sql = format!("/* logins::{what} */ {statement}");
    session.ask(session.client()?.batch_execute(&sql)).await
}
