//! Books that are older than the world: what is lost, and two people who accept it.

use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use super::{Author, Desk, Refusal, Voice};
use crate::{
    broker::{BrokerSettings, Connection, witness},
    domain::{
        calendar::rfc3339,
        epoch::{BooksEpoch, EpochWord, Loss},
    },
};

/// What takes two people.
const ACT: &str = "recover";

/// How the books stand to what workers told the broker.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BooksStanding {
    pub books: Uuid,
    pub epoch: i32,
    /// Words that the broker has, of whatever books.
    pub words: usize,
    /// When the newest of them was told.
    pub told_at: Option<String>,
    /// What is lost, in a sentence; none where nothing is.
    pub loss: Option<String>,
    #[serde(skip)]
    lost: Option<Loss>,
}

/// What came of accepting a loss.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Recovery {
    /// `well`: nothing was lost; `lost`: nobody accepted it yet; `proposed`: one person did; `accepted`: two people did.
    pub result: &'static str,
    #[serde(flatten)]
    pub standing: BooksStanding,
    /// Who accepts it, the first first.
    pub accepted: Vec<Voice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit_id: Option<i64>,
}

impl Desk {
    /// What the broker was told of the books, against the books.
    ///
    /// # Errors
    /// Database or broker is away, or refuses.
    pub async fn books_standing(&self, broker: &BrokerSettings) -> Result<BooksStanding, Refusal> {
        let ours = self.store.books_epoch().await?;
        let connection = Connection::open_without_consumer(broker, "settled recover")
            .await
            .map_err(Refusal::no_broker)?;
        let words: Vec<EpochWord> = witness::words(&connection).await?;
        drop(connection.close().await);
        let (lacking, newest) = self.store.lacking(&words).await?;
        let lost = Loss::of(ours, &words, &lacking, newest);
        Ok(BooksStanding {
            books: ours.books,
            epoch: ours.epoch,
            words: words.len(),
            told_at: words.last().map(|word| rfc3339(word.at)),
            loss: lost.as_ref().map(ToString::to_string),
            lost,
        })
    }

    /// Looks, and where somebody accepts what is lost writes that down: with the second of two people a new epoch begins.
    ///
    /// # Errors
    /// Database or broker is away, or refuses.
    pub async fn recover(&self, broker: &BrokerSettings, accepts: Option<&Author>) -> Result<Recovery, Refusal> {
        let standing = self.books_standing(broker).await?;
        let Some(loss) = standing.lost.clone() else {
            return Ok(Recovery {
                result: "well",
                standing,
                accepted: Vec::new(),
                audit_id: None,
            });
        };
        let ours = BooksEpoch {
            books: standing.books,
            epoch: standing.epoch,
        };
        let subject = format!("epoch {}: {}", ours.epoch, loss.name());
        let Some(author) = accepts else {
            return Ok(Recovery {
                result: "lost",
                standing,
                accepted: self.store.voices(ACT, &subject).await?,
                audit_id: None,
            });
        };
        let (mut accepted, is_second) = self.voices(ACT, &subject, author).await?;
        let begins = is_second.then(|| BooksEpoch {
            epoch: loss.next_epoch(ours),
            ..ours
        });
        let filters = json!({"epoch": ours.epoch, "loss": loss.name()});
        let act = author.act(if is_second { ACT } else { "recover propose" }, &filters);
        let outcome = json!({"loss": standing.loss, "begins": begins.map(|next| next.epoch)});
        let (mine, audit_id) = self
            .store
            .accept_loss(act, self.new_voice(ACT, &subject), begins, &outcome)
            .await?;
        accepted.push(mine);
        Ok(Recovery {
            result: if is_second { "accepted" } else { "proposed" },
            standing: BooksStanding {
                epoch: begins.map_or(standing.epoch, |next| next.epoch),
                ..standing
            },
            accepted,
            audit_id: Some(audit_id),
        })
    }
}
