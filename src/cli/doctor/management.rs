//! What only the broker's management API shows, a line each; or a line that says that it was not asked.

use std::time::Duration;

use super::Check;
use crate::{
    broker::{
        management::{Management, ManagementError},
        topology::{self, DeadLettering},
    },
    config::Settings,
};

const NAME: &str = "management";

/// The broker counts once in five seconds: what still waits after this is not on its way.
const LOOKS: u32 = 4;
const LOOK: Duration = Duration::from_secs(3);

pub(super) async fn lines(settings: &Settings, own: &[String], hidden: Option<&str>) -> Vec<Check> {
    let management = match Management::from_settings(settings) {
        Err(error) => return vec![failed(&error)],
        Ok(None) => {
            return vec![
                Check::good(
                    NAME,
                    "not asked: bindings, policies and what waits at the broker to be dead-lettered were not looked at",
                )
                .hint("set broker.management_url (SETTLED_BROKER_MANAGEMENT_URL) where the broker has the management plugin"),
            ];
        }
        Ok(Some(management)) => management,
    };
    let asked = async {
        Ok::<_, ManagementError>((
            topology::seen(&management, own, hidden).await?,
            waiting(&management).await?,
        ))
    };
    let (findings, waiting) = match asked.await {
        Err(error) => return vec![failed(&error)],
        Ok(found) => found,
    };
    let mut lines = vec![Check::good(NAME, "it answers"), dead_lettering(&waiting)];
    lines.extend(findings.into_iter().map(|finding| Check {
        ok: finding.problem.is_none(),
        detail: finding.problem.unwrap_or_else(|| "as it should be".to_owned()),
        name: finding.object,
        hint: finding.hint,
    }));
    lines
}

fn failed(error: &ManagementError) -> Check {
    let hint = match error {
        ManagementError::Away(_) => "is the plugin rabbitmq_management on, and broker.management_url right?",
        ManagementError::Refused(_) | ManagementError::Missing(_) => {
            "give the user the tag `monitoring` (rabbitmqctl set_user_tags) and a permission on the virtual host"
        }
        ManagementError::Config(_) => "mend the setting, or leave it empty: then the API is not asked",
    };
    Check::bad(NAME, error.to_string()).hint(hint)
}

async fn waiting(management: &Management) -> Result<Vec<DeadLettering>, ManagementError> {
    let mut look = 1;
    loop {
        let waiting = topology::waiting(management).await?;
        if look == LOOKS || waiting.iter().all(|one| one.messages == 0) {
            return Ok(waiting);
        }
        look += 1;
        tokio::time::sleep(LOOK).await;
    }
}

fn dead_lettering(waiting: &[DeadLettering]) -> Check {
    const NAME: &str = "broker_dead_letters";
    let stuck: Vec<String> = waiting
        .iter()
        .filter(|one| one.messages > 0)
        .map(|one| format!("{} of {}", one.messages, one.queue))
        .collect();
    if stuck.is_empty() {
        return Check::good(NAME, "nothing waits at the broker to be dead-lettered");
    }
    Check::bad(
        NAME,
        format!("waiting at the broker to be dead-lettered: {}", stuck.join(", ")),
    )
    .hint(
        "the broker publishes them to the queue's dead-letter exchange, every three minutes until that confirms: it must be \
         there and lead to a queue that is not full, and nothing in a message's headers may stop it (the broker's log says so)",
    )
}
