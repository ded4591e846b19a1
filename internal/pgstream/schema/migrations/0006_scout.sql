-- 0006_scout.sql
-- What:  who is the scout, the process that wakes others when nobody's commit does (functions/scout.sql).
-- Why:   one process is enough. The lease only saves work: everything the scout does is harmless when two do it.
-- Locks: creates only.
-- Cost:  a few milliseconds.
-- Skew:  the previous release has no scout; its consumers look for themselves.

create table millrace_engine.scout (
    id         smallint not null default 1,
    holder     text,
    epoch      bigint not null default 0,                    -- grows with every change of holder
    since      timestamptz not null default '-infinity',     -- when the holder took it: after its term anybody may have it
    expires_at timestamptz not null default '-infinity',     -- renewed when half used up
    constraint scout_pkey primary key (id),
    constraint scout_single_row check (id = 1)
) with (fillfactor = 50);
insert into millrace_engine.scout default values;
