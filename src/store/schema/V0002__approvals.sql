-- Two people for what is large. A plan remembers who made it, as the server and whoever vouches for the name know them; and an
-- approval says who else wants it done, for what, and until when.

-- Who vouches: the name that the console was signed in with, by a proxy. Null: whoever typed it. The other two are the
-- server's own word (settled.sign_audit). Plans that were made before have none of them.
ALTER TABLE settled.plans
    ADD COLUMN voucher text,
    ADD COLUMN session_name text,
    ADD COLUMN client_address inet;
CREATE TRIGGER signed BEFORE INSERT ON settled.plans FOR EACH ROW EXECUTE FUNCTION settled.sign_audit();

-- The plan may be purged; that it was approved stays. So there is no reference.
CREATE TABLE settled.approvals (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    plan_id         bigint NOT NULL,
    act             text COLLATE "C" NOT NULL CHECK (act IN ('replay', 'discard', 'restore')),
    at              timestamptz NOT NULL,
    expires_at      timestamptz NOT NULL CHECK (expires_at > at),
    operator        text NOT NULL,
    why             text NOT NULL CHECK (why <> ''),
    voucher         text,
    session_name    text,
    client_address  inet
);
CREATE INDEX approvals_plan_id ON settled.approvals (plan_id);
CREATE TRIGGER signed BEFORE INSERT ON settled.approvals FOR EACH ROW EXECUTE FUNCTION settled.sign_audit();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON settled.approvals
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
