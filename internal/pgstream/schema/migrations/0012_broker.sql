-- 0012_broker.sql
-- What:  queue policies of a group, and the deliveries of groups that hand out from the delivery table only (functions/enqueue.sql).
-- Why:   at most one message of a key queued, or active, needs a row for each message that waits: the log has none.
-- Locks: access exclusive on millrace_engine.consumer_group and millrace_engine.delivery, for a moment.
-- Cost:  a few milliseconds; the new columns are null, so no row is written, and the indexes are of rows that no group has yet.
-- Skew:  the previous release's clients call the functions of this one. It has no group with a policy.

alter table millrace_engine.consumer_group
    add column queue_policy text,                          -- null: Standard
    add constraint consumer_group_queue_policy_known check (queue_policy in ('Short', 'Singleton', 'Stately'));

alter table millrace_engine.delivery
    add column queue_key text;                             -- of a message that waits in the delivery table from the beginning: its key, or ''
create index delivery_queued_idx on millrace_engine.delivery (group_id, queue_key, visible_at, "position") where queue_key is not null and nonce is null;
create index delivery_active_idx on millrace_engine.delivery (group_id, queue_key) where queue_key is not null and nonce is not null;

drop function if exists millrace.stats(text);
drop function if exists millrace_engine.group_report();
drop function if exists millrace_engine.progress(integer[]);
drop function if exists millrace.create_group(text, text, text, text, jsonb, text, integer, double precision, bigint, timestamptz);
