-- 0015_blocked.sql
-- What:  a mark on the deliveries that wait behind an active message of their key, which keeps them out of the index of what is due.
-- Why:   with a policy that lets one message of a key be active, receive went past all messages that wait behind active keys, each time.
-- Locks: access exclusive on millrace_engine.delivery while an index is built.
-- Cost:  a second per million waiting deliveries; the default is a constant, so no row is written.
-- Skew:  the previous release's clients call the functions of this one.

alter table millrace_engine.delivery
    add column blocked boolean not null default false;     -- found behind an active message of its key: looked for by key, and no longer by time
drop index millrace_engine.delivery_due_idx;
create index delivery_due_idx on millrace_engine.delivery (group_id, visible_at, "position") where nonce is null and not blocked;
create index delivery_blocked_idx on millrace_engine.delivery (group_id, queue_key) where blocked;
