-- 0007_statistics.sql
-- What:  the statistics of groups get more columns, and a table of when a group was last seen at work.
-- Why:   a function cannot change what it returns. A group lapses when nobody has worked for it, and no row on the way of a message says when
--        that was: maintenance notes what it sees (lapse.sql).
-- Locks: creates and drops only; a foreign key to millrace_engine.consumer_group.
-- Cost:  a few milliseconds.

drop function if exists millrace.stats(text);

-- One row per group that lapses by inactivity, written by maintenance only.
create table millrace_engine.group_activity (
    group_id integer not null references millrace_engine.consumer_group (id) on delete cascade,
    nonces   bigint[] not null,        -- of the newest claim of each lane that had one
    seen_at  timestamptz not null,     -- when maintenance last saw that there were other claims
    constraint group_activity_pkey primary key (group_id)
) with (fillfactor = 50);
