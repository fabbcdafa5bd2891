-- Who may ask over HTTP, and for whom.

-- A client's enterprise, as which it reads over HTTP. An enterprise may have several clients, a client has one enterprise.
CREATE TABLE settled.clients (
    client_id      uuid PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    created_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp())
);
CREATE INDEX clients_enterprise_id ON settled.clients (enterprise_id);

-- Of a token only a digest is kept: whoever reads this table can not ask with it. The secret has 256 bits of chance, so that
-- one SHA-256 is as good as a slow hash: nobody tries that many.
CREATE TABLE settled.tokens (
    id             uuid PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL CHECK (enterprise_id ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    role           text NOT NULL CHECK (role IN ('partner', 'client')),
    digest         bytea NOT NULL CHECK (octet_length(digest) = 32),
    -- What people call it.
    name           text NOT NULL CHECK (octet_length(name) <= 255),
    -- Requests a second; null: as the setting says.
    rate           integer CHECK (rate BETWEEN 1 AND 1000000),
    expires_at     timestamptz NOT NULL,
    revoked_at     timestamptz,
    created_at     timestamptz NOT NULL DEFAULT date_trunc('milliseconds', clock_timestamp())
);
CREATE INDEX tokens_enterprise_id ON settled.tokens (enterprise_id);

-- Pages of what stands on a connection, the oldest first. Neither column is ever changed.
CREATE INDEX allocations_connection_id_created_at ON settled.allocations (connection_id, created_at, id);
CREATE INDEX connections_enterprise_id ON settled.connections (enterprise_id, connection_id);
CREATE INDEX connections_client_id ON settled.connections (client_id);
