-- Keys and nonces: what an operator takes back, and what a partner proves.

-- Since when a nonce is unusable, by an operator's word. What has settled can not be taken back. Rows that are there need no
-- look: none of them has one.
ALTER TABLE settled.receipts ADD COLUMN voided_at timestamptz;
ALTER TABLE settled.receipts
    ADD CONSTRAINT receipts_voided CHECK (voided_at IS NULL OR verdict IN ('parked', 'rejected')) NOT VALID;

-- When a key's owner proved to have its private half.
ALTER TABLE settled.partner_keys ADD COLUMN proven_at timestamptz;

-- When a key proved a message last, as far as it was written down: now and then, outside the batches. A table of its own, so
-- that who settles need not be allowed to change keys.
CREATE TABLE settled.key_uses (
    public_key    bytea PRIMARY KEY REFERENCES settled.partner_keys,
    last_used_at  timestamptz NOT NULL
);

-- What the owner of a key is to sign. One a partner and key: a new one takes the place of the one before.
CREATE TABLE settled.key_challenges (
    enterprise_id  text COLLATE "C" NOT NULL REFERENCES settled.partners,
    public_key     bytea NOT NULL CHECK (octet_length(public_key) = 33),
    challenge      text NOT NULL CHECK (octet_length(challenge) BETWEEN 1 AND 1024),
    expires_at     timestamptz NOT NULL,
    PRIMARY KEY (enterprise_id, public_key)
);

-- Since when a partner's messages are held instead of judged, and why.
ALTER TABLE settled.partners ADD COLUMN quarantined_at timestamptz;
ALTER TABLE settled.partners ADD COLUMN quarantine_reason text CHECK (octet_length(quarantine_reason) <= 1024);
ALTER TABLE settled.partners
    ADD CONSTRAINT partners_quarantine CHECK ((quarantined_at IS NULL) = (quarantine_reason IS NULL));
ALTER TABLE settled.held DROP CONSTRAINT held_why_check;
ALTER TABLE settled.held
    ADD CONSTRAINT held_why_check CHECK (why IN ('share', 'rate', 'locked', 'quarantine'));
