//! `settled partner`.

use clap::{ArgAction, ArgGroup, Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::{
    Note,
    moving::{MovePartner, move_partner},
    own_queue::Removal,
    tell, times, unknown_partner, why,
};
use crate::{
    broker::{own_exchange, own_queue},
    cli::{
        Context, Exit, Failure, bounded,
        dead_letters::acts::Operator,
        enterprise_id,
        output::{complain, yes_no},
    },
    desk::PartnerAct,
    domain::calendar::rfc3339,
    store::registry::{By, FieldChanges, NewPartner, PartnerRecord, PartnerWish, Registered},
};

#[derive(Subcommand)]
pub(in crate::cli) enum PartnerCommand {
    /// Register a partner; with the same content again it is left as it is
    Add(AddPartner),
    /// Change what is registered of a partner
    Set(SetPartner),
    /// Refuse its updates from now on (`partner_inactive`)
    Suspend(OnePartner),
    /// Hold its messages from now on instead of judging them; what waits for a reservation waits on, its deadline stopped
    Quarantine(QuarantinedPartner),
    /// Take its updates again, suspended or in quarantine; what was held is judged now, oldest first
    Resume(OnePartner),
    /// Move it to another cell, with everything that was ever said of it
    Move(MovePartner),
    /// Every partner
    List,
}

#[derive(Args)]
pub(in crate::cli) struct AddPartner {
    /// The partner's enterprise, as it stands in its routing keys
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// What people call it
    #[arg(long, allow_hyphen_values = true, value_parser = name)]
    name: String,
    /// It does not settle allocations later
    #[arg(long)]
    no_async_allocations: bool,
    /// It does not settle deallocations later
    #[arg(long)]
    no_async_deallocations: bool,
    /// The AMQP user that its messages must carry in `user_id`
    #[arg(long, value_name = "USER", value_parser = broker_user)]
    broker_user: Option<String>,
    /// Give it an input queue of its own, settlement.updates.<enterprise id>
    #[arg(long)]
    own_queue: bool,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
#[command(
    group = ArgGroup::new("whose").required(true).args(["partner", "enterprise_id"]),
    group = ArgGroup::new("change").required(true).multiple(true).args([
        "name", "broker_user", "no_broker_user", "own_queue", "no_own_queue", "async_allocations",
        "no_async_allocations", "async_deallocations", "no_async_deallocations",
    ]),
    after_help = "\
What is not named stays as it is. Said again it changes nothing. It counts from the worker's next batch on.
Without its own queue the partner's messages go to the common one again. What is in its own is settled first: this waits
for that, and a worker must be running if there is anything in it. Then the queue is deleted. Nothing is lost on the way,
wherever it is broken off: say it again to go on. Exit 3 if the queue is still there at the end."
)]
pub(in crate::cli) struct SetPartner {
    /// The partner's enterprise
    #[arg(value_name = "ENTERPRISE_ID", value_parser = enterprise_id)]
    partner: Option<String>,
    /// The same as a flag, as the other commands have it
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: Option<String>,
    /// What people call it
    #[arg(long, allow_hyphen_values = true, value_parser = name)]
    name: Option<String>,
    /// The AMQP user that its messages must carry in `user_id`
    #[arg(long, value_name = "USER", value_parser = broker_user, conflicts_with = "no_broker_user")]
    broker_user: Option<String>,
    /// Its messages may carry any AMQP user, or none
    #[arg(long)]
    no_broker_user: bool,
    /// Give it an input queue of its own, settlement.updates.<enterprise id>; off: take it away
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", conflicts_with = "no_own_queue")]
    own_queue: Option<Switch>,
    /// The same as --own-queue off
    #[arg(long)]
    no_own_queue: bool,
    /// It settles allocations later
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", conflicts_with = "no_async_allocations")]
    async_allocations: Option<Switch>,
    /// It does not settle allocations later
    #[arg(long)]
    no_async_allocations: bool,
    /// It settles deallocations later
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on", conflicts_with = "no_async_deallocations")]
    async_deallocations: Option<Switch>,
    /// It does not settle deallocations later
    #[arg(long)]
    no_async_deallocations: bool,
    /// How long to wait at most until its own queue is empty: a number and ms, s or m
    #[arg(long, value_name = "DURATION", default_value = "5m", action = ArgAction::Set, value_parser = crate::cli::simulate::duration)]
    wait: std::time::Duration,
    #[command(flatten)]
    note: Note,
}

/// A switch that may also be turned off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl SetPartner {
    fn wish(&self) -> PartnerWish {
        let switch = |given: Option<Switch>, off: bool| match (given, off) {
            (Some(given), _) => Some(given == Switch::On),
            (None, true) => Some(false),
            (None, false) => None,
        };
        PartnerWish {
            name: self.name.clone(),
            async_allocations: switch(self.async_allocations, self.no_async_allocations),
            async_deallocations: switch(self.async_deallocations, self.no_async_deallocations),
            broker_user: match &self.broker_user {
                Some(user) => Some(Some(user.clone())),
                None => self.no_broker_user.then_some(None),
            },
            own_queue: switch(self.own_queue, self.no_own_queue),
        }
    }

    fn whose(&self) -> String {
        self.partner
            .clone()
            .or_else(|| self.enterprise_id.clone())
            .unwrap_or_default()
    }
}

#[derive(Args)]
pub(in crate::cli) struct OnePartner {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    #[command(flatten)]
    note: Note,
}

#[derive(Args)]
pub(in crate::cli) struct QuarantinedPartner {
    /// The partner's enterprise
    #[arg(long, value_parser = enterprise_id)]
    enterprise_id: String,
    /// Why, for the audit and for who looks at the list
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = why)]
    reason: String,
    #[command(flatten)]
    operator: Operator,
}

fn name(text: &str) -> Result<String, String> {
    bounded(text, 1024).map(|()| text.to_owned())
}

/// An AMQP user's name is a short string.
fn broker_user(text: &str) -> Result<String, String> {
    bounded(text, 255).map(|()| text.to_owned())
}

pub(in crate::cli) async fn partner(context: &Context, command: PartnerCommand) -> Result<Exit, Failure> {
    match command {
        PartnerCommand::Add(wish) => add_partner(context, wish).await,
        PartnerCommand::Set(wish) => set_partner(context, &wish).await,
        PartnerCommand::Suspend(wish) => {
            let operator = wish.note.operator();
            act(
                context,
                &wish.enterprise_id,
                PartnerAct::Suspend,
                wish.note.by(&operator),
            )
            .await
        }
        PartnerCommand::Quarantine(wish) => {
            let by = By {
                operator: &wish.operator.name(),
                why: Some(&wish.reason),
            };
            act(context, &wish.enterprise_id, PartnerAct::Quarantine, by).await
        }
        PartnerCommand::Resume(wish) => {
            let operator = wish.note.operator();
            act(
                context,
                &wish.enterprise_id,
                PartnerAct::Resume,
                wish.note.by(&operator),
            )
            .await
        }
        PartnerCommand::Move(wish) => move_partner(context, &wish).await,
        PartnerCommand::List => list_partners(context).await,
    }
}

async fn add_partner(context: &Context, wish: AddPartner) -> Result<Exit, Failure> {
    let note = wish.note;
    let operator = note.operator();
    let wish = NewPartner {
        enterprise_id: wish.enterprise_id,
        name: wish.name,
        async_allocations: !wish.no_async_allocations,
        async_deallocations: !wish.no_async_deallocations,
        broker_user: wish.broker_user,
        own_queue: wish.own_queue,
    };
    // Asked first: without the broker nothing is registered.
    let broker = match wish.own_queue {
        true => Some(context.connect("settled partner add").await?),
        false => None,
    };
    let store = context.store()?;
    let registered = context
        .patiently(async || store.add_partner(&wish, note.by(&operator)).await)
        .await?;
    // After the registry: once it is bound, the queue takes the partner's messages away from the common one.
    if let Some(connection) = broker {
        connection.close().await?;
        if !matches!(registered, Registered::Conflict(_)) {
            give_queue(context, &wish.enterprise_id).await?;
        }
    }
    if wish.broker_user.is_some() && !matches!(registered, Registered::Conflict(_)) {
        give_exchange(context, &wish.enterprise_id).await;
    }
    let subject = format!("partner {}", wish.enterprise_id);
    match &registered {
        Registered::Conflict(stored) => Err(other_content(&subject, &wish, stored)),
        Registered::Exists(stored) if stored.suspended_at.is_some() => tell(
            context,
            &subject,
            &registered,
            ["", "registered already, and suspended", ""],
        ),
        Registered::Added(_)
        | Registered::Exists(_)
        | Registered::Updated(_)
        | Registered::Revoked(_)
        | Registered::NoPartner
        | Registered::NeverValid
        | Registered::Unproven(_) => tell(context, &subject, &registered, ["registered", "registered already", ""]),
    }
}

/// A queue of its own.
async fn give_queue(context: &Context, enterprise_id: &str) -> Result<(), Failure> {
    context
        .declares(async |connection| own_queue::declare(connection, enterprise_id).await)
        .await
}

/// An exchange of its own for a partner that is bound to a broker user. The registry does not wait for the broker: without the
/// exchange the partner publishes to the common one.
async fn give_exchange(context: &Context, enterprise_id: &str) {
    let given = context
        .declares(async |connection| own_exchange::declare(connection, enterprise_id).await)
        .await;
    if let Err(failure) = given
        && !context.out.json
    {
        complain(&format!(
            "its exchange settlement.updates.{enterprise_id} is not declared yet ({}): `settled topology` does it",
            failure.message()
        ));
    }
}

/// The same partner with the content that was given.
fn as_given(wish: &NewPartner, stored: &PartnerRecord) -> PartnerRecord {
    stored.with(&PartnerWish {
        name: Some(wish.name.clone()),
        async_allocations: Some(wish.async_allocations),
        async_deallocations: Some(wish.async_deallocations),
        broker_user: Some(wish.broker_user.clone()),
        own_queue: Some(wish.own_queue),
    })
}

/// What is registered, what was given, and the command that would change the one to the other.
fn other_content(subject: &str, wish: &NewPartner, stored: &PartnerRecord) -> Failure {
    let changes = stored.changes_to(&as_given(wish, stored));
    let (mut differences, mut flags) = (Vec::new(), Vec::new());
    for (field, change) in &changes {
        let (is, given, flag) = in_words(field, &change.from, &change.to);
        differences.push(format!("{is}, and {given} given"));
        flags.push(flag);
    }
    Failure::refused(format!(
        "{subject} is registered with other content ({}); nothing was changed",
        differences.join("; ")
    ))
    .hint(format!(
        "to change it: settled partner set {} {}",
        stored.enterprise_id,
        flags.join(" ")
    ))
}

/// What a field is, what it would be, and the flag that makes it so.
fn in_words(field: &str, is: &Value, given: &Value) -> (String, String, String) {
    let asynchronous = |what: &str, flag: &str| {
        let word = |value: &Value| if *value == true { "enabled" } else { "not enabled" };
        let no = if *given == true { "" } else { "no-" };
        (
            format!("asynchronous {what} are {}", word(is)),
            format!("\"{}\" was", word(given)),
            format!("--{no}{flag}"),
        )
    };
    match field {
        "asyncAllocations" => asynchronous("allocations", "async-allocations"),
        "asyncDeallocations" => asynchronous("deallocations", "async-deallocations"),
        "brokerUser" => {
            let bound = |value: &Value| match value {
                Value::String(user) => format!("the broker user {user:?}"),
                _ => "no broker user".to_owned(),
            };
            let flag = match given {
                Value::String(user) => format!("--broker-user {}", quoted(user)),
                _ => "--no-broker-user".to_owned(),
            };
            (
                format!("it is bound to {}", bound(is)),
                format!("{} was", bound(given)),
                flag,
            )
        }
        "ownQueue" => {
            let word = |value: &Value| if *value == true { "a" } else { "no" };
            let switch = if *given == true { "on" } else { "off" };
            (
                format!("it has {} queue of its own", word(is)),
                format!("{} queue of its own was", word(given)),
                format!("--own-queue {switch}"),
            )
        }
        _ => {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            (
                format!("its name is {:?}", text(is)),
                format!("{:?} was", text(given)),
                format!("--name {}", quoted(&text(given))),
            )
        }
    }
}

/// As a shell takes it for one word.
fn quoted(text: &str) -> String {
    let harmless = |letter: char| letter.is_ascii_alphanumeric() || "-_.:@/".contains(letter);
    if !text.is_empty() && text.chars().all(harmless) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// A partner, with what was changed of it.
#[derive(Serialize)]
struct Set<'a> {
    #[serde(flatten)]
    record: &'a PartnerRecord,
    result: &'static str,
    changed: &'a FieldChanges,
    /// What became of its own queue, where there is something to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<&'a str>,
}

async fn set_partner(context: &Context, asked: &SetPartner) -> Result<Exit, Failure> {
    let (enterprise_id, wish, operator) = (asked.whose(), asked.wish(), asked.note.operator());
    let store = context.store()?;
    if store.partner(&enterprise_id).await?.is_none() {
        return Err(unknown_partner(&enterprise_id));
    }
    // Asked first: without the broker nothing is changed.
    let broker = match wish.own_queue {
        Some(_) => Some(context.connect("settled partner set").await?),
        None => None,
    };
    let removal = match (&broker, wish.own_queue) {
        (Some(connection), Some(false)) => Some(Removal::new(context, connection, &enterprise_id, asked.wait)),
        (Some(_) | None, _) => None,
    };
    if let Some(removal) = &removal {
        removal.drain().await?;
    }
    let changed = context
        .patiently(async || store.set_partner(&enterprise_id, &wish, asked.note.by(&operator)).await)
        .await?;
    let Some((record, changes)) = changed else {
        return Err(unknown_partner(&enterprise_id));
    };
    let mut exit = Exit::Done;
    let mut queue = None;
    match (&broker, &removal) {
        (Some(_), Some(removal)) => match removal.remove().await? {
            Ok(word) => queue = word.map(str::to_owned),
            Err(why) => {
                exit = Exit::Partly;
                queue = Some(why);
            }
        },
        // After the registry: once it is bound, the queue takes the partner's messages away from the common one.
        (Some(_), None) => give_queue(context, &enterprise_id).await?,
        (None, _) => {}
    }
    if let Some(connection) = broker {
        drop(connection.close().await);
    }
    if matches!(wish.broker_user, Some(Some(_))) {
        give_exchange(context, &enterprise_id).await;
    }
    let told = Set {
        record: &record,
        result: if changes.is_empty() { "exists" } else { "updated" },
        changed: &changes,
        queue: queue.as_deref(),
    };
    context.out.say(&told, |out| {
        if changes.is_empty() {
            out.line(format!("partner {enterprise_id}: it is so already"))?;
        }
        for (field, change) in &changes {
            out.line(format!(
                "partner {enterprise_id}: {}",
                sentence(field, &change.from, &change.to)
            ))?;
        }
        match &queue {
            Some(word) => out.line(format!("queue settlement.updates.{enterprise_id}: {word}")),
            None => Ok(()),
        }
    })?;
    Ok(exit)
}

/// From what to what.
fn sentence(field: &str, from: &Value, to: &Value) -> String {
    let value = |value: &Value| match value {
        Value::String(text) => format!("{text:?}"),
        Value::Bool(truth) => yes_no(*truth),
        _ => "any".to_owned(),
    };
    let what = match field {
        "asyncAllocations" => "asynchronous allocations",
        "asyncDeallocations" => "asynchronous deallocations",
        "brokerUser" => "broker user",
        "ownQueue" => "own queue",
        other => other,
    };
    format!("{what} was {}, is {} now", value(from), value(to))
}

/// From the worker's next batch on.
async fn act(context: &Context, enterprise_id: &str, act: PartnerAct, by: By<'_>) -> Result<Exit, Failure> {
    let registered = context.desk()?.act_on_partner(enterprise_id, act, by).await?;
    let (already, now) = match act {
        PartnerAct::Suspend => (
            "suspended already",
            "suspended; its updates are refused from the next batch on",
        ),
        PartnerAct::Quarantine => (
            "in quarantine already",
            "in quarantine; its messages are held from the next batch on, until `settled partner resume`",
        ),
        PartnerAct::Resume => (
            "neither suspended nor in quarantine",
            "its updates are taken again from the next batch on; what was held is judged now, oldest first",
        ),
    };
    tell(
        context,
        &format!("partner {enterprise_id}"),
        &registered,
        ["", already, now],
    )
}

async fn list_partners(context: &Context) -> Result<Exit, Failure> {
    let partners = context.store()?.partners().await?;
    context.out.say(&partners, |out| {
        let header = [
            "enterprise",
            "name",
            "allocations",
            "deallocations",
            "broker user",
            "own queue",
            "suspended",
            "quarantined",
            "since",
        ];
        let row = |partner: &PartnerRecord| {
            vec![
                partner.enterprise_id.clone(),
                partner.name.clone(),
                yes_no(partner.async_allocations),
                yes_no(partner.async_deallocations),
                partner.broker_user.clone().unwrap_or_else(|| "any".to_owned()),
                yes_no(partner.own_queue),
                times(partner.suspended_at),
                times(partner.quarantined_at),
                rfc3339(partner.created_at),
            ]
        };
        out.table(&header, partners.iter().map(row).collect(), "no partner is registered")
    })?;
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_said_with_the_command_that_changes_it() {
        let given = NewPartner {
            enterprise_id: "acme".into(),
            name: "Acme's".into(),
            async_allocations: false,
            async_deallocations: true,
            broker_user: None,
            own_queue: true,
        };
        let stored = PartnerRecord {
            enterprise_id: "acme".into(),
            name: "Acme".into(),
            async_allocations: true,
            async_deallocations: true,
            broker_user: Some("acme".into()),
            own_queue: false,
            suspended_at: None,
            quarantined_at: None,
            quarantine_reason: None,
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let failure = other_content("partner acme", &given, &stored);
        assert_eq!(
            failure.message(),
            "partner acme is registered with other content (asynchronous allocations are enabled, and \"not enabled\" was \
             given; it is bound to the broker user \"acme\", and no broker user was given; its name is \"Acme\", and \
             \"Acme's\" was given; it has no queue of its own, and a queue of its own was given); nothing was changed"
        );
        assert_eq!(
            failure.hint_text(),
            Some(
                "to change it: settled partner set acme --no-async-allocations --no-broker-user --name 'Acme'\\''s' \
                 --own-queue on"
            )
        );
        for field in stored.changes_to(&as_given(&given, &stored)).keys() {
            let sentence = sentence(field, &json!("a"), &json!("b"));
            assert!(sentence.ends_with("was \"a\", is \"b\" now"), "{sentence}");
        }
    }
}
