//! Draws a plan from its seed.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::{Balances, Deposit, Expected, Item, Plan, Shape, WAVES_BETWEEN, Wave};
use crate::{
    domain::{
        allocation::Kind,
        delivery::Publication,
        digest::sha256,
        ledger::{Amount, Quantity},
        reason::Reason,
        update::{Outcome, Update},
    },
    partner::{Dice, Flaw, Reservation, SigningPartner},
};

const CURRENCIES: [&str; 2] = ["BTC", "ETH"];

/// A kind of message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Plain,
    SameBytes,
    NewNonce,
    ParkedThenReserved,
    NeverReserved,
    Flaw(Flaw),
    UnknownPartner,
    Suspended,
    OtherPartner,
    OtherType,
    NonceReused,
    AlreadySettled,
}

impl Case {
    /// Whether it builds on a settlement that has happened.
    fn looks_back(self) -> bool {
        match self {
            Case::NewNonce | Case::NonceReused | Case::AlreadySettled => true,
            Case::Plain
            | Case::SameBytes
            | Case::ParkedThenReserved
            | Case::NeverReserved
            | Case::Flaw(_)
            | Case::UnknownPartner
            | Case::Suspended
            | Case::OtherPartner
            | Case::OtherType => false,
        }
    }
}

/// Every way in which a partner can be refused, in the order of the table.
const INVALID: [Case; 17] = [
    Case::Flaw(Flaw::TooLarge),
    Case::Flaw(Flaw::Malformed),
    Case::Flaw(Flaw::Field),
    Case::UnknownPartner,
    Case::Flaw(Flaw::Sender),
    Case::Flaw(Flaw::Signature),
    Case::Flaw(Flaw::Stranger),
    Case::Flaw(Flaw::Payload),
    Case::NonceReused,
    Case::Flaw(Flaw::Expired),
    Case::Flaw(Flaw::Policy),
    Case::Suspended,
    Case::NeverReserved,
    Case::OtherPartner,
    Case::OtherType,
    Case::Flaw(Flaw::Mismatch),
    Case::AlreadySettled,
];

/// Something that settles, for others to build on.
#[derive(Clone)]
struct Done {
    item: usize,
    wave: usize,
    partner: usize,
    draft: Update,
    /// It was cleared and nothing of it went back yet.
    allocated: bool,
}

struct Planner<'a> {
    shape: &'a Shape,
    dice: Dice,
    partners: Vec<SigningPartner>,
    suspended: SigningPartner,
    bound: SigningPartner,
    stranger: SigningPartner,
    items: Vec<Item>,
    done: Vec<Done>,
    reservations: Vec<Reservation>,
    wave_reservations: Vec<Reservation>,
    late: Vec<(usize, Reservation)>,
    deposits: BTreeMap<(Uuid, String), i128>,
    balances: Balances,
    references: usize,
}

impl Plan {
    pub(in crate::cli) fn draw(shape: &Shape) -> Self {
        let partner =
            |name: &str| SigningPartner::draw(name, &mut Dice::new(shape.seed, &format!("{}/{name}", shape.run)));
        let partners: Vec<SigningPartner> = shape.enterprises.iter().map(|name| partner(name)).collect();
        let mut bound = partner(&format!("{}-bound", shape.run));
        bound.user_id = Some(shape.user.clone());
        let mut planner = Planner {
            shape,
            dice: Dice::new(shape.seed, &shape.run),
            partners,
            suspended: partner(&format!("{}-suspended", shape.run)),
            bound,
            stranger: partner(&format!("{}-unknown", shape.run)),
            items: Vec::with_capacity(shape.messages),
            done: Vec::new(),
            reservations: Vec::new(),
            wave_reservations: Vec::new(),
            late: Vec::new(),
            deposits: BTreeMap::new(),
            balances: Balances::new(),
            references: 0,
        };
        let cases = planner.cases();
        let mut waves = Vec::new();
        let mut postponed = Vec::new();
        for number in 0..shape.waves {
            let start = shape.messages * number / shape.waves;
            let end = shape.messages * (number + 1) / shape.waves;
            for case in cases.get(start..end).unwrap_or_default() {
                // What has nothing to look back on yet comes later; something plain takes its place.
                let case = if case.looks_back() && number < WAVES_BETWEEN {
                    postponed.push(*case);
                    Case::Plain
                } else if *case == Case::Plain && number >= WAVES_BETWEEN {
                    postponed.pop().unwrap_or(Case::Plain)
                } else {
                    *case
                };
                planner.add(case, number);
            }
            waves.push(Wave {
                items: start..end,
                reservations: std::mem::take(&mut planner.wave_reservations),
            });
        }
        planner.into_plan(waves)
    }
}

impl Planner<'_> {
    /// What kind of message stands where.
    fn cases(&mut self) -> Vec<Case> {
        let messages = self.shape.messages;
        let invalid = messages * self.shape.invalid_percent / 100;
        let mut parked = vec![Case::ParkedThenReserved; self.shape.parked_then_reserved.min(messages)];
        let mut cases: Vec<Case> = Vec::with_capacity(messages);
        // Few wrong messages are not always the same ones.
        let first = self.dice.below(INVALID.len());
        for case in INVALID.iter().cycle().skip(first).take(invalid) {
            // What waits for a deadline begins early.
            if *case == Case::NeverReserved {
                &mut parked
            } else {
                &mut cases
            }
            .push(*case);
        }
        let repeated = (messages - invalid) * self.shape.repeated_percent / 100;
        cases.extend([Case::SameBytes, Case::NewNonce].into_iter().cycle().take(repeated));
        cases.resize(messages.saturating_sub(parked.len()), Case::Plain);
        self.dice.shuffle(&mut cases);
        self.dice.shuffle(&mut parked);
        let early = (messages / 5).max(1);
        let step = (early / parked.len().max(1)).max(1);
        for (index, case) in parked.into_iter().enumerate() {
            cases.insert((index * step).min(cases.len()), case);
        }
        cases
    }

    fn nonce(&self) -> String {
        format!("{}-{:06}", self.shape.run, self.items.len())
    }

    fn push(&mut self, draft: &Update, publication: Publication, expected: Expected, repeats: Option<usize>) -> usize {
        let event = format!("{}.{}", draft.kind.as_str(), draft.outcome.as_str());
        self.items.push(Item {
            digest: sha256(&publication.body),
            publication,
            enterprise_id: draft.enterprise_id.clone(),
            nonce: draft.nonce.clone(),
            expected,
            repeats,
            event,
        });
        self.items.len() - 1
    }

    fn amount(&mut self) -> Amount {
        let (currency, unit) = match self.dice.below(CURRENCIES.len()) {
            0 => ("BTC", 1_000_u64),
            _ => ("ETH", 1_000_000_000_000_000),
        };
        let quantity = (self.dice.number() % 5_000 + 1)
            .saturating_mul(unit)
            .saturating_add(self.dice.number() % unit);
        Amount {
            currency: currency.to_owned(),
            // A number of digits without leading zeros.
            quantity: Quantity::parse(&quantity.to_string()).unwrap_or_else(|why| unreachable!("{quantity} {why}")),
        }
    }

    fn new_reservation(&mut self, partner: &SigningPartner, kind: Kind, amount: Amount) -> Reservation {
        self.references += 1;
        let reference = format!("{}-{:06}", self.shape.run, self.references);
        partner.reservation(kind, amount, reference, &mut self.dice)
    }

    fn outcome(&mut self) -> Outcome {
        const WHY: [&str; 4] = [
            "insufficient collateral",
            "counterparty \"limit\" reached",
            "余额不足 — risk desk said no",
            "account under review",
        ];
        if self.dice.percent(82) {
            return Outcome::Cleared;
        }
        Outcome::Released {
            reject_reason: self.dice.pick(&WHY).copied().unwrap_or_default().to_owned(),
        }
    }

    /// A transfer in the model of the accounts.
    fn transfer(&mut self, debit: (&str, Option<Uuid>), credit: (&str, Option<Uuid>), amount: &Amount) {
        let quantity = number(amount);
        for ((kind, owner), change) in [(debit, -quantity), (credit, quantity)] {
            *self
                .balances
                .entry((kind.to_owned(), owner, amount.currency.clone()))
                .or_default() += change;
        }
    }

    fn model_reserve(&mut self, partner: &SigningPartner, reservation: &Reservation) {
        let (client, connection) = (Some(partner.client_id), Some(partner.connection_id));
        let amount = &reservation.amount;
        match reservation.kind {
            Kind::Allocation => {
                *self
                    .deposits
                    .entry((partner.client_id, amount.currency.clone()))
                    .or_default() += number(amount);
                self.transfer(("available", client), ("held", connection), amount);
            }
            Kind::Deallocation => self.transfer(("allocated", connection), ("held", connection), amount),
        }
    }

    fn model_settle(&mut self, partner: &SigningPartner, draft: &Update) {
        let (client, connection) = (Some(partner.client_id), Some(partner.connection_id));
        let credit = match (draft.kind, &draft.outcome) {
            (Kind::Allocation, Outcome::Cleared) | (Kind::Deallocation, Outcome::Released { .. }) => {
                ("allocated", connection)
            }
            (Kind::Allocation, Outcome::Released { .. }) | (Kind::Deallocation, Outcome::Cleared) => {
                ("available", client)
            }
        };
        self.transfer(("held", connection), credit, &draft.amount);
    }

    fn add(&mut self, case: Case, wave: usize) {
        // The bound partner has a small share of everything, too.
        let number = if self.dice.percent(4) {
            self.partners.len()
        } else {
            self.dice.below(self.partners.len())
        };
        let partner = self.partners.get(number).unwrap_or(&self.bound).clone();
        match case {
            Case::Plain => self.add_plain(&partner, number, wave),
            Case::SameBytes => {
                let earlier = self
                    .done
                    .iter()
                    .rev()
                    .find(|done| done.partner == number)
                    .map(|done| done.item);
                match earlier.and_then(|item| Some((item, self.items.get(item)?.clone()))) {
                    Some((item, earlier)) => self.items.push(Item {
                        expected: Expected::Duplicate,
                        repeats: Some(item),
                        ..earlier
                    }),
                    None => self.add_plain(&partner, number, wave),
                }
            }
            Case::NewNonce | Case::NonceReused | Case::AlreadySettled => match self.earlier(number, wave) {
                Some(done) => self.add_looking_back(case, &partner, &done),
                None => self.add_plain(&partner, number, wave),
            },
            Case::ParkedThenReserved => {
                let amount = self.amount();
                let reservation = self.new_reservation(&partner, Kind::Allocation, amount);
                let draft = partner.draft(&reservation, Outcome::Cleared, self.nonce());
                let item = self.push(&draft, partner.update(&draft), Expected::ParkedThenSettled, None);
                self.model_reserve(&partner, &reservation);
                self.model_settle(&partner, &draft);
                self.late.push((item, reservation));
            }
            Case::NeverReserved => {
                let amount = self.amount();
                let nowhere = self.new_reservation(&partner, Kind::Allocation, amount);
                let outcome = self.outcome();
                let draft = partner.draft(&nowhere, outcome, self.nonce());
                let expected = if self.shape.park_runs_out {
                    Expected::ParkedThenRejected
                } else {
                    Expected::Parked
                };
                self.push(&draft, partner.update(&draft), expected, None);
            }
            Case::Flaw(Flaw::Sender) => self.add_sender_mismatch(),
            Case::Flaw(fault) => {
                let outcome = self.outcome();
                let draft = match self.target(number) {
                    Some(target) => partner.draft(&target, outcome, self.nonce()),
                    None => return self.add_plain(&partner, number, wave),
                };
                let publication = partner.wrong(draft.clone(), fault, &mut self.dice);
                self.push(&draft, publication, Expected::Rejected(fault.reason()), None);
            }
            Case::UnknownPartner | Case::Suspended => {
                let (sender, reason) = if case == Case::Suspended {
                    (self.suspended.clone(), Reason::PartnerInactive)
                } else {
                    (self.stranger.clone(), Reason::UnknownPartner)
                };
                let amount = self.amount();
                let reservation = self.new_reservation(&sender, Kind::Allocation, amount);
                let draft = sender.draft(&reservation, Outcome::Cleared, self.nonce());
                self.push(&draft, sender.update(&draft), Expected::Rejected(reason), None);
            }
            Case::OtherPartner | Case::OtherType => {
                let Some(mut target) = self.target(number) else {
                    return self.add_plain(&partner, number, wave);
                };
                let sender = if case == Case::OtherPartner {
                    let other = if number < self.partners.len() { number + 1 } else { 0 };
                    self.partners.get(other).unwrap_or(&self.bound).clone()
                } else {
                    target.kind = match target.kind {
                        Kind::Allocation => Kind::Deallocation,
                        Kind::Deallocation => Kind::Allocation,
                    };
                    partner
                };
                let draft = sender.draft(&target, Outcome::Cleared, self.nonce());
                self.push(
                    &draft,
                    sender.update(&draft),
                    Expected::Rejected(Reason::NotPermitted),
                    None,
                );
            }
        }
    }

    /// An allocation, or a deallocation of what an earlier one allocated.
    fn add_plain(&mut self, partner: &SigningPartner, number: usize, wave: usize) {
        let source = if self.dice.percent(45) {
            self.done
                .iter()
                .position(|done| done.partner == number && done.allocated && done.wave + WAVES_BETWEEN <= wave)
        } else {
            None
        };
        let source = source.and_then(|index| self.done.get_mut(index));
        let (kind, amount) = match source {
            Some(source) => {
                source.allocated = false;
                (Kind::Deallocation, source.draft.amount.clone())
            }
            None => (Kind::Allocation, self.amount()),
        };
        let reservation = self.new_reservation(partner, kind, amount);
        let outcome = self.outcome();
        let mut draft = partner.draft(&reservation, outcome, self.nonce());
        let publication = match self.dice.below(10) {
            0 => partner.update_in_other_words(&draft),
            1 => {
                draft.evaluation_id = Some(format!("evaluation-{}", draft.nonce));
                draft.policy_result = Some(crate::domain::allocation::PolicyResult::Approved);
                if draft.outcome != Outcome::Cleared {
                    draft.policy_result = Some(crate::domain::allocation::PolicyResult::Rejected);
                }
                partner.update(&draft)
            }
            _ => partner.update(&draft),
        };
        let item = self.push(&draft, publication, Expected::Settled, None);
        self.model_reserve(partner, &reservation);
        self.model_settle(partner, &draft);
        match kind {
            Kind::Allocation => self.reservations.push(reservation),
            Kind::Deallocation => self.wave_reservations.push(reservation),
        }
        self.done.push(Done {
            item,
            wave,
            partner: number,
            allocated: kind == Kind::Allocation && draft.outcome == Outcome::Cleared,
            draft,
        });
    }

    fn add_looking_back(&mut self, case: Case, partner: &SigningPartner, done: &Done) {
        let mut draft = done.draft.clone();
        let (expected, repeats) = match case {
            Case::NonceReused => {
                draft.partners_id.push_str("-again");
                (Expected::Rejected(Reason::NonceReused), None)
            }
            Case::AlreadySettled => {
                draft.nonce = self.nonce();
                draft.policy_result = None;
                draft.outcome = match draft.outcome {
                    Outcome::Cleared => Outcome::Released {
                        reject_reason: "second thoughts".to_owned(),
                    },
                    Outcome::Released { .. } => Outcome::Cleared,
                };
                (Expected::Rejected(Reason::AlreadySettled), None)
            }
            _ => {
                draft.nonce = self.nonce();
                (Expected::Duplicate, Some(done.item))
            }
        };
        self.push(&draft, partner.update(&draft), expected, repeats);
    }

    /// The bound partner's message without its user.
    fn add_sender_mismatch(&mut self) {
        let bound = self.bound.clone();
        let amount = self.amount();
        let reservation = self.new_reservation(&bound, Kind::Allocation, amount);
        let draft = bound.draft(&reservation, Outcome::Cleared, self.nonce());
        let publication = bound.wrong(draft.clone(), Flaw::Sender, &mut self.dice);
        self.push(&draft, publication, Expected::Rejected(Reason::SenderMismatch), None);
        // It stays reserved: what came without the user moved nothing.
        self.model_reserve(&bound, &reservation);
        self.reservations.push(reservation);
    }

    /// Something that settled early enough.
    fn earlier(&mut self, partner: usize, wave: usize) -> Option<Done> {
        let candidates: Vec<usize> = self
            .done
            .iter()
            .enumerate()
            .filter(|(_, done)| done.partner == partner && done.wave + WAVES_BETWEEN <= wave)
            .map(|(index, _)| index)
            .collect();
        let index = *self.dice.pick(&candidates)?;
        self.done.get(index).cloned()
    }

    /// A reservation for a wrong message to speak of: a right one settles it, so a wrong one that moved money would show.
    fn target(&mut self, partner: usize) -> Option<Reservation> {
        let connection = self.partners.get(partner).unwrap_or(&self.bound).connection_id;
        self.reservations
            .iter()
            .rev()
            .find(|reservation| reservation.connection_id == connection)
            .cloned()
    }

    fn into_plan(mut self, waves: Vec<Wave>) -> Plan {
        let deposits: Vec<Deposit> = self
            .deposits
            .clone()
            .into_iter()
            .filter_map(|((client_id, currency), needed)| {
                // A round sum that is enough.
                let unit = if currency == "BTC" {
                    100_000_000
                } else {
                    1_000_000_000_000_000_000
                };
                let sum = (needed / unit + 10) * unit;
                Some(Deposit {
                    client_id,
                    reference: format!("{}-deposit-{currency}", self.shape.run),
                    amount: Amount {
                        currency,
                        quantity: Quantity::parse(&sum.to_string()).ok()?,
                    },
                })
            })
            .collect();
        for deposit in &deposits {
            self.transfer(
                ("external", None),
                ("available", Some(deposit.client_id)),
                &deposit.amount,
            );
        }
        Plan {
            partners: self.partners,
            suspended: self.suspended,
            bound: self.bound,
            deposits,
            reservations: self.reservations,
            waves,
            items: self.items,
            late: self.late,
            balances: self.balances,
        }
    }
}

/// Amounts here are drawn: they fit.
fn number(amount: &Amount) -> i128 {
    amount.quantity.to_string().parse().unwrap_or(i128::MAX)
}
