//! `settled roles`, and the SQL that mends a right that is missing.

use clap::Args;
use serde::Serialize;

use super::{Context, Exit, Failure, output::Mood};
use crate::{
    config::Settings,
    desk::{DatabaseRole, Desk, RoleStanding, grant_line, quoted, statements},
};

#[derive(Args)]
#[command(after_help = "\
The roles log in nowhere: make a login for each person and program, and a member of its role.
    CREATE ROLE worker_1 LOGIN PASSWORD '...' IN ROLE settled_worker;
Run it again after each `settled migrate`: what is new belongs to settled_owner then, and is granted.")]
pub(super) struct Roles {
    /// Make them, in one transaction, as a superuser or as the owner of the database who may create roles; without it the SQL
    /// is printed and nothing is done
    #[arg(long)]
    apply: bool,
    /// Also keep dead_letters.approve_above and dead_letters.approve_amounts, as they are set here, in the database: there nobody
    /// who acts can lower them
    #[arg(long)]
    two_people: bool,
}

/// As which role each command does its work with the database. What is not here asks no database, or needs no more than a
/// login.
pub(super) const COMMANDS: [(&str, DatabaseRole); 65] = [
    ("migrate", DatabaseRole::Owner),
    ("roles", DatabaseRole::Owner),
    ("partner move", DatabaseRole::Owner),
    ("simulate", DatabaseRole::Owner),
    ("demo", DatabaseRole::Owner),
    ("worker", DatabaseRole::Worker),
    ("doctor", DatabaseRole::Worker),
    ("dead-letters collect", DatabaseRole::Worker),
    ("dead-letters discard", DatabaseRole::Operator),
    ("dead-letters export", DatabaseRole::Operator),
    ("dead-letters groups", DatabaseRole::Operator),
    ("dead-letters list", DatabaseRole::Operator),
    ("dead-letters plan", DatabaseRole::Operator),
    ("dead-letters plan approve", DatabaseRole::Operator),
    ("dead-letters plan show", DatabaseRole::Operator),
    ("dead-letters purge", DatabaseRole::Operator),
    ("dead-letters replay", DatabaseRole::Operator),
    ("dead-letters restore", DatabaseRole::Operator),
    ("dead-letters runs cancel", DatabaseRole::Operator),
    ("dead-letters runs list", DatabaseRole::Operator),
    ("dead-letters runs resume", DatabaseRole::Operator),
    ("dead-letters runs show", DatabaseRole::Operator),
    ("dead-letters show", DatabaseRole::Operator),
    ("dead-letters stats", DatabaseRole::Operator),
    ("explain", DatabaseRole::Operator),
    ("nonce void", DatabaseRole::Operator),
    ("outbox list", DatabaseRole::Operator),
    ("outbox retry", DatabaseRole::Operator),
    ("recover", DatabaseRole::Operator),
    ("partner add", DatabaseRole::Registrar),
    ("partner set", DatabaseRole::Registrar),
    ("partner suspend", DatabaseRole::Registrar),
    ("partner resume", DatabaseRole::Registrar),
    ("partner quarantine", DatabaseRole::Registrar),
    ("key challenge", DatabaseRole::Registrar),
    ("key rotate", DatabaseRole::Registrar),
    ("key add", DatabaseRole::Registrar),
    ("key revoke", DatabaseRole::Registrar),
    ("key reinstate", DatabaseRole::Registrar),
    ("connection add", DatabaseRole::Registrar),
    ("currency map", DatabaseRole::Registrar),
    ("currency unmap", DatabaseRole::Registrar),
    ("client add", DatabaseRole::Registrar),
    ("token add", DatabaseRole::Registrar),
    ("token revoke", DatabaseRole::Registrar),
    ("deposit", DatabaseRole::Custody),
    ("withdraw", DatabaseRole::Custody),
    ("allocation reserve", DatabaseRole::Custody),
    ("partner list", DatabaseRole::Reader),
    ("key list", DatabaseRole::Reader),
    ("connection list", DatabaseRole::Reader),
    ("connection show", DatabaseRole::Reader),
    ("currency list", DatabaseRole::Reader),
    ("client list", DatabaseRole::Reader),
    ("token list", DatabaseRole::Reader),
    ("allocation show", DatabaseRole::Reader),
    ("receipt", DatabaseRole::Reader),
    ("timeline", DatabaseRole::Reader),
    ("ledger balances", DatabaseRole::Reader),
    ("api", DatabaseRole::Reader),
    ("ledger check", DatabaseRole::Auditor),
    ("reconcile", DatabaseRole::Auditor),
    ("audit list", DatabaseRole::Auditor),
    ("topology", DatabaseRole::Reader),
    ("topology export", DatabaseRole::Reader),
];

fn commands_of(role: DatabaseRole) -> Vec<&'static str> {
    let of_role = COMMANDS.iter().filter(|(_, of)| *of == role);
    of_role.map(|(command, _)| *command).collect()
}

pub(super) async fn run(context: &Context, wish: &Roles) -> Result<Exit, Failure> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        /// Whether it was done.
        applied: bool,
        roles: Vec<One>,
        statements: Vec<String>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct One {
        name: &'static str,
        purpose: &'static str,
        commands: Vec<&'static str>,
    }
    let limits = wish.two_people.then(|| Desk::limits_of(&context.settings.dead_letters));
    if wish.apply {
        Desk::open_as_owner(&context.settings)?
            .apply_roles(limits.as_ref())
            .await?;
    }
    let answer = Answer {
        applied: wish.apply,
        roles: DatabaseRole::ALL
            .into_iter()
            .map(|role| One {
                name: role.name(),
                purpose: role.purpose(),
                commands: commands_of(role),
            })
            .collect(),
        statements: statements(limits.as_ref()),
    };
    context.out.say(&answer, |out| {
        if !answer.applied {
            return out.write(&format!("BEGIN;\n{}\nCOMMIT;\n", answer.statements.join("\n")));
        }
        for role in &answer.roles {
            out.line(format!("{:18} {}", role.name, role.purpose))?;
            out.line(out.coloured(Mood::Dim, &format!("{:18} {}", "", role.commands.join(", "))))?;
        }
        Ok(())
    })?;
    Ok(Exit::Done)
}

/// Of what could not be done for lack of a right: the same with the SQL that gives it.
pub(super) async fn mended(failure: Failure, settings: &Settings, words: &str) -> Failure {
    let Some((_, role)) = COMMANDS.iter().find(|(command, _)| *command == words) else {
        return failure;
    };
    if *role == DatabaseRole::Owner {
        return failure.hint(
            "this is for the owner of the schema, or a member of settled_owner; the user who migrates first must be allowed \
             to create a schema in this database",
        );
    }
    let Ok(desk) = Desk::open(settings) else {
        return failure;
    };
    match desk.role_standing(*role).await {
        Ok(standing) => failure.hint(mending(*role, &standing)),
        // What can not be asked now is said by doctor.
        Err(_) => failure,
    }
}

fn mending(role: DatabaseRole, standing: &RoleStanding) -> String {
    let user = quoted(&standing.user);
    let grants = |to: &str| -> String {
        let lines = standing.missing.iter();
        let lines: Vec<String> = lines
            .map(|right| grant_line(&right.object, &right.privilege, to))
            .collect();
        lines.join(" ")
    };
    match (standing.exists, standing.is_member) {
        _ if standing.missing.is_empty() => format!(
            "this user may do what {role} does; what is missing is another right: the database's log has the statement"
        ),
        (true, true) => format!(
            "as the owner of the schema: {} (or `settled roles --apply`)",
            grants(role.name())
        ),
        (true, false) => format!("as the owner of the schema: GRANT {role} TO {user};"),
        (false, _) => format!(
            "`settled roles --apply` makes the role {role}; then GRANT {role} TO {user}; or, as the owner of the schema: {}",
            grants(&user)
        ),
    }
}
