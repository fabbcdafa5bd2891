-- A publication that the broker refused and an operator put back gets an outbox row of its own: this is whose it is. The row's
-- own id is new, since whoever had the batch's row may delete by the batch's id once more.
ALTER TABLE settled.outbox ADD COLUMN of_batch uuid;
