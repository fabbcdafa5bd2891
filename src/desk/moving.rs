//! A partner moves to another cell: the order of the steps, over two databases that have no common COMMIT. What each step leaves is
//! told by a row on both sides, so that whoever comes next goes on from there.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use serde::Serialize;
use uuid::Uuid;

use super::{Author, Desk, Refusal};
use crate::store::{
    Store,
    moves::{Arriving, CellMove, Leaving, MovePhase, MovedBalance, Pausing},
    registry::By,
};

/// How often it is looked whether something is over.
const LOOK: Duration = Duration::from_millis(100);

/// What is to be done.
#[derive(Clone, Debug)]
pub enum MoveAct {
    /// Look, and change nothing.
    Plan,
    Apply(Author),
    Cancel(Author),
}

/// A partner that is to move.
#[derive(Clone, Debug)]
pub struct PartnerMove {
    pub enterprise_id: String,
    pub act: MoveAct,
    /// How long to wait at most until nothing of the partner is under way.
    pub wait: Duration,
}

/// How a partner's move stands.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PartnerMoved {
    pub enterprise_id: String,
    /// `planned`, `waits`, `moved`, `cancelled`.
    pub result: &'static str,
    /// None: no move was begun.
    pub move_id: Option<Uuid>,
    /// How far the move is: `none`, `paused`, `arrived`, `left`, `done`, `cancelled`.
    pub phase: &'static str,
    /// Which books it leaves, and to which it goes.
    pub source: Uuid,
    pub target: Uuid,
    /// What goes along, by table.
    pub rows: BTreeMap<String, i64>,
    /// What is held and allocated on its connections.
    pub funds: Vec<MovedBalance>,
    /// Messages in the side room of the source, which are handed over.
    pub held: i64,
    /// Open dead letters, which stay in the source.
    pub open_dead_letters: i64,
    /// What keeps the move from beginning.
    pub in_the_way: Vec<String>,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// Messages that were handed over now.
    pub handed_over: i64,
}

/// Both cells.
struct Cells<'a> {
    source: &'a Store,
    target: Store,
    books: (Uuid, Uuid),
}

impl Desk {
    /// The database of the other cell.
    ///
    /// # Errors
    /// Nobody said where it is.
    pub(super) fn other_cell(&self) -> Result<Self, Refusal> {
        let mut settings = self.settings.clone();
        settings.database.url = settings.target_url()?.clone();
        Self::open(&settings)
    }

    async fn cells(&self) -> Result<Cells<'_>, Refusal> {
        let other = self.other_cell()?;
        self.check_schema().await?;
        other.check_schema().await.map_err(|refusal| Refusal {
            message: format!("the other cell: {}", refusal.message),
            ..refusal
        })?;
        let books = (
            self.store.books_epoch().await?.books,
            other.store.books_epoch().await?.books,
        );
        if books.0 == books.1 {
            return Err(
                Refusal::refused("both databases hold the same books, or a copy of them; nothing was changed")
                    .hint("SETTLED_DATABASE_URL leads to the cell that the partner leaves, SETTLED_TARGET_DATABASE_URL to the other"),
            );
        }
        Ok(Cells {
            source: &self.store,
            target: other.store,
            books,
        })
    }

    /// Moves a partner to the other cell, goes on where an earlier one stopped, takes it back, or says what it would be.
    ///
    /// # Errors
    /// There is no such partner; something is in the way; a database is away.
    pub async fn move_partner(&self, wish: &PartnerMove) -> Result<PartnerMoved, Refusal> {
        let cells = self.cells().await?;
        let whose = wish.enterprise_id.as_str();
        if self.store.partner(whose).await?.is_none() {
            return Err(Refusal::no_partner(whose));
        }
        let going = self.store.newest_move(whose).await?;
        let going = going.filter(|going| going.phase != MovePhase::Cancelled);
        if let Some(going) = &going
            && going.other != cells.books.1
        {
            return Err(Refusal::refused(format!(
                "the move of partner {whose} leads to the books {}, and SETTLED_TARGET_DATABASE_URL to {}; nothing was changed",
                going.other, cells.books.1
            ))
            .hint("go on with the URL of the cell that the move was begun to"));
        }
        match &wish.act {
            MoveAct::Plan => cells.plan(whose, going).await,
            MoveAct::Apply(author) => cells.go(whose, going, author, wish.wait).await,
            MoveAct::Cancel(author) => cells.cancel(whose, going, author).await,
        }
    }
}

fn by(author: &Author) -> By<'_> {
    By {
        operator: &author.operator,
        why: Some(&author.why),
    }
}

impl Cells<'_> {
    /// How it stands, so far as the move itself says it.
    fn told(&self, whose: &str, going: Option<&CellMove>, result: &'static str) -> PartnerMoved {
        PartnerMoved {
            enterprise_id: whose.to_owned(),
            result,
            move_id: going.map(|going| going.id),
            phase: going.map_or("none", |going| going.phase.as_str()),
            source: self.books.0,
            target: self.books.1,
            rows: BTreeMap::new(),
            funds: Vec::new(),
            held: 0,
            open_dead_letters: 0,
            in_the_way: Vec::new(),
            waits_for: None,
            handed_over: 0,
        }
    }

    /// The move as the target has it.
    async fn decided(&self, going: &CellMove) -> Result<Option<MovePhase>, Refusal> {
        Ok(self.target.find_move(going.id).await?.map(|found| found.phase))
    }

    /// How far the source is, on whatever server may take its place.
    async fn stands_in_source(&self, going: &CellMove) -> Result<MovePhase, Refusal> {
        self.source.await_standbys().await?;
        let found = self.source.find_move(going.id).await?;
        found
            .map(|found| found.phase)
            .ok_or_else(|| forgotten("this cell", &going.enterprise_id))
    }

    /// That the target is so far, on whatever server may take its place.
    async fn must_stand_in_target(&self, going: &CellMove, phases: &[MovePhase]) -> Result<(), Refusal> {
        self.target.await_standbys().await?;
        match self.decided(going).await? {
            Some(decided) if phases.contains(&decided) => Ok(()),
            Some(_) | None => Err(forgotten("the other cell", &going.enterprise_id)),
        }
    }

    /// How far it is, by both sides.
    async fn phase(&self, going: &CellMove) -> Result<MovePhase, Refusal> {
        Ok(match (going.phase, self.decided(going).await?) {
            (MovePhase::Paused, Some(decided)) => decided,
            (here, _) => here,
        })
    }

    async fn plan(&self, whose: &str, going: Option<CellMove>) -> Result<PartnerMoved, Refusal> {
        let counts = self.source.count_for_move(whose).await?;
        let mut told = self.told(whose, going.as_ref(), "planned");
        told.rows = counts
            .rows
            .iter()
            .map(|(name, rows)| ((*name).to_owned(), *rows))
            .collect();
        told.funds = counts.funds;
        told.held = counts.held;
        told.open_dead_letters = counts.open_dead_letters;
        if let Some(going) = &going {
            told.phase = self.phase(going).await?.as_str();
            return Ok(told);
        }
        if self.target.partner(whose).await?.is_some() {
            told.in_the_way
                .push(format!("partner {whose} is registered in the target already"));
        }
        if counts.replays > 0 {
            told.in_the_way.push(replays(counts.replays));
        }
        Ok(told)
    }

    async fn begin(&self, whose: &str, author: &Author) -> Result<CellMove, Refusal> {
        let refused = |why: String| Refusal::refused(format!("{why}; nothing was changed"));
        if self.target.partner(whose).await?.is_some() {
            return Err(refused(format!("partner {whose} is registered in the target already"))
                .hint("a partner moves to a cell that never knew it"));
        }
        match self.source.pause_for_move(whose, self.books.1, by(author)).await? {
            Pausing::Paused(going) => Ok(going),
            Pausing::NoPartner => Err(Refusal::no_partner(whose)),
            Pausing::Replays(dead_letters) => {
                Err(refused(replays(dead_letters))
                    .hint("let the run end, or cancel it: `settled dead-letters runs list`"))
            }
            Pausing::Moving => {
                Err(refused(format!("a move of partner {whose} was begun just now")).hint("say it again"))
            }
        }
    }

    async fn go(
        &self,
        whose: &str,
        going: Option<CellMove>,
        author: &Author,
        wait: Duration,
    ) -> Result<PartnerMoved, Refusal> {
        let going = match going {
            Some(going) => going,
            None => self.begin(whose, author).await?,
        };
        // Each step is told of to the other side only once no failover can take it back, and what stands is read after that.
        if going.phase == MovePhase::Paused {
            if self.stands_in_source(&going).await? == MovePhase::Cancelled {
                return Err(taken_back(whose));
            }
            if let Some(waits_for) = self.arrive(&going, author, wait).await? {
                return Ok(PartnerMoved {
                    waits_for: Some(waits_for),
                    ..self.told(whose, Some(&going), "waits")
                });
            }
            self.must_stand_in_target(&going, &[MovePhase::Arrived, MovePhase::Done])
                .await?;
            let arrived = self.target.arrived_funds(going.id).await?;
            match self.source.leave(&going, &arrived, by(author)).await? {
                Leaving::Gone => {}
                Leaving::Differs(difference) => {
                    return Err(Refusal::ours(format!(
                        "the money of partner {whose} is not what arrived: {difference}"
                    ))
                    .hint("nothing of it is judged in either cell; somebody changed the books while it was paused"));
                }
                Leaving::NotPaused => return Err(forgotten("this cell", whose)),
            }
        }
        if !matches!(self.stands_in_source(&going).await?, MovePhase::Left | MovePhase::Done) {
            return Err(forgotten("this cell", whose));
        }
        self.target.resume_moved(going.id, by(author)).await?;
        self.must_stand_in_target(&going, &[MovePhase::Done]).await?;
        let handed_over = self.source.hand_over(&self.target, whose).await?;
        self.source.finish_move(going.id, by(author)).await?;
        let arrived = self.target.find_move(going.id).await?;
        let rows = arrived
            .as_ref()
            .and_then(|arrived| serde_json::from_value(arrived.counted.clone()).ok());
        Ok(PartnerMoved {
            phase: MovePhase::Done.as_str(),
            rows: rows.unwrap_or_default(),
            funds: self.target.arrived_funds(going.id).await?,
            handed_over,
            ..self.told(whose, Some(&going), "moved")
        })
    }

    /// Brings everything to the target; or says what it waits for.
    async fn arrive(&self, going: &CellMove, author: &Author, wait: Duration) -> Result<Option<String>, Refusal> {
        let taken_back = || taken_back(&going.enterprise_id);
        match self.decided(going).await? {
            Some(MovePhase::Cancelled) => return Err(taken_back()),
            Some(MovePhase::Arrived | MovePhase::Done | MovePhase::Paused | MovePhase::Left) => return Ok(None),
            None => {}
        }
        if let Some(waits_for) = self.drain(wait).await? {
            return Ok(Some(waits_for));
        }
        // A run may have taken some while the partner was being paused. Nobody judges them now.
        let under_way = self.source.replays_under_way(&going.enterprise_id).await?;
        if under_way > 0 {
            return Ok(Some(format!("{}: cancel their run", replays(under_way))));
        }
        match self.source.arrive(&self.target, going, by(author)).await? {
            Arriving::Arrived(_) | Arriving::Decided(MovePhase::Arrived | MovePhase::Done) => Ok(None),
            Arriving::Decided(MovePhase::Cancelled | MovePhase::Paused | MovePhase::Left) => Err(taken_back()),
            Arriving::Stopped(why) => Err(Refusal::refused(format!(
                "partner {} stays paused: {why}; nothing was changed in the target",
                going.enterprise_id
            ))
            .hint("mend it and say it again, or take the move back: --cancel")),
        }
    }

    /// Waits until whatever was under way when the partner was paused is over: transactions that read the registry before, and
    /// what their batches have to publish.
    async fn drain(&self, wait: Duration) -> Result<Option<String>, Refusal> {
        let until = Instant::now() + wait;
        let mut running = self.source.running_transactions().await?;
        while !running.is_empty() {
            if Instant::now() >= until {
                return Ok(Some(format!(
                    "{} transactions that began before the pause are open in the source",
                    running.len()
                )));
            }
            tokio::time::sleep(LOOK).await;
            running = self.source.still_running(&running).await?;
        }
        let at = self.source.clock().await?;
        loop {
            let unpublished = self.source.unpublished_before(at).await?;
            if unpublished == 0 {
                return Ok(None);
            }
            if Instant::now() >= until {
                return Ok(Some(format!(
                    "{unpublished} batches of before the pause wait in the outbox of the source to be published"
                )));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn cancel(&self, whose: &str, going: Option<CellMove>, author: &Author) -> Result<PartnerMoved, Refusal> {
        let Some(going) = going else {
            return Err(Refusal::refused(format!(
                "no move of partner {whose} is under way; nothing was changed"
            )));
        };
        let too_late = || {
            Refusal::refused(format!(
                "partner {whose} has arrived in the target, and its move can not be taken back; nothing was changed"
            ))
            .hint("go on: `settled partner move --apply`")
        };
        if going.phase != MovePhase::Paused {
            return Err(too_late());
        }
        if self.target.void_move(&going, self.books.0).await? != MovePhase::Cancelled {
            return Err(too_late());
        }
        self.must_stand_in_target(&going, &[MovePhase::Cancelled]).await?;
        self.source.cancel_move(going.id, by(author)).await?;
        Ok(PartnerMoved {
            phase: MovePhase::Cancelled.as_str(),
            ..self.told(whose, Some(&going), "cancelled")
        })
    }
}

fn taken_back(whose: &str) -> Refusal {
    Refusal::refused(format!("the move of partner {whose} is being taken back"))
        .hint("say it with --cancel once more, which ends that; then it can be begun anew")
}

/// A database that was restored, or failed over, to before a step of the move that the other side has seen.
fn forgotten(side: &str, whose: &str) -> Refusal {
    Refusal::refused(format!(
        "the database of {side} does not have the step that the move of partner {whose} goes on from; nothing more was changed"
    ))
    .hint("it was restored, or failed over, to a moment before it: bring it to a later one, and say it again")
}

fn replays(dead_letters: i64) -> String {
    format!("{dead_letters} of its dead letters are being replayed, or wait for a reservation after a replay")
}
