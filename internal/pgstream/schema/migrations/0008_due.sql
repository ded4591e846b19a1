-- 0008_due.sql
-- What:  indexes of the deliveries that wait, in the order in which they are handed out, and of those that are held.
-- Why:   receive looked through every due delivery three times to hand out one. After a claim of thousands of messages had expired twice, each receive took milliseconds.
-- Locks: share on the deliveries while the indexes are built: settling and retrying messages waits, publishing and receiving from the log do not.
-- Cost:  a second per million waiting deliveries.
-- Skew:  none; the previous release's functions use them too.

create index delivery_due_idx on millrace_engine.delivery (group_id, visible_at, "position") where nonce is null;
create index delivery_held_idx on millrace_engine.delivery (group_id, visible_at) where nonce is not null;
