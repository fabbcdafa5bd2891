//! The proof of the books: one at a time, for everybody who asks meanwhile, with how far it is.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use askama::Template;
use axum::response::Response;
use hyper::StatusCode;
use tokio::sync::watch;

use super::{
    Site,
    answer::{NotDone, page},
    aside,
    ask::Ask,
    frame::Frame,
    shown::{Chip, Digits, lasting},
};
use crate::desk::{Checked, Refusal};

/// A proof that takes no longer is shown as soon as it is over.
const AT_ONCE: Duration = Duration::from_millis(200);

/// How far a proof is.
enum ProofState {
    /// So many of so many questions are answered.
    Under(usize, usize),
    Over(Result<Checked, Refusal>, Duration),
}

struct OneProof {
    number: u64,
    state: watch::Receiver<ProofState>,
}

impl OneProof {
    /// Whether somebody works on it. Whose thread broke is under way no more.
    fn is_under_way(&self) -> bool {
        matches!(*self.state.borrow(), ProofState::Under(..)) && self.state.has_changed().is_ok()
    }
}

/// The newest proof.
#[derive(Default)]
pub(super) struct Proofs(Mutex<Option<Arc<OneProof>>>);

impl Proofs {
    /// The one of this number, or one that is under way, or a new one.
    fn of(&self, number: Option<u64>, ask: &Ask) -> Result<Arc<OneProof>, NotDone> {
        let mut newest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |one: &&Arc<OneProof>| Some(one.number) == number || one.is_under_way();
        if let Some(one) = newest.as_ref().filter(is_it) {
            return Ok(Arc::clone(one));
        }
        let number = newest.as_ref().map_or(1, |one| one.number + 1);
        let (tell, state) = watch::channel(ProofState::Under(0, 1));
        let desk = ask.desk.clone();
        let begun = aside::lasting(move || async move {
            let began = Instant::now();
            let checked = desk
                .check_books(|done, all| drop(tell.send_replace(ProofState::Under(done, all))))
                .await;
            tell.send_replace(ProofState::Over(checked, began.elapsed()));
        });
        if !begun {
            return Err(NotDone::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "there is no thread for a proof of the books just now: ask again in a moment",
            ));
        }
        let one = Arc::new(OneProof { number, state });
        *newest = Some(Arc::clone(&one));
        Ok(one)
    }
}

#[derive(Template)]
#[template(path = "check.html")]
struct CheckPage {
    frame: Frame,
    number: u64,
    /// How many questions of how many are answered; none where all are.
    under_way: Option<(usize, usize)>,
    state: Chip,
    problems: Vec<String>,
    counted: Vec<(String, Digits)>,
    took: String,
}

pub(super) async fn check(site: &Site, ask: &Ask) -> Result<Response, NotDone> {
    let one = site.proofs.of(ask.fields.number("of")?, ask)?;
    let mut state = one.state.clone();
    let over = state.wait_for(|state| matches!(state, ProofState::Over(..)));
    // Where it is not over soon, the page says how far it is.
    drop(tokio::time::timeout(AT_ONCE, over).await.map(|over| over.map(drop)));
    let state = one.state.borrow();
    let shown = match &*state {
        ProofState::Under(..) if one.state.has_changed().is_err() => {
            return Err(NotDone::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the proof broke before it was over; the log says more",
            ));
        }
        ProofState::Under(done, all) => CheckPage {
            frame: ask.frame("ledger", "The books"),
            number: one.number,
            under_way: Some((*done, *all)),
            state: Chip::busy("under way"),
            problems: Vec::new(),
            counted: Vec::new(),
            took: String::new(),
        },
        ProofState::Over(Err(refusal), _) => return Err(refusal.clone().into()),
        ProofState::Over(Ok(checked), took) => CheckPage {
            frame: ask.frame("ledger", "The books"),
            number: one.number,
            under_way: None,
            state: if checked.ok {
                Chip::good("the books are right")
            } else {
                Chip::bad("the books are wrong")
            },
            problems: checked.books.problems.clone(),
            counted: checked
                .books
                .counted
                .iter()
                .map(|(what, rows)| ((*what).to_owned(), Digits::of(rows)))
                .collect(),
            took: lasting(*took),
        },
    };
    Ok(page(StatusCode::OK, &shown))
}
