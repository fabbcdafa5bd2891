//! How things stand, for who watches.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    Author, Backlog, By, Command, ConnectionRecord, Desk, KeyRecord, MinuteOfBatches, Page, PartnerRecord, PartnerSeen,
    Refusal, TrendOfGroup, Which,
};
use crate::{
    broker::{BrokerSettings, Connection, topology},
    domain::{dead_letter::State, reason::Reason},
    store::{StoreError, registry::Registered},
};

/// Minutes that are looked back at.
const MINUTES: u64 = 60;
/// Partners with a line of their own.
const PARTNERS_MAX: usize = 50;

/// What the database says of how things stand.
#[derive(Clone, Debug)]
pub struct Standing {
    /// By the database's clock.
    pub at: Timestamp,
    /// The last hour; minutes without a batch are left out.
    pub minutes: Vec<MinuteOfBatches>,
    /// Open dead letters by reason, the most first.
    pub open: Vec<(Reason, u64)>,
    /// How long ago the oldest of them was collected.
    pub oldest_open: Option<Duration>,
    /// Replays by state.
    pub runs: Vec<(String, u64)>,
    pub parked: u64,
    /// Messages in the side room: taken, and not judged yet.
    pub held: u64,
    /// How long ago the oldest of them came.
    pub oldest_held: Option<Duration>,
    pub outbox: Backlog,
    pub partners: Vec<PartnerStanding>,
    /// More are registered than have a line here.
    pub more_partners: usize,
}

/// How a partner stands.
#[derive(Clone, Debug)]
pub struct PartnerStanding {
    pub partner: PartnerRecord,
    pub open: i64,
    pub parked: i64,
}

/// What waits in a queue; or why nobody knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueStanding {
    pub queue: String,
    pub messages: Result<u32, String>,
}

/// How many dead letters a filter selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plannable {
    pub messages: i64,
    /// There are more than these.
    pub more: bool,
    /// Those that a plan of it would hold.
    pub planned: i64,
}

/// A connection to the broker, kept by who looks at queues again and again.
pub struct QueueWatch {
    desk: Desk,
    connection: Option<Connection>,
}

impl QueueWatch {
    /// What is ready in each queue.
    ///
    /// # Errors
    /// The broker is away, or nobody said where it is.
    pub async fn look(&mut self, own: &[String]) -> Result<Vec<QueueStanding>, Refusal> {
        let link = match self.connection.take().filter(Connection::is_connected) {
            Some(link) => link,
            None => {
                let broker = BrokerSettings::from_settings(&self.desk.settings)?;
                Connection::open(&broker, "settled console")
                    .await
                    .map_err(Refusal::no_broker)?
            }
        };
        let own = own.iter().map(|enterprise_id| topology::own_queue(enterprise_id));
        let queues: Vec<String> = [topology::UPDATES, topology::DEAD, topology::UNREADABLE]
            .map(str::to_owned)
            .into_iter()
            .chain(own)
            .collect();
        let asked: Vec<&str> = queues.iter().map(String::as_str).collect();
        let seen = topology::look_at_each(&link, &asked).await?;
        // A refused question costs the connection a channel number for good.
        let is_whole = seen.iter().all(|seen| matches!(seen, topology::Seen::Ready(_)));
        self.connection = is_whole.then_some(link);
        let standing = queues.into_iter().zip(seen).map(|(queue, seen)| QueueStanding {
            queue,
            messages: match seen {
                topology::Seen::Ready(messages) => Ok(messages),
                topology::Seen::Missing => Err("there is no such queue".to_owned()),
                topology::Seen::Forbidden(why) => Err(why),
            },
        });
        Ok(standing.collect())
    }
}

impl Desk {
    /// Whoever looks at queues again and again.
    pub fn queue_watch(&self) -> QueueWatch {
        QueueWatch {
            desk: self.clone(),
            connection: None,
        }
    }

    /// How things stand, as far as the database says it.
    ///
    /// # Errors
    /// The database is away.
    pub async fn standing(&self) -> Result<Standing, Refusal> {
        let (minutes, letters, rest, open) = tokio::join!(
            self.store.minutes_of_batches(Duration::from_secs(MINUTES * 60)),
            self.store.letters_under_way(),
            async {
                Ok::<_, StoreError>((
                    self.store.parked_by_partner().await?,
                    self.store.partners().await?,
                    self.store.count_held().await?,
                    self.store.backlog().await?,
                ))
            },
            // One walk along the index, for reasons and partners alike.
            self.store.open_letters(),
        );
        let ((at, minutes), letters, (reasons, open_of)) = (minutes?, letters?, open?);
        let (parked, partners, held, outbox) = rest?;
        let parked: BTreeMap<String, i64> = parked.into_iter().collect();
        let natural = |messages: i64| u64::try_from(messages).unwrap_or_default();
        let mut open: Vec<(Reason, u64)> = reasons
            .into_iter()
            .map(|(reason, messages)| (reason, natural(messages)))
            .collect();
        open.sort_by_key(|(reason, messages)| (std::cmp::Reverse(*messages), *reason));
        let open_of: BTreeMap<String, i64> = open_of.into_iter().collect();
        let mut standing: Vec<PartnerStanding> = partners
            .into_iter()
            .map(|partner| PartnerStanding {
                open: open_of.get(&partner.enterprise_id).copied().unwrap_or_default(),
                parked: parked.get(&partner.enterprise_id).copied().unwrap_or_default(),
                partner,
            })
            .collect();
        standing.sort_by(|left, right| {
            let place = |one: &PartnerStanding| (-one.open, -one.parked, one.partner.enterprise_id.clone());
            place(left).cmp(&place(right))
        });
        let more_partners = standing.len().saturating_sub(PARTNERS_MAX);
        standing.truncate(PARTNERS_MAX);
        Ok(Standing {
            at,
            minutes,
            open,
            oldest_open: letters.oldest,
            runs: letters.runs,
            parked: natural(parked.values().sum()),
            held: held.iter().map(|total| total.messages).sum(),
            oldest_held: held.iter().map(|total| total.oldest).max(),
            outbox,
            partners: standing,
            more_partners,
        })
    }

    /// The partners that have an input queue of their own.
    ///
    /// # Errors
    /// The database is away.
    pub async fn own_queues(&self) -> Result<Vec<String>, Refusal> {
        Ok(self.store.own_queues().await?)
    }

    /// When the open messages of some groups failed last, by parts of the time until now.
    ///
    /// # Errors
    /// The database is away.
    pub async fn trend_of_groups(
        &self,
        groups: &[String],
        last: Duration,
        parts: i32,
    ) -> Result<Vec<TrendOfGroup>, Refusal> {
        Ok(self.store.trend_of_groups(groups, last, parts).await?)
    }

    /// How many dead letters a filter selects, of open ones unless states are named.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_letters(&self, which: &Which) -> Result<i64, Refusal> {
        let filter = self.filter(which, &[State::Open]).await?;
        Ok(self.store.count_dead_letters(&filter).await?)
    }

    /// The same, as far as a plan goes; and how many of them one would hold: as many as it may, and none that it leaves out.
    ///
    /// # Errors
    /// The database is away.
    pub async fn count_plannable(&self, which: &Which) -> Result<Plannable, Refusal> {
        let filter = self.filter(which, &[State::Open]).await?;
        let left_out = match filter.left_out() {
            Some(left_out) => self.store.count_dead_letters(&left_out).await?,
            None => 0,
        };
        let most = self.plan_max();
        // Beyond what a plan holds they are not counted.
        let bound = most.saturating_add(left_out);
        let all = self
            .store
            .count_dead_letters_upto(&filter, bound.saturating_add(1))
            .await?;
        Ok(Plannable {
            messages: all.min(bound),
            more: all > bound,
            planned: (all - left_out).min(most),
        })
    }

    /// How many messages a plan holds at most.
    pub fn plan_max(&self) -> i64 {
        i64::try_from(self.settings.dead_letters.plan_max).unwrap_or(i64::MAX)
    }

    /// The cursor of the newest dead letter: whoever goes on from there sees what comes.
    ///
    /// # Errors
    /// The database is away.
    pub async fn newest_letter(&self) -> Result<i64, Refusal> {
        Ok(self.store.newest_dead_letter().await?)
    }

    /// Dead letters of a filter that came after one, up to a number; open ones unless states are named.
    ///
    /// # Errors
    /// The database is away.
    pub async fn letters_after(&self, which: &Which, cursor: i64, most: i64) -> Result<i64, Refusal> {
        let filter = self.filter(which, &[State::Open]).await?;
        Ok(self.store.arrived_after(&filter, cursor, most).await?)
    }

    /// The database's clock.
    ///
    /// # Errors
    /// The database is away.
    pub async fn clock(&self) -> Result<Timestamp, Refusal> {
        Ok(self.store.clock().await?)
    }
}

/// What is done to a partner, from the worker's next batch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartnerAct {
    /// Refuse its updates.
    Suspend,
    /// Hold them instead of judging them.
    Quarantine,
    /// Take them again, and judge what was held.
    Resume,
}

impl PartnerAct {
    pub fn as_str(self) -> &'static str {
        match self {
            PartnerAct::Suspend => "suspend",
            PartnerAct::Quarantine => "quarantine",
            PartnerAct::Resume => "resume",
        }
    }

    /// The command line that does it.
    pub fn command(self, enterprise_id: &str, author: &Author) -> Command {
        let mut command = Command::new(&["partner", self.as_str()]);
        command.flag("--enterprise-id", Some(enterprise_id));
        author.add_to(&mut command);
        command
    }
}

// Partners -----------------------------------------------------------------------------------------------------------

impl Desk {
    /// A page of partners by enterprise id, after one of them; `console.page` says how many.
    ///
    /// # Errors
    /// The database is away.
    pub async fn partners_page(&self, after: Option<&str>) -> Result<Page<PartnerRecord>, Refusal> {
        let limit = i64::from(self.settings.console.page);
        let found = self.store.partners_page(after, self.limits(), limit + 1).await?;
        Ok(Page::of(found, limit))
    }

    /// One partner.
    ///
    /// # Errors
    /// There is no such partner; the database is away.
    pub async fn partner(&self, enterprise_id: &str) -> Result<PartnerRecord, Refusal> {
        let found = match self.sees(Some(enterprise_id)) {
            true => self.store.partner(enterprise_id).await?,
            false => None,
        };
        found.ok_or_else(|| Refusal::no_partner(enterprise_id))
    }

    /// When something of each of these partners came last, as far as it was written down.
    ///
    /// # Errors
    /// The database is away.
    pub async fn partners_seen(&self, partners: &[String]) -> Result<BTreeMap<String, PartnerSeen>, Refusal> {
        let mut seen = self.store.partners_seen(partners).await?;
        seen.retain(|(enterprise_id, _)| self.sees(Some(enterprise_id)));
        Ok(seen.into_iter().collect())
    }

    /// The keys of a partner, or all.
    ///
    /// # Errors
    /// The database is away.
    pub async fn keys(&self, enterprise_id: Option<&str>) -> Result<Vec<KeyRecord>, Refusal> {
        Ok(self.store.keys(enterprise_id).await?)
    }

    /// A page of a partner's connections in the order of their ids, after one of them.
    ///
    /// # Errors
    /// The database is away.
    pub async fn connections_of(
        &self,
        enterprise_id: &str,
        after: Option<Uuid>,
        limit: i64,
    ) -> Result<Page<ConnectionRecord>, Refusal> {
        let found = self.store.connections_of(enterprise_id, after, limit + 1).await?;
        Ok(Page::of(found, limit))
    }

    /// Suspends a partner, puts it in quarantine, or lets it go on. Where it was so already nothing is changed.
    ///
    /// # Errors
    /// There is no such partner; the database is away.
    pub async fn act_on_partner(
        &self,
        enterprise_id: &str,
        act: PartnerAct,
        by: By<'_>,
    ) -> Result<Registered<PartnerRecord>, Refusal> {
        if !self.sees(Some(enterprise_id)) {
            return Err(Refusal::no_partner(enterprise_id));
        }
        let done = self
            .patiently(async || match act {
                PartnerAct::Suspend => self.store.suspend_partner(enterprise_id, by).await,
                PartnerAct::Quarantine => self.store.quarantine_partner(enterprise_id, by).await,
                PartnerAct::Resume => self.store.resume_partner(enterprise_id, by).await,
            })
            .await?;
        done.ok_or_else(|| Refusal::no_partner(enterprise_id))
    }
}
