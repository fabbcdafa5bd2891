-- The same is written for less.

-- The form of a currency is checked where one is written. As a constraint it was matched anew at each change of a balance,
-- which was a good part of what that cost.
ALTER TABLE settled.accounts DROP CONSTRAINT accounts_currency_check;

CREATE FUNCTION settled.refuse_currency() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '"%" is no currency', NEW.currency
        USING ERRCODE = 'check_violation', SCHEMA = TG_TABLE_SCHEMA, TABLE = TG_TABLE_NAME, COLUMN = 'currency';
END
$$;

CREATE TRIGGER currency BEFORE INSERT OR UPDATE OF currency ON settled.accounts
    FOR EACH ROW WHEN (NEW.currency !~ '^[A-Za-z0-9:._-]{1,64}$') EXECUTE FUNCTION settled.refuse_currency();

-- A batch's events are much alike: to press them together is less work than to write and log them as they are. A server
-- that was built without lz4 keeps them as they are.
DO $$
BEGIN
    ALTER TABLE settled.outbox ALTER COLUMN publications SET COMPRESSION lz4;
    ALTER TABLE settled.outbox ALTER COLUMN publications SET STORAGE EXTENDED;
EXCEPTION
    WHEN feature_not_supported THEN NULL;
END
$$;
