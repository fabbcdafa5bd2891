//! Every settlement's signature, verified again: on all cores, a part of the table at a time.

use std::{fmt, future::Future, pin::pin, sync::Arc};

use futures_util::{StreamExt, stream};
use serde::Serialize;

use super::{Desk, Refusal};
use crate::{
    domain::authority::{self, Register},
    retry::Backoff,
    store::{Fate, books::PROBLEMS_MAX, signatures::TableExtent},
};

/// Blocks of the table that are read and verified as one piece: some hundred settlements.
const PIECE: u32 = 64;

/// How far a check has come; one that was ended goes on there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignaturePlace {
    file: u32,
    block: u32,
}

impl SignaturePlace {
    /// Reads what a check said.
    ///
    /// # Errors
    /// How it is written.
    pub fn parse(text: &str) -> Result<Self, String> {
        let read = || {
            let (file, block) = text.split_once('.')?;
            Some(Self {
                file: file.parse().ok()?,
                block: block.parse().ok()?,
            })
        };
        read().ok_or_else(|| "two numbers with a dot between them, as a check that was ended says".to_owned())
    }
}

impl fmt::Display for SignaturePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.file, self.block)
    }
}

impl Serialize for SignaturePlace {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct SignatureNews {
    pub verified: u64,
    /// Of the table, in thousandths.
    pub read: u64,
    pub place: SignaturePlace,
}

/// What became of verifying signatures.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SignaturesChecked {
    /// Settlements that were looked at.
    pub verified: u64,
    /// Of these, whose signature does not authorise them.
    pub forged: u64,
    /// Where it goes on (`--after`); none once it came to the end.
    pub next: Option<SignaturePlace>,
    /// One sentence each; at most so many as the proof of the books spells out.
    #[serde(skip)]
    pub problems: Vec<String>,
}

/// A piece of the table.
#[derive(Default)]
struct Piece {
    verified: u64,
    forged: u64,
    problems: Vec<String>,
}

impl Desk {
    /// Verifies the signature of every settlement again, from a place on, until it is told to stop. What commits meanwhile may be
    /// left out.
    ///
    /// # Errors
    /// The database is away; the table was written anew since that place was said. What is forged is no error.
    pub async fn check_signatures(
        &self,
        after: Option<SignaturePlace>,
        stop: impl Future<Output = ()>,
        mut news: impl FnMut(SignatureNews),
    ) -> Result<SignaturesChecked, Refusal> {
        let TableExtent { file, blocks } = self.store.settlements_extent().await?;
        if after.is_some_and(|after| after.file != file) {
            return Err(
                Refusal::refused("the table of transfers was written anew since this place was said")
                    .hint("begin anew, without --after"),
            );
        }
        let register = Arc::new(Register {
            keys: self.store.key_lives().await?,
            symbols: self.store.symbol_lives().await?,
        });
        let start = after.map_or(0, |after| after.block.min(blocks));
        let cores = tokio::runtime::Handle::current().metrics().num_workers();
        // One more than cores: while it waits for the database, they work.
        let at_once = cores.saturating_add(1).min(self.settings.database.pool_size).max(1);
        let mut pieces = stream::iter((start..blocks).step_by(PIECE as usize))
            .map(|from| {
                let (desk, register) = (self.clone(), Arc::clone(&register));
                let until = from.saturating_add(PIECE).min(blocks);
                // A task of its own, so that pieces are read on several threads.
                let piece = tokio::spawn(async move { desk.verify(from..until, &register).await });
                async move { (until, piece.await) }
            })
            .buffered(at_once);
        let mut stop = pin!(stop);
        let mut found = SignaturesChecked {
            verified: 0,
            forged: 0,
            next: None,
            problems: Vec::new(),
        };
        let mut block = start;
        loop {
            let (until, piece) = tokio::select! {
                biased;
                () = &mut stop => {
                    found.next = (block < blocks).then_some(SignaturePlace { file, block });
                    break;
                }
                piece = pieces.next() => match piece {
                    Some(piece) => piece,
                    None => break,
                },
            };
            let place = SignaturePlace { file, block };
            let piece = piece
                .unwrap_or_else(|_| {
                    Err(Refusal::ours(
                        "a signature could not be verified: the program's own code failed",
                    ))
                })
                .map_err(|refusal| resumed(refusal, place))?;
            block = until;
            found.verified += piece.verified;
            found.forged += piece.forged;
            let room = PROBLEMS_MAX.saturating_sub(found.problems.len());
            found.problems.extend(piece.problems.into_iter().take(room));
            news(SignatureNews {
                verified: found.verified,
                read: u64::from(block) * 1_000 / u64::from(blocks).max(1),
                place: SignaturePlace { file, block },
            });
        }
        let rest = found.forged.saturating_sub(found.problems.len() as u64);
        if rest > 0 {
            found.problems.push(format!("and {rest} more settlements like these"));
        }
        Ok(found)
    }

    async fn verify(&self, blocks: std::ops::Range<u32>, register: &Arc<Register>) -> Result<Piece, Refusal> {
        let mut piece = Piece::default();
        let mut after = None;
        let patience = self.settings.retry.transient_attempts;
        let mut backoff = Backoff::new(&self.settings.retry);
        loop {
            let part = self.store.authorised(blocks.clone(), after.as_ref()).await;
            let part = match part {
                // Somebody was in the way: nothing was done, and it is asked again, not for ever.
                Err(error) if error.fate == Fate::Retry && backoff.attempts() < patience => {
                    tokio::time::sleep(backoff.next()).await;
                    continue;
                }
                part => part?,
            };
            piece.verified += part.settlements.len() as u64;
            let (settlements, register) = (part.settlements, Arc::clone(register));
            let objections = tokio::task::spawn_blocking(move || -> Vec<String> {
                let each = settlements.iter();
                each.filter_map(|settlement| authority::objection(settlement, &register))
                    .collect()
            });
            let objections = objections
                .await
                .map_err(|_| Refusal::ours("a signature could not be verified: the program's own code failed"))?;
            piece.forged += objections.len() as u64;
            let room = PROBLEMS_MAX.saturating_sub(piece.problems.len());
            piece.problems.extend(objections.into_iter().take(room));
            match part.more {
                Some(more) => after = Some(more),
                None => return Ok(piece),
            }
        }
    }
}

/// A refusal on the way: what was done need not be done again.
fn resumed(refusal: Refusal, place: SignaturePlace) -> Refusal {
    let hint = match &refusal.hint {
        Some(hint) => format!("{hint}; go on with --after {place}"),
        None => format!("go on with --after {place}"),
    };
    refusal.hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_said() {
        let place = SignaturePlace {
            file: 16_437,
            block: 12,
        };
        assert_eq!(place.to_string(), "16437.12");
        assert_eq!(SignaturePlace::parse("16437.12"), Ok(place));
        for text in ["", "1", "1.", ".1", "1.2.3", "-1.2", "a.b", "1.99999999999"] {
            assert!(SignaturePlace::parse(text).is_err(), "{text}");
        }
    }
}
