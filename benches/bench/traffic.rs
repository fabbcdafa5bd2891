//! What the contestants are fed: reservations made in bulk, and messages signed before anything is measured. Everything is
//! drawn from one seed, so that every contestant of every round meets the same.

use std::{
    num::NonZero,
    path::{Path, PathBuf},
};

use settled::{
    domain::{
        allocation::Kind,
        delivery::Publication,
        ledger::{Amount, Quantity},
        update::Outcome,
    },
    partner::{Dice, Flaw, Reservation, SigningPartner},
};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{
    Fallible,
    place::{Copy, Database, Services},
};

const SEED: u64 = 5;
const CURRENCY: &str = "BTC";
const PARTNERS: usize = 8;
/// Each with a client of its own.
const CONNECTIONS: usize = 2_000;
/// A message and its copy lie this far apart: more than a batch, less than what a worker may hold unacknowledged.
const COPY_AFTER: usize = 400;

/// Funds in each client's account: more than all of its reservations together.
const FUNDS: &str = "1000000000000000";

/// What became of the messages so far, before the run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum History {
    None,
    /// So many receipts, and as many ledger entries (of half as many transfers).
    Rows(u64),
}

/// How reservations lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spread {
    Wide,
    /// All on one connection, so that every settlement moves the same two balances.
    Hot,
}

/// What is wrong with how many of a thousand messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    /// Signed by a key that nobody registered: only recovering the signer shows it.
    pub(crate) strangers: usize,
    /// Signed and complete, about another amount than was reserved.
    pub(crate) mismatches: usize,
    /// Every message comes twice.
    pub(crate) twice: bool,
}

impl Mix {
    pub(crate) const CLEAN: Mix = Mix {
        strangers: 0,
        mismatches: 0,
        twice: false,
    };
    /// What is drained and what latency is measured of: 1 % bad signatures.
    pub(crate) const USUAL: Mix = Mix {
        strangers: 10,
        mismatches: 0,
        twice: false,
    };

    /// So many percent refused: half for the signature, half by the rules.
    pub(crate) const fn rejects(percent: usize) -> Mix {
        Mix {
            strangers: percent * 5,
            mismatches: percent * 5,
            twice: false,
        }
    }

    pub(crate) const TWICE: Mix = Mix {
        twice: true,
        ..Mix::CLEAN
    };
}

/// What a message comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    Settled,
    /// Told again, and nothing moves.
    Duplicate,
    /// Refused without a receipt: its sender is not proven.
    Stranger,
    /// Refused, and the receipt says so.
    Mismatch,
}

/// Signed messages, in the order they are published.
pub(crate) struct Traffic {
    pub(crate) messages: Vec<Publication>,
    pub(crate) expects: Vec<Expect>,
}

impl Traffic {
    /// Bytes of a body, on average.
    pub(crate) fn body_bytes(&self) -> usize {
        let bytes: usize = self.messages.iter().map(|message| message.body.len()).sum();
        bytes / self.messages.len().max(1)
    }
}

/// Template databases with a registry, funds and reservations, and what the partners can say of them. Each build of the worker
/// that is measured has one, which it migrated itself.
pub(crate) struct World {
    templates: Vec<(PathBuf, Database)>,
    pub(crate) history: History,
    pub(crate) copy: Copy,
    parties: Vec<SigningPartner>,
    /// Each with the place of its connection's party.
    reservations: Vec<(usize, Reservation)>,
}

impl World {
    pub(crate) async fn build(
        services: &Services,
        what: &str,
        programs: &[PathBuf],
        reservations: usize,
        spread: Spread,
        history: History,
        copy: Copy,
    ) -> Fallible<Self> {
        let mut dice = Dice::new(SEED, "bench");
        let parties = parties(&mut dice, spread);
        let reservations = draw(&parties, reservations, &mut dice)?;
        let mut world = Self {
            templates: Vec::new(),
            history,
            copy,
            parties,
            reservations,
        };
        for program in programs {
            let template = services.migrated(what, program).await?;
            let db = crate::place::connect(&template.url).await?;
            world.register(&db).await?;
            world.reserve(&db).await?;
            // The old versions of the balances go: they are no part of what is measured.
            let balances = "SELECT relname FROM pg_class
                            WHERE relnamespace = 'settled'::regnamespace AND relname IN ('funds', 'accounts') AND relkind = 'r'";
            let balances: String = db.query_one(balances, &[]).await?.get(0);
            db.batch_execute(&format!("VACUUM FULL settled.{balances}")).await?;
            if let History::Rows(rows) = history {
                remember(&db, rows).await?;
            }
            // Whoever copies it finds the visibility map and the statistics that a database has after a while.
            db.batch_execute("VACUUM ANALYZE").await?;
            world.templates.push((program.clone(), template));
        }
        Ok(world)
    }

    /// The one that a build of the worker migrated.
    pub(crate) fn template(&self, program: &Path) -> Fallible<&Database> {
        let found = self.templates.iter().find(|(made_by, _)| made_by == program);
        let (_, template) = found.ok_or_else(|| format!("no template of {}", program.display()))?;
        Ok(template)
    }

    pub(crate) async fn forget(self, services: &Services) -> Fallible<()> {
        for (_, template) in &self.templates {
            services.drop_database(&template.name).await?;
        }
        Ok(())
    }

    async fn register(&self, db: &Client) -> Fallible<()> {
        let mut partners: Vec<&SigningPartner> = self.parties.iter().collect();
        partners.dedup_by_key(|party| &party.enterprise_id);
        let names: Vec<&str> = partners.iter().map(|party| party.enterprise_id.as_str()).collect();
        let keys: Vec<Vec<u8>> = partners
            .iter()
            .map(|party| party.key.public_key().as_bytes().to_vec())
            .collect();
        let sql = "INSERT INTO settled.partners (enterprise_id, name) SELECT n, n FROM unnest($1::text[]) AS n";
        db.execute(sql, &[&names]).await?;
        let sql = "INSERT INTO settled.partner_keys (enterprise_id, public_key)
                   SELECT * FROM unnest($1::text[], $2::bytea[])";
        db.execute(sql, &[&names, &keys]).await?;
        let each = || self.parties.iter();
        let connections: Vec<Uuid> = each().map(|party| party.connection_id).collect();
        let clients: Vec<Uuid> = each().map(|party| party.client_id).collect();
        let enterprises: Vec<&str> = each().map(|party| party.enterprise_id.as_str()).collect();
        let their_clients: Vec<&str> = each().map(|party| party.partners_client_id.as_str()).collect();
        let their_connections: Vec<&str> = each().map(|party| party.partners_connection_id.as_str()).collect();
        let sql = "INSERT INTO settled.connections
                       (connection_id, enterprise_id, client_id, partners_client_id, partners_connection_id)
                   SELECT * FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::text[], $5::text[])";
        db.execute(
            sql,
            &[&connections, &enterprises, &clients, &their_clients, &their_connections],
        )
        .await?;
        let sql = format!(
            "SELECT settled.deposit(client, '{CURRENCY}', {FUNDS}, 'opening') FROM unnest($1::uuid[]) AS client"
        );
        // A few at a time: they all move the same external account, and a transaction walks past its own old versions.
        for clients in clients.chunks(100) {
            db.query(&sql, &[&clients]).await?;
        }
        Ok(())
    }

    /// As the custody system does it.
    async fn reserve(&self, db: &Client) -> Fallible<()> {
        let statement = db
            .prepare("SELECT count(*) FROM settled.reserve($1::text::jsonb) WHERE result = 'reserved'")
            .await?;
        // A few at a time: a transaction walks past its own old versions of the balances.
        for some in self.reservations.chunks(200) {
            let wished: Vec<&Reservation> = some.iter().map(|(_, reservation)| reservation).collect();
            let made: i64 = db
                .query_one(&statement, &[&serde_json::to_string(&wished)?])
                .await?
                .get(0);
            if usize::try_from(made)? != some.len() {
                return Err(format!("{made} of {} reservations were made", some.len()).into());
            }
        }
        Ok(())
    }

    /// Signs messages for the first reservations: so many with the copies of `mix.twice`.
    pub(crate) fn sign(&self, messages: usize, mix: Mix) -> Traffic {
        let wanted = if mix.twice { messages / 2 } else { messages };
        let wanted = self.reservations.get(..wanted).unwrap_or(&self.reservations);
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let share = wanted.len().div_ceil(threads).max(1);
        let mut signed: Vec<(Publication, Expect)> = std::thread::scope(|scope| {
            let handles: Vec<_> = wanted
                .chunks(share)
                .enumerate()
                .map(|(part, some)| {
                    let first = part * share;
                    let sign = move |(place, one)| self.sign_one(first + place, one, mix);
                    scope.spawn(move || some.iter().enumerate().map(sign).collect::<Vec<_>>())
                })
                .collect();
            handles
                .into_iter()
                .flat_map(|handle| handle.join().expect("signing does not panic"))
                .collect()
        });
        if mix.twice {
            signed = with_copies(&signed);
        }
        let (messages, expects) = signed.into_iter().unzip();
        Traffic { messages, expects }
    }

    /// Its number stands in the nonce, by which its event is known.
    fn sign_one(&self, number: usize, (party, reservation): &(usize, Reservation), mix: Mix) -> (Publication, Expect) {
        // The same allocation meets the same fate in every mix that has it.
        let mut dice = Dice::new(SEED, &reservation.client_external_id);
        let party = &self.parties[*party];
        let outcome = if dice.percent(10) {
            Outcome::Released {
                reject_reason: "collateral limit of the day reached".to_owned(),
            }
        } else {
            Outcome::Cleared
        };
        let draft = party.draft(reservation, outcome, format!("n-{number:09}-{}", dice.uuid()));
        let lot = dice.below(1_000);
        if lot < mix.strangers {
            (party.wrong(draft, Flaw::Stranger, &mut dice), Expect::Stranger)
        } else if lot < mix.strangers + mix.mismatches {
            (party.wrong(draft, Flaw::Mismatch, &mut dice), Expect::Mismatch)
        } else {
            (party.update(&draft), Expect::Settled)
        }
    }
}

fn parties(dice: &mut Dice, spread: Spread) -> Vec<SigningPartner> {
    let connections = match spread {
        Spread::Wide => CONNECTIONS,
        Spread::Hot => 1,
    };
    let partners: Vec<SigningPartner> = (0..PARTNERS.min(connections))
        .map(|number| SigningPartner::draw(&format!("trading-partner-{number}"), dice))
        .collect();
    let of_each = connections / partners.len();
    partners
        .into_iter()
        .flat_map(|partner| {
            let mut connection = |number| SigningPartner {
                client_id: dice.uuid(),
                connection_id: dice.uuid(),
                partners_client_id: format!("institutional-client-{number:06}-{}", partner.enterprise_id),
                partners_connection_id: format!("exchange-sub-account-{number:06}-{}", partner.enterprise_id),
                ..partner.clone()
            };
            (0..of_each).map(&mut connection).collect::<Vec<_>>()
        })
        .collect()
}

fn draw(parties: &[SigningPartner], count: usize, dice: &mut Dice) -> Fallible<Vec<(usize, Reservation)>> {
    (0..count)
        .map(|number| {
            let party = dice.below(parties.len());
            let amount = Amount {
                currency: CURRENCY.to_owned(),
                quantity: Quantity::parse(&(1 + dice.below(100_000_000)).to_string())?,
            };
            let reference = format!("order-{number:09}-{}", dice.uuid());
            let reservation =
                parties
                    .get(party)
                    .ok_or("no party")?
                    .reservation(Kind::Allocation, amount, reference, dice);
            Ok((party, reservation))
        })
        .collect()
}

fn with_copies(signed: &[(Publication, Expect)]) -> Vec<(Publication, Expect)> {
    let mut all = Vec::with_capacity(2 * signed.len());
    for place in 0..signed.len() + COPY_AFTER {
        all.extend(signed.get(place).cloned());
        let copied = place.checked_sub(COPY_AFTER).and_then(|place| signed.get(place));
        all.extend(copied.map(|(message, expect)| {
            let again = match expect {
                Expect::Settled | Expect::Duplicate => Expect::Duplicate,
                Expect::Stranger => Expect::Stranger,
                Expect::Mismatch => Expect::Mismatch,
            };
            (message.clone(), again)
        }));
    }
    all
}

/// Years of work: receipts under random keys, as hashes are, and deposits in the ledger. Indexes are built afterwards,
/// which gives them the size they have after a rebuild: smaller than age leaves them, never larger.
async fn remember(db: &Client, rows: u64) -> Fallible<()> {
    db.batch_execute(&format!(
        "ALTER TABLE settled.receipts DROP CONSTRAINT receipts_pkey;
         INSERT INTO settled.receipts (
             key, enterprise_id, nonce, payload_digest, message_digest, verdict, reason, allocation_id, event_id,
             public_key, batch_id, first_seen, last_seen
         )
         SELECT gen_random_uuid(), 'trading-partner-0', 'n-' || gen_random_uuid(),
                uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
                uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
                'settled', NULL, gen_random_uuid(), gen_random_uuid(),
                k.public_key, gen_random_uuid(), now() - interval '1 year', now() - interval '1 year'
         FROM generate_series(1, {rows}) AS n
         CROSS JOIN (SELECT public_key FROM settled.partner_keys LIMIT 1) AS k;
         ALTER TABLE settled.receipts ADD CONSTRAINT receipts_pkey PRIMARY KEY (key);

         ALTER TABLE settled.transfers DROP CONSTRAINT transfers_pkey;
         CREATE TEMP TABLE clients AS
         SELECT id, row_number() OVER (ORDER BY id) - 1 AS place FROM settled.funds WHERE holder = 'client';
         INSERT INTO settled.transfers (subject_id, step, event, debit_account, credit_account, amount, created_at)
         SELECT gen_random_uuid(), 0, 'deposit', settled.account(x.id, 'external'), settled.account(c.id, 'available'),
                1 + n % 1000000, now() - interval '1 year'
         FROM generate_series(1, {rows} / 2) AS n
         JOIN clients AS c ON c.place = n % (SELECT count(*) FROM clients)
         CROSS JOIN (SELECT id FROM settled.funds WHERE holder = 'world') AS x;
         ALTER TABLE settled.transfers ADD CONSTRAINT transfers_pkey PRIMARY KEY (subject_id, step);
         UPDATE settled.funds AS f
         SET available = f.available + s.change
         FROM (
             SELECT credit_account / 4 AS id, sum(amount) AS change
             FROM settled.transfers
             WHERE created_at < now() - interval '1 month'
             GROUP BY credit_account / 4
         ) AS s
         WHERE f.id = s.id;
         UPDATE settled.funds AS f
         SET external = f.external - (
             SELECT sum(amount) FROM settled.transfers WHERE created_at < now() - interval '1 month'
         )
         WHERE f.holder = 'world'"
    ))
    .await?;
    Ok(())
}
