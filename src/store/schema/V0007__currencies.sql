-- What partners call the currencies. An update names its amount by the partner's symbol; the books know the system's currency.

-- One row for each time that a symbol had a meaning. What is over stays: a signature that was made under it is compared by it.
CREATE TABLE settled.currency_symbols (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    enterprise_id  text COLLATE "C" NOT NULL REFERENCES settled.partners,
    symbol         text COLLATE "C" NOT NULL CHECK (symbol ~ '^[A-Za-z0-9:._-]{1,64}$'),
    currency       text COLLATE "C" NOT NULL CHECK (currency ~ '^[A-Za-z0-9:._-]{1,64}$'),
    since          timestamptz NOT NULL,
    -- Null: it counts now.
    until          timestamptz CHECK (until >= since)
);
-- A symbol of a partner means one currency at a time; a currency may have several symbols.
CREATE UNIQUE INDEX currency_symbols_now ON settled.currency_symbols (enterprise_id, symbol) WHERE until IS NULL;

-- When a meaning begins and ends is the database's word: nobody writes one into the past.
CREATE FUNCTION settled.date_symbol() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.since := clock_timestamp();
        NEW.until := NULL;
    ELSIF OLD.until IS NOT NULL THEN
        RAISE EXCEPTION '% on %.% is refused: what is over does not change', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME;
    ELSE
        NEW.until := greatest(OLD.since, clock_timestamp());
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER dated BEFORE INSERT OR UPDATE ON settled.currency_symbols
    FOR EACH ROW EXECUTE FUNCTION settled.date_symbol();
CREATE TRIGGER fixed BEFORE UPDATE OF id, enterprise_id, symbol, currency, since
    ON settled.currency_symbols FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();
CREATE TRIGGER never_forgotten BEFORE DELETE OR TRUNCATE ON settled.currency_symbols
    FOR EACH STATEMENT EXECUTE FUNCTION settled.refuse_change();

-- By which symbol the partner named the amount that settled it. Null: by the currency itself.
ALTER TABLE settled.allocations ADD COLUMN partner_symbol text COLLATE "C";
