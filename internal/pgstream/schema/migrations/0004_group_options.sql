-- 0004_group_options.sql
-- What:  priorities of a stream (lanes that are streams of their own with a parent), filters of a group, when a group lapses, the failure
--        policy Park, and the end of the signatures of create_stream and create_group that have got more parameters.
-- Why:   a name with a dot belongs to a child only: nobody can create a stream that looks like one.
-- Locks: access exclusive on millrace_engine.stream and millrace_engine.consumer_group, for a moment; the tables are small.
-- Cost:  a few milliseconds. The defaults are constants, so no row is written.
-- Skew:  consumers of the previous release call the functions of this one, and so get filters; of a stream with priorities they read priority 0 only. Raise
--        priorities when they are gone.

alter table millrace_engine.stream
    add column priorities smallint not null default 1,   -- 1: no lanes; n: the children <name>.p1 to <name>.p<n-1>, the highest first
    add column parent_id  integer,                       -- of a child
    add column priority   smallint not null default 0,   -- of a child; higher is delivered first
    add constraint stream_parent_id_fkey foreign key (parent_id) references millrace_engine.stream (id) on delete cascade,
    add constraint stream_parent_priority_unique unique (parent_id, priority),
    add constraint stream_priorities_range check (priorities between 1 and 8),
    add constraint stream_child_valid check (case when parent_id is null then priority = 0 else priority between 1 and 7 and priorities = 1 end),
    drop constraint stream_name_safe,
    add constraint stream_name_safe check (case when parent_id is null then name ~ '^[a-z][a-z0-9_]{0,47}$'
        else name ~ '^[a-z][a-z0-9_]{0,47}\.p[1-7]$' end);

alter table millrace_engine.consumer_group
    add column filter              jsonb,                -- null: every message (matches.sql)
    add column lapse_after_seconds bigint not null default 0,   -- 0: never, here and below
    add column lapse_lag           bigint not null default 0,
    add column lapsed_at           timestamptz,          -- since then it keeps nothing from being removed; reset_group ends it
    add column lapse_reason        text,
    add column parent_id           integer,              -- of a group of a child stream: the group that it mirrors
    add constraint consumer_group_parent_id_fkey foreign key (parent_id) references millrace_engine.consumer_group (id) on delete cascade,
    add constraint consumer_group_parent_stream_unique unique (parent_id, stream_id),
    add constraint consumer_group_lapse_positive check (lapse_after_seconds >= 0 and lapse_lag >= 0),
    drop constraint consumer_group_failure_policy_known,
    add constraint consumer_group_failure_policy_known check (failure_policy in ('Block', 'Skip', 'Park'));

drop function if exists millrace.create_stream(text, integer, text, integer);
drop function if exists millrace.create_group(text, text, text, text);
