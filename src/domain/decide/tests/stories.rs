//! Any story at all: a batch of n is n batches of one.

use super::*;

/// What happens in a generated story.
#[derive(Clone, Debug)]
enum Step {
    /// Messages, by their place in the pool.
    Batch(Vec<Post>),
    Reserve(usize),
    Suspend(bool),
    /// Takes one of acme's keys away, or gives it back.
    Key(bool),
    Bind(bool),
    /// Acme's symbols are others from now on.
    Map(usize),
    /// Makes one of acme's nonces unusable.
    Void(usize),
    Pass(i64),
}

#[derive(Clone, Debug)]
enum Post {
    Queue(usize),
    /// One that waits now.
    Due(usize),
    /// One that waited once: a claim whose lease ran out.
    Stale(usize),
}

const MAPS: [&[(&str, &str)]; 5] = [
    &[],
    &[("XBT", "BTC")],
    &[("XBT", "BTC"), ("XXBT", "BTC"), ("XETH", "ETH:wei")],
    &[("XBT", "TBTC"), ("XETH", "ETH:wei")],
    &[("BTC", "TBTC")],
];

fn story(pool: usize) -> impl Strategy<Value = Vec<Step>> {
    let post = prop_oneof![
        8 => (0..pool).prop_map(Post::Queue),
        3 => any::<usize>().prop_map(Post::Due),
        1 => any::<usize>().prop_map(Post::Stale),
    ];
    let step = prop_oneof![
        8 => prop::collection::vec(post, 1..16).prop_map(Step::Batch),
        1 => (0..2_usize).prop_map(Step::Reserve),
        1 => any::<bool>().prop_map(Step::Suspend),
        1 => any::<bool>().prop_map(Step::Key),
        1 => any::<bool>().prop_map(Step::Bind),
        2 => (0..MAPS.len()).prop_map(Step::Map),
        1 => (1..4_usize).prop_map(Step::Void),
        2 => (0..8_i64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..14)
}

/// Every message that a story may hold, signed once.
fn pool() -> Vec<Sent> {
    let mut pool = Vec::new();
    for id in [ALLOCATION, DEALLOCATION, OF_BETA, LARGE, LATE, LATE_DEALLOCATION] {
        for nonce in ["1", "2", "3"] {
            for outcome in [Outcome::Cleared, released()] {
                pool.push(Letter::new(id, outcome, nonce));
            }
        }
    }
    let honest = pool.clone();
    let mut spoil = |every: usize, spoil: fn(&mut Letter)| {
        for letter in honest.iter().skip(every % 3).step_by(every) {
            let mut letter = letter.clone();
            spoil(&mut letter);
            pool.push(letter);
        }
    };
    spoil(3, |letter| letter.signed_by = 2);
    spoil(8, |letter| letter.signed_by = 9);
    spoil(4, |letter| letter.altered.push(("nonce", "1".into())));
    spoil(9, |letter| {
        letter.altered.push(("allocationId", LATE.to_string().into()))
    });
    spoil(5, |letter| letter.altered.push(("policyResult", "rejected".into())));
    spoil(5, |letter| letter.altered.push(("evaluationId", "other".into())));
    spoil(9, |letter| letter.altered.push(("signature", "1f".into())));
    spoil(9, |letter| letter.draft.partners_id = "theirs-2".to_owned());
    spoil(9, |letter| letter.draft.partners_client_id = "cust-2".to_owned());
    spoil(9, |letter| letter.draft.kind = Kind::Deallocation);
    spoil(9, |letter| letter.draft.id = OF_BETA);
    spoil(9, |letter| letter.draft.enterprise_id = "ghost".to_owned());
    spoil(5, |letter| letter.properties.user_id = Some("acme-user".to_owned()));
    spoil(12, |letter| {
        letter.properties.content_type = Some("text/plain".to_owned())
    });
    spoil(4, |letter| letter.draft.amount.currency = "XBT".to_owned());
    spoil(9, |letter| letter.draft.amount.currency = "XXBT".to_owned());
    spoil(12, |letter| letter.altered.push(("status", "done".into())));
    spoil(4, |letter| letter.draft.expires_at = Some(start() + seconds(6)));
    pool.iter().map(Letter::send).collect()
}

/// Few may wait, and not for long, so that a story meets both bounds.
fn story_rules() -> Rules {
    Rules {
        park_deadline: seconds(8),
        park_first_retry: seconds(1),
        park_max_interval: seconds(3),
        park_max_per_partner: 2,
        park_max_bytes: u64::MAX,
        park_max_bytes_per_partner: u64::MAX,
        ..rules()
    }
}

/// Tells a story twice: by batches, and one message at a time. Everything must come out the same.
fn tell(pool: &[Sent], steps: &[Step], seen: &RefCell<BTreeMap<String, usize>>) -> TestCaseResult {
    let rules = story_rules();
    let (mut together, mut alone) = (Model::new(), Model::new());
    let mut once_parked: Vec<Sent> = Vec::new();
    for step in steps {
        let Step::Batch(posts) = step else {
            for model in [&mut together, &mut alone] {
                change(model, step);
            }
            continue;
        };
        let waiting: Vec<Sent> = once_parked
            .iter()
            .filter(|sent| {
                let row = together.parked.get(&sent.key());
                row.is_some_and(|row| row.message_digest == sent.facts.message_digest)
            })
            .map(Sent::due)
            .collect();
        let stale: Vec<Sent> = once_parked.iter().map(Sent::due).collect();
        let pick = |from: &[Sent], index: usize| from.get(index.checked_rem(from.len())?).cloned();
        let batch: Vec<Sent> = posts
            .iter()
            .filter_map(|post| match post {
                Post::Queue(index) => pick(pool, *index),
                Post::Due(index) => pick(&waiting, *index),
                Post::Stale(index) => pick(&stale, *index),
            })
            .collect();
        let (judgements, _) = together.post(&rules, &batch);
        let one_by_one: Vec<Judgement> = batch
            .iter()
            .flat_map(|sent| alone.post(&rules, std::slice::from_ref(sent)).0)
            .collect();
        prop_assert_eq!(&judgements, &one_by_one);
        prop_assert_eq!(&together, &alone);
        for (sent, judgement) in batch.iter().zip(&judgements) {
            *seen.borrow_mut().entry(line(judgement)).or_default() += 1;
            if let Verdict::Parked { again: false, .. } = judgement.verdict {
                once_parked.push(sent.clone());
            }
        }
        for count in parked_by_partner(&together) {
            prop_assert!(count <= rules.park_max_per_partner);
        }
        // A crash between commit and acknowledgement: the whole batch comes again.
        let mut replayed = together.clone();
        let queued: Vec<Sent> = batch
            .iter()
            .filter(|sent| !sent.delivery.source.is_parked())
            .cloned()
            .collect();
        let (again, changes) = replayed.post(&rules, &queued);
        let first: Vec<&Judgement> = batch
            .iter()
            .zip(&judgements)
            .filter(|(sent, _)| !sent.delivery.source.is_parked())
            .map(|(_, judgement)| judgement)
            .collect();
        // A copy of what waited left nothing behind. If that came to its end later in the batch, the copy may settle now;
        // nothing else may.
        let copied = |judgement: &Judgement| matches!(judgement.verdict, Verdict::Parked { again: true, .. });
        for (first, again) in first.iter().zip(&again) {
            let (before, now) = (first.verdict.kind(), again.verdict.kind());
            prop_assert!(now != VerdictKind::Settled || copied(first), "{first:?} then {again:?}");
            prop_assert!(
                before != VerdictKind::Settled || now == VerdictKind::Duplicate,
                "{again:?}"
            );
        }
        for settlement in &changes.settlements {
            prop_assert_eq!(together.allocations[&settlement.allocation.id].status, Status::Reserved);
        }
        if changes.settlements.is_empty() {
            prop_assert!(changes.balances.is_empty());
            prop_assert_eq!(&replayed.allocations, &together.allocations);
            prop_assert_eq!(&replayed.settled, &together.settled);
        }
    }
    for (id, (nonce, digest, key)) in &together.settled {
        let receipt = &together.receipts[&ReceiptKey::new(&together.allocations[id].enterprise_id, nonce)];
        let kept = (receipt.verdict, receipt.payload_digest, receipt.public_key);
        prop_assert_eq!(kept, (VerdictKind::Settled, *digest, *key));
    }
    Ok(())
}

fn change(model: &mut Model, step: &Step) {
    match step {
        Step::Batch(_) => {}
        Step::Reserve(0) => model.reserve(LATE),
        Step::Reserve(_) => model.reserve(LATE_DEALLOCATION),
        Step::Suspend(suspended) => model.acme().suspended = *suspended,
        Step::Key(given) => model.acme().keys = partner(if *given { &[1, 2] } else { &[2] }).keys,
        Step::Bind(bound) => model.acme().broker_user = bound.then(|| "acme-user".to_owned()),
        Step::Map(map) => model.acme().symbols = symbols(MAPS[*map]),
        Step::Void(nonce) => {
            let receipt = model.receipts.get_mut(&ReceiptKey::new("acme", &nonce.to_string()));
            if let Some(receipt) = receipt
                && matches!(receipt.verdict, VerdictKind::Parked | VerdictKind::Rejected)
                && !receipt.is_closed()
            {
                receipt.voided = true;
            }
        }
        Step::Pass(time) => model.pass(seconds(*time)),
    }
}

fn parked_by_partner(model: &Model) -> impl Iterator<Item = u64> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for row in model.parked.values() {
        *counts.entry(row.enterprise_id.clone()).or_default() += 1;
    }
    counts.into_values()
}

/// A batch of n equals n batches of one, entries sum to zero, an allocation settles once, a replay writes
/// no settlement. What [`Model::apply`] asserts is part of it.
#[test]
fn a_batch_of_n_is_n_batches_of_one() {
    let pool = pool();
    let seen = RefCell::new(BTreeMap::new());
    let config = ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    TestRunner::new(config)
        .run(&story(pool.len()), |steps| tell(&pool, &steps, &seen))
        .unwrap_or_else(|failure| panic!("{failure}"));
    // A property that never meets a rule says nothing of it.
    let mut expected: Vec<&str> = Reason::ALL[1..19].iter().map(|reason| reason.as_str()).collect();
    expected.extend(["settled", "duplicate", "parked", "parked again"]);
    let seen = seen.into_inner();
    let missing: Vec<&str> = expected.into_iter().filter(|name| !seen.contains_key(*name)).collect();
    assert!(missing.is_empty(), "never met: {missing:?} of {seen:?}");
}

/// A copy of what waits is acknowledged with nothing kept, and what waited may then be refused in the same batch, its key
/// withdrawn. If that batch comes again, the copy is judged for itself.
#[test]
fn a_copy_may_settle_once_what_waited_was_refused() {
    let pool = pool();
    let steps = [
        Step::Batch(vec![Post::Queue(28), Post::Queue(65)]),
        Step::Reserve(0),
        Step::Key(false),
        Step::Batch(vec![Post::Queue(45), Post::Due(1)]),
    ];
    tell(&pool, &steps, &RefCell::default()).expect("the copy settles, and nothing else");
}
