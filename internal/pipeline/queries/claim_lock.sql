-- claim_lock.sql: lets one transaction at a time settle messages of a claim. Released at the transaction's end.
-- $1 the claim's token. It stands in a statement of its own, so that the ack after it sees what the one before has committed.
select pg_advisory_xact_lock(hashtext('millrace.dev/settle'), hashtext($1))
