//! Whether every message that a batch took is where its verdict says: what the batches counted, against the tables that the
//! same commits wrote. It is the auditor's view from inside, for production: one moment, read-only.
//!
//! The edges of the window are exact. A batch's time is also that of its settlements, transfers, parkings and receipts, and
//! one commit writes them all: a batch is counted with everything that belongs to it, or with nothing.

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::{Session, Store, StoreError, books::PROBLEMS_MAX, time::shown};
use crate::domain::calendar::CalendarTime;

/// How long one question may take, at the server; the server's usual limit is meant for batches.
const LONGEST: Duration = Duration::from_secs(15 * 60);

/// A moment, by the database's clock: that is the one that batches are timed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    At(CalendarTime),
    Ago(Duration),
}

/// What was compared, and how it came out.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reconciliation {
    #[serde(serialize_with = "shown")]
    pub since: CalendarTime,
    #[serde(serialize_with = "shown")]
    pub until: CalendarTime,
    pub lines: Vec<ReconcileLine>,
    /// What does not agree, one sentence for each batch or row, with both numbers; the first [`PROBLEMS_MAX`] of each line,
    /// and then one that counts the rest.
    pub problems: Vec<String>,
}

/// Two numbers that must agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReconcileLine {
    pub left: Side,
    /// What the left one must be to the right one.
    pub relation: Relation,
    pub right: Side,
    pub ok: bool,
    /// The sum of the differences, one by one: too many here do not make up for too few there.
    pub differs_by: i64,
    /// What to do where it differs.
    #[serde(rename = "do")]
    pub advice: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Side {
    pub what: &'static str,
    pub count: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Relation {
    #[serde(rename = "=")]
    Equal,
    #[serde(rename = "<=")]
    AtMost,
}

impl Relation {
    pub fn as_str(self) -> &'static str {
        match self {
            Relation::Equal => "=",
            Relation::AtMost => "<=",
        }
    }
}

/// A line before its numbers are known.
struct Equation {
    left: &'static str,
    relation: Relation,
    right: &'static str,
    advice: &'static str,
}

/// A query of rows (line, whose, left, right), over the window $1 to $2, and the lines that its rows are for.
struct Question {
    sql: &'static str,
    equations: &'static [Equation],
}

const RESTORE: &str = "the two were written by one commit: somebody altered a table, or it was restored from another moment; \
                       run `settled ledger check`, then compare with a backup";

/// What must agree. A new table that messages may come to is one more question here.
const QUESTIONS: [Question; 9] = [
    // The batches by themselves.
    Question {
        sql: "SELECT v.line, 'batch ' || b.id, v.l, v.r
            FROM settled.batches AS b
            CROSS JOIN LATERAL (
                SELECT sum((value #>> '{}')::numeric)::bigint AS total
                FROM jsonb_each(b.reasons)
                WHERE jsonb_typeof(value) = 'number'
            ) AS reasons
            CROSS JOIN LATERAL (VALUES
                (0, b.received::bigint, b.settled::bigint + b.duplicate + b.parked + b.rejected),
                (1, b.rejected::bigint, coalesce(reasons.total, 0))
            ) AS v (line, l, r)
            WHERE b.at >= $1 AND b.at < $2",
        equations: &[
            Equation {
                left: "received",
                relation: Relation::Equal,
                right: "settled + duplicate + parked + rejected",
                advice: RESTORE,
            },
            Equation {
                left: "rejected",
                relation: Relation::Equal,
                right: "rejected, summed by reason",
                advice: RESTORE,
            },
        ],
    },
    Question {
        sql: "SELECT 0, coalesce('batch ' || coalesce(b.id, s.batch_id), 'no batch'), coalesce(b.settled, 0)::bigint,
                   coalesce(s.total, 0)
            FROM (SELECT id, settled FROM settled.batches WHERE at >= $1 AND at < $2) AS b
            FULL JOIN (
                SELECT t.batch_id, count(*) AS total
                FROM settled.transfers AS t
                JOIN settled.receipts AS r ON r.key = t.receipt_key AND r.allocation_id = t.subject_id
                WHERE t.step = 1 AND t.created_at >= $1 AND t.created_at < $2
                GROUP BY t.batch_id
            ) AS s ON s.batch_id = b.id",
        equations: &[Equation {
            left: "settled",
            relation: Relation::Equal,
            right: "settlements, with what authorised them",
            advice: RESTORE,
        }],
    },
    Question {
        sql: "SELECT 0, coalesce('batch ' || coalesce(b.id, t.batch_id), 'no batch'), coalesce(b.settled, 0)::bigint,
                   coalesce(t.total, 0)
            FROM (SELECT id, settled FROM settled.batches WHERE at >= $1 AND at < $2) AS b
            FULL JOIN (
                SELECT batch_id, count(*) AS total
                FROM settled.transfers
                WHERE step = 1 AND created_at >= $1 AND created_at < $2
                GROUP BY batch_id
            ) AS t ON t.batch_id = b.id",
        equations: &[Equation {
            left: "settled",
            relation: Relation::Equal,
            right: "transfers that settle",
            advice: RESTORE,
        }],
    },
    // A receipt names the batch that gave its verdict, which is between its first and its last time. `settled` stays for
    // ever; the others are the newest of what a message came to, and who is not proven leaves none.
    Question {
        sql: "SELECT v.line, coalesce('batch ' || coalesce(b.id, r.batch_id), 'no batch'), v.l, v.r
            FROM (SELECT *, at >= $1 AND at < $2 AS inside FROM settled.batches) AS b
            FULL JOIN (
                SELECT batch_id,
                       count(*) FILTER (WHERE verdict = 'settled') AS settled,
                       count(*) FILTER (WHERE verdict = 'duplicate') AS duplicate,
                       count(*) FILTER (WHERE verdict = 'parked') AS parked,
                       count(*) FILTER (WHERE verdict = 'rejected') AS rejected
                FROM settled.receipts
                WHERE last_seen >= $1 AND first_seen < $2
                GROUP BY batch_id
            ) AS r ON r.batch_id = b.id
            CROSS JOIN LATERAL (VALUES
                (0, coalesce(r.settled, 0), coalesce(b.settled, 0)::bigint),
                (1, coalesce(r.duplicate, 0), coalesce(b.duplicate, 0)::bigint),
                (2, coalesce(r.parked, 0), coalesce(b.parked, 0)::bigint),
                (3, coalesce(r.rejected, 0), coalesce(b.rejected, 0)::bigint)
            ) AS v (line, l, r)
            WHERE b.inside IS NOT FALSE",
        equations: &[
            Equation {
                left: "receipts that say settled",
                relation: Relation::Equal,
                right: "settled",
                advice: RESTORE,
            },
            Equation {
                left: "receipts that say duplicate",
                relation: Relation::AtMost,
                right: "duplicate",
                advice: RESTORE,
            },
            Equation {
                left: "receipts that say parked",
                relation: Relation::AtMost,
                right: "parked",
                advice: RESTORE,
            },
            Equation {
                left: "receipts that say rejected",
                relation: Relation::AtMost,
                right: "rejected",
                advice: RESTORE,
            },
        ],
    },
    // Parked messages. The first is of all time: a message may wait across the edge.
    Question {
        sql: "SELECT 0, 'parked message ' || coalesce(p.key, s.key), count(p.key), coalesce(max(s.left_over), 0)
            FROM settled.parked AS p
            FULL JOIN (
                SELECT key,
                       (count(*) FILTER (WHERE step = 'parked') - count(*) FILTER (WHERE step = 'left')) AS left_over
                FROM settled.parkings
                GROUP BY key
            ) AS s ON s.key = p.key
            GROUP BY coalesce(p.key, s.key)
            UNION ALL
            SELECT 1, format('what was parked at %s', e.at), e.total, coalesce(b.total, 0)
            FROM (
                SELECT at, count(*) AS total
                FROM settled.parkings
                WHERE step = 'parked' AND at >= $1 AND at < $2
                GROUP BY at
            ) AS e
            LEFT JOIN (
                SELECT at, sum(parked)::bigint AS total
                FROM settled.batches
                WHERE at >= $1 AND at < $2
                GROUP BY at
            ) AS b ON b.at = e.at",
        equations: &[
            Equation {
                left: "messages that wait now",
                relation: Relation::Equal,
                right: "parked and not left yet, of all time",
                advice: RESTORE,
            },
            Equation {
                left: "messages that began to wait",
                relation: Relation::AtMost,
                right: "parked",
                advice: RESTORE,
            },
        ],
    },
    // The side room. The first is of all time: a message may wait across the edge.
    Question {
        sql: "SELECT 0, 'held pack ' || coalesce(h.id, s.held_id), coalesce(h.messages, 0)::bigint, coalesce(s.left_over, 0)
            FROM settled.held AS h
            FULL JOIN (
                SELECT held_id, sum(CASE step WHEN 'held' THEN messages ELSE -messages END) AS left_over
                FROM settled.holdings
                GROUP BY held_id
            ) AS s ON s.held_id = h.id
            UNION ALL
            SELECT 1, 'batch ' || s.batch_id, coalesce(b.received, 0)::bigint, s.total
            FROM (
                SELECT batch_id, sum(messages) AS total
                FROM settled.holdings
                WHERE step = 'left' AND at >= $1 AND at < $2
                GROUP BY batch_id
            ) AS s
            LEFT JOIN settled.batches AS b ON b.id = s.batch_id",
        equations: &[
            Equation {
                left: "messages that are held now",
                relation: Relation::Equal,
                right: "held and not left yet, of all time",
                advice: RESTORE,
            },
            Equation {
                left: "received from what was held",
                relation: Relation::Equal,
                right: "messages that left to be judged",
                advice: RESTORE,
            },
        ],
    },
    // An event each, and a dead letter for what is rejected; a message that waits already is told nothing. Rows of format 3 belong
    // to no batch, and can say nothing but what was done to partners; one of them that the broker refused and that was put back
    // is a row of format 1, whose head says what it is.
    Question {
        sql: r#"SELECT 0, 'outbox row of batch ' || o.batch_id, o.count,
                   coalesce(b.settled::bigint + b.duplicate + b.parked + 2 * b.rejected, 0) + o.notices
            FROM (
                SELECT coalesce(of_batch, batch_id) AS batch_id, sum(count)::bigint AS count,
                       coalesce(sum(count) FILTER (
                           WHERE format = 3
                              OR (format = 1 AND of_batch IS NOT NULL
                             AND encode(substring(publications FROM 5 FOR 80), 'escape')
                                 ~ '^\[\{"kind":"event","exchange":"settlement\.events","routing_key":"(partner|key)\.')
                       ), 0)::bigint AS notices
                FROM settled.outbox
                GROUP BY 1
            ) AS o
            LEFT JOIN settled.batches AS b ON b.id = o.batch_id"#,
        equations: &[Equation {
            left: "events and dead letters still to publish, of all time",
            relation: Relation::AtMost,
            right: "what their batches had to say",
            advice: "an outbox row says more than its batch: do not let it out before somebody looked at it",
        }],
    },
    Question {
        sql: "SELECT 0, 'batch ' || r.batch_id || ', refused by the broker: ' || r.refusal, count(*), 0::bigint
            FROM settled.outbox_refused AS r
            WHERE r.at >= $1 AND r.at < $2
            GROUP BY r.batch_id, r.refusal",
        equations: &[Equation {
            left: "events and dead letters that the broker refused",
            relation: Relation::Equal,
            right: "none",
            advice: "nobody has heard them: mend what the broker says of them (`settled outbox list`), then \
                     `settled outbox retry` publishes them",
        }],
    },
    // Nothing is known of the queues: a refusal may be in the outbox, in settlement.dead, or collected, and a row is one
    // message however often it failed. What was refused first in the window was refused by a batch of the window.
    Question {
        sql: "SELECT 0, 'the window',
                   (SELECT count(*)
                    FROM settled.dead_letters
                    WHERE made_by = 'settled' AND first_failed_at >= $1 AND first_failed_at < $2),
                   (SELECT coalesce(sum(rejected), 0)::bigint FROM settled.batches WHERE at >= $1 AND at < $2)",
        equations: &[Equation {
            left: "messages that were refused and collected",
            relation: Relation::AtMost,
            right: "rejected",
            advice: "a dead letter that no batch rejected: somebody else publishes to settlement.dead",
        }],
    },
];

/// What is published is taken, or waits somewhere: in the outbox, set aside, or in its queue. By the time of its batch, which
/// a dead letter says; of batches of one moment the larger one counts, since two may have refused the same message.
const LETTERS: &str = "\
    /* reconcile::letters */
    SELECT format('dead letters of %s', b.at) AS whose, b.letters AS l, coalesce(t.letters, 0) + b.aside AS r
    FROM (
        SELECT b.at, max(b.letters)::bigint AS letters, sum(coalesce(r.aside, 0))::bigint AS aside
        FROM settled.batches AS b
        LEFT JOIN (SELECT batch_id, count(*) AS aside FROM settled.outbox_refused GROUP BY batch_id) AS r
               ON r.batch_id = b.id
        WHERE b.at >= $1 AND b.at < $2
          AND b.letters > 0
          AND NOT EXISTS (SELECT FROM settled.outbox AS o WHERE b.id IN (o.batch_id, o.of_batch))
        GROUP BY b.at
    ) AS b
    LEFT JOIN settled.letters_taken AS t ON t.failed_at = b.at
    ORDER BY b.at";

/// The line of `LETTERS`.
pub const PUBLISHED: &str = "dead letters that batches published";

/// What waits in the queue of dead letters, so far as the broker says.
#[derive(Clone, Copy, Debug)]
pub enum Waiting {
    /// At most so many.
    AtMost(u64),
    /// The broker was not asked, or does not answer.
    Unknown,
}

async fn letters(session: &Session, waiting: Waiting, found: &mut Reconciliation) -> Result<(), StoreError> {
    let rows = session.query(LETTERS, &[&found.since, &found.until]).await?;
    let (mut published, mut taken, mut missing) = (0_i64, 0_i64, 0_i64);
    let mut problems = Vec::new();
    for row in &rows {
        let (whose, l, r): (String, i64, i64) = (row.get("whose"), row.get("l"), row.get("r"));
        published += l;
        taken += r.min(l);
        if r < l {
            missing += l - r;
            problems.push(format!("{whose}: {l} published, and {r} taken or set aside"));
        }
    }
    let (waiting, is_known) = match waiting {
        Waiting::AtMost(waiting) => (i64::try_from(waiting).unwrap_or(i64::MAX), true),
        Waiting::Unknown => (i64::MAX, false),
    };
    let ok = missing <= waiting;
    found.lines.push(ReconcileLine {
        left: Side {
            what: PUBLISHED,
            count: published,
        },
        relation: Relation::Equal,
        right: Side {
            what: if is_known {
                "taken, set aside or waiting in settlement.dead"
            } else {
                "taken, set aside or perhaps waiting in settlement.dead (the broker was not asked)"
            },
            count: if ok { published } else { taken.saturating_add(waiting) },
        },
        ok,
        differs_by: if ok { 0 } else { missing.saturating_sub(waiting) },
        advice: "a dead letter left its queue and came to nobody: deleted or expired there, or held for long by somebody \
                 else's consumer; the message is lost unless its sender has it, its event was told",
    });
    if !ok {
        let rest = problems.len().saturating_sub(PROBLEMS_MAX);
        problems.truncate(PROBLEMS_MAX);
        found.problems.append(&mut problems);
        if rest > 0 {
            found
                .problems
                .push(format!("and {rest} more moments with dead letters that never came"));
        }
    }
    Ok(())
}

impl Store {
    /// Compares what batches of a window counted with what they wrote, all of it in one moment. Without an end the window
    /// ends now.
    ///
    /// # Errors
    /// The database is away or refuses. What does not agree is no error.
    pub async fn reconcile(
        &self,
        since: Moment,
        until: Option<Moment>,
        waiting: Waiting,
    ) -> Result<Reconciliation, StoreError> {
        let mut session = self.session("reconcile").await?;
        // The server gives up first, and says so.
        session.deadline = LONGEST + LONGEST / 10;
        session.begin_read_only().await?;
        let settings = [
            format!("statement_timeout = {}", LONGEST.as_millis()),
            // Sums over whole tables: hashes that stay in memory are worth it for one connection.
            "work_mem = '64MB'".to_owned(),
        ];
        for setting in settings {
            session
                .execute(&format!("/* reconcile::begin */ SET LOCAL {setting}"), &[])
                .await?;
        }
        let now = clock(&session).await?;
        let at = |moment| match moment {
            Moment::At(time) => time,
            Moment::Ago(duration) => CalendarTime::from(now.saturating_sub(duration).unwrap_or(Timestamp::MIN)),
        };
        let mut reconciliation = Reconciliation {
            since: at(since),
            until: until.map_or(now.into(), at),
            lines: Vec::new(),
            problems: Vec::new(),
        };
        for question in &QUESTIONS {
            ask(&session, question, &mut reconciliation).await?;
        }
        letters(&session, waiting, &mut reconciliation).await?;
        session.rollback().await;
        Ok(reconciliation)
    }
}

/// The first millisecond that is not over yet: what committed before this moment is inside of it.
async fn clock(session: &Session) -> Result<Timestamp, StoreError> {
    let rows = session
        .query(
            "/* reconcile::clock */
            SELECT date_trunc('milliseconds', clock_timestamp()) + interval '1 millisecond'",
            &[],
        )
        .await?;
    Ok(session.one(&rows)?.get(0))
}

async fn ask(session: &Session, question: &Question, found: &mut Reconciliation) -> Result<(), StoreError> {
    let relations: Vec<&str> = question
        .equations
        .iter()
        .map(|equation| equation.relation.as_str())
        .collect();
    let rows = session
        .query(
            &format!(
                // Both edges have a type, even where a question is of all time.
                "/* reconcile::ask */
                WITH edges AS (SELECT $1::timestamptz, $2::timestamptz),
                sides AS MATERIALIZED (
                    SELECT q.line, q.whose, q.l, q.r,
                           q.l > q.r OR (q.l < q.r AND ($3::text[])[q.line + 1] = '=') AS wrong
                    FROM ({}) AS q (line, whose, l, r)
                )
                SELECT n.line, coalesce(s.l, 0) AS l, coalesce(s.r, 0) AS r, coalesce(s.wrong, 0) AS wrong,
                       coalesce(s.differs_by, 0) AS differs_by,
                       ARRAY(
                           SELECT w.whose FROM sides AS w WHERE w.wrong AND w.line = n.line
                           ORDER BY w.whose LIMIT {PROBLEMS_MAX}
                       ) AS whose,
                       ARRAY(
                           SELECT ARRAY[w.l, w.r]::text FROM sides AS w WHERE w.wrong AND w.line = n.line
                           ORDER BY w.whose LIMIT {PROBLEMS_MAX}
                       ) AS numbers
                FROM generate_series(0, array_length($3::text[], 1) - 1) AS n (line)
                LEFT JOIN (
                    SELECT line, sum(l)::bigint AS l, sum(r)::bigint AS r, count(*) FILTER (WHERE wrong) AS wrong,
                           (sum(abs(l - r)) FILTER (WHERE wrong))::bigint AS differs_by
                    FROM sides
                    GROUP BY line
                ) AS s ON s.line = n.line
                ORDER BY n.line",
                question.sql
            ),
            &[&found.since, &found.until, &relations],
        )
        .await?;
    for (equation, row) in question.equations.iter().zip(&rows) {
        let wrong: i64 = row.get("wrong");
        found.lines.push(ReconcileLine {
            left: Side {
                what: equation.left,
                count: row.get("l"),
            },
            relation: equation.relation,
            right: Side {
                what: equation.right,
                count: row.get("r"),
            },
            ok: wrong == 0,
            differs_by: row.get("differs_by"),
            advice: equation.advice,
        });
        let (whose, numbers): (Vec<String>, Vec<String>) = (row.get("whose"), row.get("numbers"));
        let spelled = whose.len();
        for (whose, numbers) in whose.iter().zip(&numbers) {
            let (left, right) = numbers
                .trim_matches(['{', '}'])
                .split_once(',')
                .unwrap_or((numbers.as_str(), ""));
            found.problems.push(format!(
                "{whose}: {left} {}, and {right} {}",
                equation.left, equation.right
            ));
        }
        let rest = wrong.saturating_sub(i64::try_from(spelled).unwrap_or(i64::MAX));
        if rest > 0 {
            found.problems.push(format!(
                "and {rest} more where {} is not {}",
                equation.left, equation.right
            ));
        }
    }
    Ok(())
}
