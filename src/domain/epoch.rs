//! Whether the books are as new as the world: what workers told the broker of them, against what stands in them.
//!
//! A worker tells the broker now and then which batch it committed last. A database that lacks such a batch is older than the
//! world: a backup was taken up again, or a standby that had not heard everything. Each time that people accept such a loss the
//! books begin a new epoch, and what was told of earlier ones counts no more.

use std::{collections::BTreeSet, fmt};

use jiff::{SignedDuration, Timestamp, Unit};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{calendar::rfc3339, delivery::BatchId};

/// Which books these are, and in which epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BooksEpoch {
    /// Made with the books. A copy of them has the same.
    pub books: Uuid,
    /// 1 at first.
    pub epoch: i32,
}

/// What a worker told the broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochWord {
    pub books: Uuid,
    pub epoch: i32,
    /// Committed, and acknowledged or about to be; none where nothing ever was.
    pub batch: Option<BatchId>,
    /// When it was told, by the worker's clock.
    pub at: Timestamp,
}

/// Why no worker may go on with these books.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// They lack batches that were told.
    Missing {
        batches: usize,
        first: Timestamp,
        last: Timestamp,
        last_batch: BatchId,
        /// When the newest batch that they have was judged.
        newest: Option<Timestamp>,
    },
    /// A later epoch was begun, elsewhere: others took their place.
    LeftBehind { epoch: i32, ours: i32, at: Timestamp },
    /// What was told was told of other books.
    OtherBooks { books: Uuid, at: Timestamp },
}

impl Loss {
    /// What is lost, if anything is: of these words, of which some name batches that the books lack.
    pub fn of(
        ours: BooksEpoch,
        words: &[EpochWord],
        lacking: &BTreeSet<BatchId>,
        newest: Option<Timestamp>,
    ) -> Option<Self> {
        let counting = || words.iter().filter(|word| word.epoch >= ours.epoch);
        if let Some(word) = counting().max_by_key(|word| word.epoch)
            && word.epoch > ours.epoch
        {
            return Some(Loss::LeftBehind {
                epoch: word.epoch,
                ours: ours.epoch,
                at: word.at,
            });
        }
        if let Some(word) = counting().rfind(|word| word.books != ours.books) {
            return Some(Loss::OtherBooks {
                books: word.books,
                at: word.at,
            });
        }
        let mut missing =
            counting().filter_map(|word| word.batch.filter(|id| lacking.contains(id)).map(|id| (id, word.at)));
        let (first_batch, first) = missing.next()?;
        let (mut last_batch, mut last, mut known) = (first_batch, first, BTreeSet::from([first_batch]));
        for (batch, at) in missing {
            (last_batch, last) = (batch, at);
            known.insert(batch);
        }
        Some(Loss::Missing {
            batches: known.len(),
            first,
            last,
            last_batch,
            newest,
        })
    }

    /// The word that says so, to be said again: what was told is kept for a while only.
    pub fn told_by<'w>(&self, words: &'w [EpochWord]) -> Option<&'w EpochWord> {
        words.iter().rfind(|word| match self {
            Loss::Missing { last_batch, .. } => word.batch == Some(*last_batch),
            Loss::LeftBehind { epoch, .. } => word.epoch == *epoch,
            Loss::OtherBooks { books, .. } => word.books == *books,
        })
    }

    /// What is lost, in a name: two people accept the same if it is the same.
    pub fn name(&self) -> String {
        match self {
            Loss::Missing { last_batch, .. } => format!("up to batch {last_batch}"),
            Loss::LeftBehind { epoch, .. } => format!("up to epoch {epoch}"),
            Loss::OtherBooks { books, .. } => format!("of books {books}"),
        }
    }

    /// The epoch that takes the place of everything that was told.
    pub fn next_epoch(&self, ours: BooksEpoch) -> i32 {
        let told = match self {
            Loss::LeftBehind { epoch, .. } => *epoch,
            Loss::Missing { .. } | Loss::OtherBooks { .. } => ours.epoch,
        };
        told.saturating_add(1)
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::Missing {
                batches,
                first,
                last,
                newest,
                ..
            } => {
                let them = if *batches == 1 {
                    "1 batch".to_owned()
                } else {
                    format!("{batches} batches")
                };
                write!(
                    f,
                    "this database is older than what workers told the broker: it lacks {them} that they named from {} to {}",
                    rfc3339(*first),
                    rfc3339(*last)
                )?;
                match newest {
                    Some(newest) => {
                        let behind = last.duration_since(*newest).max(SignedDuration::ZERO);
                        let behind = behind.round(Unit::Second).unwrap_or(behind);
                        write!(
                            f,
                            ", and the newest that it has is of {}: {behind:#} are missing",
                            rfc3339(*newest)
                        )
                    }
                    None => write!(f, ", and it has none at all"),
                }
            }
            Loss::LeftBehind { epoch, ours, at } => write!(
                f,
                "this database was left behind: at {} the broker was told of epoch {epoch}, and this one is in epoch {ours}; \
                 another database took its place",
                rfc3339(*at)
            ),
            Loss::OtherBooks { books, at } => write!(
                f,
                "this database is another one than the one that settled for this broker: books {books} were told of at {}",
                rfc3339(*at)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    fn word(books: Uuid, epoch: i32, batch: u128, second: i64) -> EpochWord {
        EpochWord {
            books,
            epoch,
            batch: (batch > 0).then(|| Uuid::from_u128(batch)),
            at: at(second),
        }
    }

    #[test]
    fn what_is_lost_and_by_how_much() {
        let (books, others) = (Uuid::from_u128(7), Uuid::from_u128(8));
        let ours = BooksEpoch { books, epoch: 2 };
        let lacking: BTreeSet<BatchId> = [3, 4].map(Uuid::from_u128).into();
        let newest = Some(at(-60));
        let loss = |words: &[EpochWord]| Loss::of(ours, words, &lacking, newest);
        // What was told of an earlier epoch counts no more, whoever's it was.
        assert_eq!(loss(&[word(books, 1, 3, 0), word(others, 1, 9, 0)]), None);
        assert_eq!(loss(&[word(books, 2, 0, 0), word(books, 2, 1, 1)]), None);
        let words = [
            word(books, 2, 3, 0),
            word(books, 2, 1, 1),
            word(books, 2, 4, 5),
            word(books, 2, 4, 6),
        ];
        let missing = loss(&words).expect("two batches");
        assert_eq!(
            missing,
            Loss::Missing {
                batches: 2,
                first: at(0),
                last: at(6),
                last_batch: Uuid::from_u128(4),
                newest,
            }
        );
        assert!(missing.to_string().ends_with("1m 6s are missing"), "{missing}");
        assert_eq!(missing.told_by(&words), words.get(3));
        assert_eq!(missing.next_epoch(ours), 3);
        let words = [word(books, 2, 3, 0), word(others, 2, 1, 1)];
        let other = loss(&words).expect("others'");
        assert_eq!(
            other,
            Loss::OtherBooks {
                books: others,
                at: at(1)
            }
        );
        assert_eq!(other.told_by(&words), words.get(1));
        let words = [word(others, 5, 1, 0), word(books, 2, 3, 1)];
        let behind = loss(&words).expect("left behind");
        assert!(matches!(behind, Loss::LeftBehind { epoch: 5, ours: 2, .. }), "{behind}");
        assert_eq!(behind.next_epoch(ours), 6);
        let none_left = Loss::of(ours, &[word(books, 2, 3, 0)], &lacking, None).expect("one");
        assert!(none_left.to_string().ends_with("none at all"), "{none_left}");
    }
}
