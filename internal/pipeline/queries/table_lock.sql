-- table_lock.sql: lets one transaction at a time create the thing of this name. Released at the transaction's end.
-- $1 name. The first key says who we are, so that another program's locks do not meet ours.
select pg_advisory_xact_lock(hashtext('millrace.dev/processor'), hashtext($1))
