//! A partner moves to another cell, step by step, with a row on both sides that says how far it is. Two databases have no common
//! COMMIT, so each step can be done again, and the row of the target decides: once it says `arrived` the move can only go on, and
//! once it says `cancelled` it can only be taken back. While it lasts the partner is paused on both sides.

mod arrive;
mod handing;
mod leave;
mod standing;
mod tables;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_postgres::Row;
use uuid::Uuid;

pub use self::{
    arrive::Arriving,
    leave::Leaving,
    standing::{MoveCounts, MovedBalance},
};
use super::{
    Session, Store, StoreError,
    registry::{By, let_go_on, note},
};
use crate::fail::{self, Point};

/// How far a move is, as one side has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MovePhase {
    /// In the source: nothing of the partner is judged.
    Paused,
    /// In the target: everything is there, and nothing of it is judged yet.
    Arrived,
    /// In the source: the money is gone.
    Left,
    Done,
    Cancelled,
}

impl MovePhase {
    const ALL: [MovePhase; 5] = [
        MovePhase::Paused,
        MovePhase::Arrived,
        MovePhase::Left,
        MovePhase::Done,
        MovePhase::Cancelled,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            MovePhase::Paused => "paused",
            MovePhase::Arrived => "arrived",
            MovePhase::Left => "left",
            MovePhase::Done => "done",
            MovePhase::Cancelled => "cancelled",
        }
    }
}

/// A move, as one side has it.
#[derive(Clone, Debug)]
pub struct CellMove {
    pub id: Uuid,
    pub enterprise_id: String,
    /// The books of the other cell.
    pub other: Uuid,
    pub phase: MovePhase,
    pub begun_at: Timestamp,
    /// Since when and why the partner was in quarantine before.
    pub(super) quarantined_at: Option<Timestamp>,
    pub(super) quarantine_reason: Option<String>,
    /// Rows by table, once they have arrived.
    pub counted: Value,
}

/// What a pause came to.
#[derive(Clone, Debug)]
pub enum Pausing {
    Paused(CellMove),
    NoPartner,
    /// Replays of so many of its dead letters are under way.
    Replays(i64),
    /// It is on its way already, or it left.
    Moving,
}

const MOVE_COLUMNS: &str =
    "id, enterprise_id, other, phase, begun_at, quarantined_at, quarantine_reason, counted::text AS counted";

fn cell_move(session: &Session, row: &Row) -> Result<CellMove, StoreError> {
    let phase: &str = row.get("phase");
    let phase = MovePhase::ALL.into_iter().find(|one| one.as_str() == phase);
    Ok(CellMove {
        id: row.get("id"),
        enterprise_id: row.get("enterprise_id"),
        other: row.get("other"),
        phase: phase.ok_or_else(|| super::row::corrupt(session, "the phase of a move"))?,
        begun_at: row.get("begun_at"),
        quarantined_at: row.get("quarantined_at"),
        quarantine_reason: row.get("quarantine_reason"),
        counted: serde_json::from_str(row.get("counted"))
            .map_err(|_| super::row::corrupt(session, "what was counted of a move"))?,
    })
}

async fn find(session: &Session, id: Uuid) -> Result<Option<CellMove>, StoreError> {
    let rows = session
        .query(
            &format!("/* moves::find */ SELECT {MOVE_COLUMNS} FROM settled.moves WHERE id = $1"),
            &[&id],
        )
        .await?;
    rows.first().map(|row| cell_move(session, row)).transpose()
}

/// The same, locked for a step; None where it is not in the phase that the step begins with.
async fn lock(session: &Session, id: Uuid, phase: MovePhase) -> Result<Option<CellMove>, StoreError> {
    let rows = session
        .query(
            &format!("/* moves::lock */ SELECT {MOVE_COLUMNS} FROM settled.moves WHERE id = $1 FOR NO KEY UPDATE"),
            &[&id],
        )
        .await?;
    let found = rows.first().map(|row| cell_move(session, row)).transpose()?;
    Ok(found.filter(|found| found.phase == phase))
}

async fn advance(session: &Session, id: Uuid, phase: MovePhase) -> Result<(), StoreError> {
    session
        .execute_exactly(
            1,
            "/* moves::advance */
            UPDATE settled.moves SET phase = $2, changed_at = clock_timestamp() WHERE id = $1",
            &[&id, &phase.as_str()],
        )
        .await
}

/// Takes the partner's pause back, or what is left of it: it is in quarantine again if it was before.
async fn unpause(session: &Session, going: &CellMove) -> Result<(), StoreError> {
    session
        .execute_exactly(
            1,
            "/* moves::unpause */
            UPDATE settled.partners
            SET moving = NULL,
                quarantined_at = $2,
                quarantine_reason = $3
            WHERE enterprise_id = $1",
            &[&going.enterprise_id, &going.quarantined_at, &going.quarantine_reason],
        )
        .await?;
    if going.quarantined_at.is_none() {
        let_go_on(session, &going.enterprise_id, going.begun_at).await?;
    }
    Ok(())
}

impl Store {
    /// One move, as these books have it.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn find_move(&self, id: Uuid) -> Result<Option<CellMove>, StoreError> {
        let session = self.session("find_move").await?;
        find(&session, id).await
    }

    /// The newest move of a partner away from these books.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn newest_move(&self, enterprise_id: &str) -> Result<Option<CellMove>, StoreError> {
        let session = self.session("newest_move").await?;
        let rows = session
            .query(
                &format!(
                    "/* moves::newest_move */
                    SELECT {MOVE_COLUMNS}
                    FROM settled.moves
                    WHERE enterprise_id = $1
                      AND way = 'out'
                    ORDER BY begun_at DESC
                    LIMIT 1"
                ),
                &[&enterprise_id],
            )
            .await?;
        rows.first().map(|row| cell_move(&session, row)).transpose()
    }

    /// Pauses a partner: its messages are held from the next batch on, by whatever door they come, and nothing of its registry
    /// changes.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn pause_for_move(&self, enterprise_id: &str, other: Uuid, by: By<'_>) -> Result<Pausing, StoreError> {
        let session = self.session("pause_for_move").await?;
        session.begin().await?;
        let rows = session
            .query(
                "/* moves::pause_for_move partner */
                SELECT moving IS NOT NULL,
                       (SELECT count(*) FROM settled.dead_letters AS d
                        WHERE d.enterprise_id = p.enterprise_id AND d.state IN ('due', 'parked'))
                FROM settled.partners AS p
                WHERE enterprise_id = $1
                FOR NO KEY UPDATE",
                &[&enterprise_id],
            )
            .await?;
        let refusal = match rows.first().map(|row| (row.get(0), row.get::<_, i64>(1))) {
            None => Some(Pausing::NoPartner),
            Some((true, _)) => Some(Pausing::Moving),
            Some((false, replays)) if replays > 0 => Some(Pausing::Replays(replays)),
            Some((false, _)) => None,
        };
        if let Some(refusal) = refusal {
            session.rollback().await;
            return Ok(refusal);
        }
        let id = Uuid::now_v7();
        let rows = session
            .query(
                &format!(
                    "/* moves::pause_for_move */
                    INSERT INTO settled.moves (
                        id, enterprise_id, way, other, phase, begun_at, changed_at, quarantined_at, quarantine_reason
                    )
                    SELECT $2, enterprise_id, 'out', $3, 'paused', clock_timestamp(), clock_timestamp(),
                           quarantined_at, quarantine_reason
                    FROM settled.partners
                    WHERE enterprise_id = $1
                    RETURNING {MOVE_COLUMNS}"
                ),
                &[&enterprise_id, &id, &other],
            )
            .await?;
        let going = cell_move(&session, session.one(&rows)?)?;
        session
            .execute_exactly(
                1,
                "/* moves::pause_for_move pause */
                UPDATE settled.partners
                SET moving = $2,
                    quarantined_at = coalesce(quarantined_at, $3),
                    quarantine_reason = coalesce(quarantine_reason, 'it moves to another cell')
                WHERE enterprise_id = $1",
                &[&enterprise_id, &id, &going.begun_at],
            )
            .await?;
        tell(&session, by, &going, "partner move").await?;
        session.commit().await?;
        fail::point(Point::MovePaused).await;
        Ok(Pausing::Paused(going))
    }

    /// In the target: its messages are judged here from now on. Nothing where it is so already.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn resume_moved(&self, id: Uuid, by: By<'_>) -> Result<(), StoreError> {
        let session = self.session("resume_moved").await?;
        session.begin().await?;
        let Some(came) = lock(&session, id, MovePhase::Arrived).await? else {
            session.rollback().await;
            return Ok(());
        };
        unpause(&session, &came).await?;
        step(session, came, MovePhase::Done, by, "partner move").await?;
        fail::point(Point::MoveResumed).await;
        Ok(())
    }

    /// In the source: everything is over there, what was held too, and what comes still is the other cell's. Nothing where it is so
    /// already.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn finish_move(&self, id: Uuid, by: By<'_>) -> Result<(), StoreError> {
        let session = self.session("finish_move").await?;
        session.begin().await?;
        let Some(going) = lock(&session, id, MovePhase::Left).await? else {
            session.rollback().await;
            return Ok(());
        };
        session
            .execute_exactly(
                1,
                "/* moves::finish_move partner */
                UPDATE settled.partners
                SET left_at = date_trunc('milliseconds', clock_timestamp()),
                    quarantine_reason = 'it lives in another cell: move ' || $2::text
                WHERE enterprise_id = $1",
                &[&going.enterprise_id, &going.id.to_string()],
            )
            .await?;
        step(session, going, MovePhase::Done, by, "partner move").await?;
        fail::point(Point::MoveDone).await;
        Ok(())
    }

    /// In the target: it will never arrive, unless it has. Says what stands here then. `source` has the move's other end.
    ///
    /// # Errors
    /// The database is away or refuses; a lock is waited for in vain while somebody copies.
    pub async fn void_move(&self, going: &CellMove, source: Uuid) -> Result<MovePhase, StoreError> {
        let session = self.session("void_move").await?;
        session.begin().await?;
        session
            .execute(
                "/* moves::void_move */
                INSERT INTO settled.moves (id, enterprise_id, way, other, phase, begun_at, changed_at)
                VALUES ($1, $2, 'in', $3, 'cancelled', $4, clock_timestamp())
                ON CONFLICT (id) DO NOTHING",
                &[&going.id, &going.enterprise_id, &source, &going.begun_at],
            )
            .await?;
        let found = find(&session, going.id).await?;
        session.commit().await?;
        fail::point(Point::MoveVoided).await;
        found
            .map(|found| found.phase)
            .ok_or_else(|| StoreError::ours("void_move", "the move was written down and is not there"))
    }

    /// In the source: the partner goes on as before, and what was held is judged. Nothing where it is not paused. Whoever calls
    /// this has had the target's word before (`void_move`), on every server that may take the target's place.
    ///
    /// # Errors
    /// The database is away or refuses.
    pub async fn cancel_move(&self, id: Uuid, by: By<'_>) -> Result<(), StoreError> {
        let session = self.session("cancel_move").await?;
        session.begin().await?;
        let Some(going) = lock(&session, id, MovePhase::Paused).await? else {
            session.rollback().await;
            return Ok(());
        };
        unpause(&session, &going).await?;
        step(session, going, MovePhase::Cancelled, by, "partner move cancel").await
    }
}

/// Ends a step: the phase, the audit, the commit.
async fn step(
    session: Session,
    going: CellMove,
    phase: MovePhase,
    by: By<'_>,
    act: &'static str,
) -> Result<(), StoreError> {
    advance(&session, going.id, phase).await?;
    tell(&session, by, &CellMove { phase, ..going }, act).await?;
    session.commit().await
}

async fn tell(session: &Session, by: By<'_>, going: &CellMove, act: &'static str) -> Result<(), StoreError> {
    let about = json!({"enterpriseId": going.enterprise_id, "moveId": going.id, "otherCell": going.other});
    note(session, by, act, &about, &json!({"phase": going.phase.as_str()})).await
}
