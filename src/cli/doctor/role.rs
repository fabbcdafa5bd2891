//! The lines about one role of the database.

use super::Check;
use crate::{
    cli::Failure,
    config::Settings,
    desk::{DatabaseRole, Desk, MissingRight, RoleFound, grant_line},
};

pub(super) async fn checks(settings: &Settings, role: DatabaseRole) -> Vec<Check> {
    let asked = async { Desk::open(settings)?.role(role).await };
    let (found, standing) = match asked.await {
        Err(refusal) => return vec![Check::failed("database", &Failure::from(refusal))],
        Ok(None) => {
            return vec![
                Check::bad("role", format!("there is no role {role}")).hint("`settled roles --apply` makes it"),
            ];
        }
        Ok(Some(answer)) => answer,
    };
    let mut checks = vec![standing_of(role, &found)];
    checks.push(if standing.missing.is_empty() {
        Check::good("grants", format!("{role} may do what it is for: {}", role.purpose()))
    } else {
        Check::bad("grants", format!("{role} lacks {}", listed(&standing.missing)))
            .hint(mending(role, &standing.missing))
    });
    if role != DatabaseRole::Owner && !found.is_superuser {
        checks.push(if found.more.is_empty() {
            Check::good("least", format!("{role} may do nothing else to tables and functions"))
        } else {
            Check::bad(
                "least",
                format!("{role} may do more than it needs: {}", listed(&found.more)),
            )
            .hint("`settled roles --apply` takes it away, unless it is everybody's (PUBLIC) or another role's")
        });
    }
    checks
}

/// What makes every grant idle.
fn standing_of(role: DatabaseRole, found: &RoleFound) -> Check {
    const NAME: &str = "role";
    let owner = role == DatabaseRole::Owner;
    let wrong: Vec<&str> = [
        (found.is_superuser, "it is a superuser"),
        (
            found.is_mighty && !owner,
            "it may make roles or databases, replicate, or pass by row security",
        ),
        (
            found.owns_tables && !owner,
            "it owns tables, or is a member of who does",
        ),
        (!found.owns_tables && owner, "it owns no table"),
    ]
    .into_iter()
    .filter_map(|(is_so, what)| is_so.then_some(what))
    .collect();
    if !wrong.is_empty() {
        return Check::bad(NAME, format!("{role}: {}", wrong.join("; "))).hint(if owner {
            "`settled roles --apply` as a superuser or as the owner of the tables"
        } else {
            "with that it could switch off what refuses change: take it away"
        });
    }
    let line = Check::good(NAME, format!("{role} is there"));
    line.noting(
        found
            .can_login
            .then(|| "it can log in: let its members do that, each under a name of its own".to_owned()),
    )
}

fn listed(rights: &[MissingRight]) -> String {
    let rights: Vec<String> = rights.iter().map(ToString::to_string).collect();
    rights.join(", ")
}

fn mending(role: DatabaseRole, missing: &[MissingRight]) -> String {
    let lines: Vec<String> = missing
        .iter()
        .map(|right| grant_line(&right.object, &right.privilege, role.name()))
        .collect();
    format!("`settled roles --apply`, or: {}", lines.join(" "))
}
