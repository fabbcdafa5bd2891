-- The operator's desk: every message that was refused, kept with why until a person is done with it, and everything that
-- person does.

-- One row for a message (routing key and body), however often it fails or is copied. A replayed row changes in the very
-- transaction that judges the message again.
CREATE TABLE settled.dead_letters (
    -- The head of SHA-256(routing key, 0x00, body digest): whoever knows the message knows the id, so that a copy and a
    -- redelivery meet their row.
    id                uuid PRIMARY KEY,
    -- Order of arrival: pages and replays go by it.
    seq               bigint GENERATED ALWAYS AS IDENTITY,
    state             text COLLATE "C" NOT NULL DEFAULT 'open'
                      CHECK (state IN ('open', 'due', 'parked', 'settled', 'discarded')),
    exchange          text NOT NULL,
    routing_key       text NOT NULL,
    -- SHA-256 of body.
    digest            bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- AMQP properties and headers as the partner sent them, as JSON in the numbered format.
    format            smallint NOT NULL,
    properties        text NOT NULL,
    body              bytea NOT NULL,
    -- Where they can be read from it.
    enterprise_id     text COLLATE "C",
    nonce             text,
    allocation_id     uuid,
    reason            text COLLATE "C" NOT NULL,
    detail            text NOT NULL,
    -- The same for all of one partner, reason and kind of detail.
    group_id          text COLLATE "C" NOT NULL,
    -- Who made the dead letter: the worker's verdict, the broker by itself, or somebody by hand.
    made_by           text NOT NULL CHECK (made_by IN ('settled', 'broker', 'unknown')),
    first_failed_at   timestamptz NOT NULL,
    last_failed_at    timestamptz NOT NULL,
    times_seen        bigint NOT NULL DEFAULT 1 CHECK (times_seen > 0),
    collected_at      timestamptz NOT NULL,
    -- The run that replays it, or did last.
    run_id            bigint,
    -- A worker that takes a due row owns it until then.
    leased_until      timestamptz,
    -- What the last replay came to.
    replays           integer NOT NULL DEFAULT 0,
    verdict           text CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    judged_at         timestamptz,
    batch_id          uuid,
    discarded_at      timestamptz,
    CHECK ((state = 'discarded') = (discarded_at IS NOT NULL)),
    CHECK (state <> 'due' OR run_id IS NOT NULL)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.05);
ALTER TABLE settled.dead_letters ALTER COLUMN body SET STORAGE EXTERNAL;
-- Lists go by state and order of arrival. Everything that is filtered or counted by stands in the index, so that whatever
-- an operator asks for costs a walk along the index at most, and the table is visited for the rows that are shown.
CREATE INDEX dead_letters_state ON settled.dead_letters (state, seq)
    INCLUDE (id, enterprise_id, reason, group_id, last_failed_at);
-- Groups and counts are sums along this one, in its order.
CREATE INDEX dead_letters_group ON settled.dead_letters
    (state, group_id, enterprise_id, reason, first_failed_at, last_failed_at);
CREATE INDEX dead_letters_partner ON settled.dead_letters (enterprise_id, state, seq);
CREATE INDEX dead_letters_reason ON settled.dead_letters (reason, state, seq);
CREATE INDEX dead_letters_nonce ON settled.dead_letters (nonce);
CREATE INDEX dead_letters_allocation ON settled.dead_letters (allocation_id);
CREATE INDEX dead_letters_digest ON settled.dead_letters (digest);

-- A replayed message whose allocation is still missing is parked; what becomes of it then goes back to its row.
ALTER TABLE settled.parked ADD COLUMN dead_letter_id uuid;

-- A selection, frozen, with what each message would have come to when it was made.
CREATE TABLE settled.plans (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    operator    text NOT NULL,
    filters     jsonb NOT NULL,
    messages    integer NOT NULL
);
CREATE TABLE settled.plan_items (
    plan_id         bigint NOT NULL REFERENCES settled.plans ON DELETE CASCADE,
    position        integer NOT NULL,
    dead_letter_id  uuid NOT NULL,
    verdict         text NOT NULL CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    detail          text,
    -- What would move.
    currency        text COLLATE "C",
    quantity        numeric(78, 0),
    PRIMARY KEY (plan_id, position),
    UNIQUE (plan_id, dead_letter_id),
    CHECK ((verdict = 'settled') = (quantity IS NOT NULL))
);

-- A replay of a plan.
CREATE TABLE settled.runs (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    plan_id       bigint NOT NULL REFERENCES settled.plans,
    -- 'stopped': by itself, because a verdict was not what the plan said, or none came; note says which.
    state         text NOT NULL CHECK (state IN ('running', 'cancelled', 'stopped', 'done')),
    note          text,
    operator      text NOT NULL,
    why           text NOT NULL CHECK (why <> ''),
    canary        integer CHECK (canary > 0),
    -- Messages a second; null: as fast as they are judged.
    rate          double precision CHECK (rate > 0),
    all_verdicts  boolean NOT NULL,
    started_at    timestamptz NOT NULL,
    changed_at    timestamptz NOT NULL,
    -- One program at a time marks its messages as due. Until then it is this one.
    driver        uuid,
    driven_until  timestamptz
);
CREATE TABLE settled.run_items (
    run_id          bigint NOT NULL REFERENCES settled.runs,
    position        integer NOT NULL,
    dead_letter_id  uuid NOT NULL,
    -- The plan's verdict.
    planned         text NOT NULL,
    state           text COLLATE "C" NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'due', 'judged', 'skipped')),
    verdict         text CHECK (verdict IN ('settled', 'duplicate', 'parked', 'rejected')),
    reason          text,
    -- Why it was skipped.
    note            text,
    judged_at       timestamptz,
    PRIMARY KEY (run_id, position),
    UNIQUE (run_id, dead_letter_id),
    CHECK ((state = 'judged') = (verdict IS NOT NULL))
);
CREATE INDEX run_items_state ON settled.run_items (run_id, state, position);
CREATE INDEX run_items_dead_letter_id ON settled.run_items (dead_letter_id);

-- Who did what, why, to what, and what came of it. Written by the transaction that did it.
CREATE TABLE settled.audit (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL,
    operator  text NOT NULL,
    act       text NOT NULL,
    why       text,
    filters   jsonb NOT NULL,
    outcome   jsonb NOT NULL,
    -- The run that it is about.
    run_id    bigint
);
CREATE INDEX audit_run_id ON settled.audit (run_id);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.audit
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- Which messages an act changed by itself (discarded, restored, purged). What a run did stands in its items.
CREATE TABLE settled.audit_subjects (
    dead_letter_id  uuid NOT NULL,
    audit_id        bigint NOT NULL REFERENCES settled.audit,
    PRIMARY KEY (dead_letter_id, audit_id)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.audit_subjects
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
