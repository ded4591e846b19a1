-- 0016_fresh_locks.sql
-- What:  a mark on streams of which every open publisher has made sure that the position its lock carries is recent.
-- Why:   readers of such a stream try the few locks that may be there, instead of listing all locks of the server (horizon.sql).
-- Locks: access exclusive on millrace_engine.stream, for a moment.
-- Cost:  a scan of the ledgers, which are short.
-- Skew:  publishers of the previous release do not make sure. No stream has the mark until they have ended (stream_state.sql).

alter table millrace_engine.stream
    add column fresh_locks boolean not null default false,
    add column suspects text[];     -- transactions that may not have made sure, while they are open; null: not looked yet
create index stream_stale_locks_idx on millrace_engine.stream (coalesce(parent_id, id)) where not fresh_locks;

-- A new lane had the place it began at as its horizon, which may be ahead of the log. After a reset to a place before it, messages were passed over.
update millrace_engine.claim set horizon = 0 where messages = 0 and horizon > 0;
