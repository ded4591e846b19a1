-- 0003_publish_options.sql
-- What:  keys of messages that must not be published twice, and messages that wait for their time.
-- Why:   a publisher that repeats itself after a lost answer would append twice; a message for later would be an invisible row in the log.
-- Locks: access exclusive on millrace_engine.stream for a moment: a column with a default, no rewrite.
-- Cost:  a few milliseconds.
-- Skew:  the previous release neither reads nor writes what is added here.

alter table millrace_engine.stream
    add column dedupe_window_seconds bigint not null default 120,   -- 0: publishing with a dedupe key is refused
    add constraint stream_dedupe_window_positive check (dedupe_window_seconds >= 0);

-- One row per key that was published with a dedupe key. Expired rows mean nothing and are purged (dedupe.sql).
create table millrace_engine.dedupe (
    stream_id  integer not null references millrace_engine.stream (id) on delete cascade,
    key        text not null,
    "position" bigint,                    -- null: it was published with a delay
    expires_at timestamptz not null,
    constraint dedupe_pkey primary key (stream_id, key)
) with (fillfactor = 80);                 -- the position is filled in by an update that touches no index
create index dedupe_expires_at_idx on millrace_engine.dedupe (expires_at);

-- Messages for later. They have no position yet: move_due appends them to their stream when they are due (delayed.sql).
create table millrace_engine.delayed (
    id            bigint generated always as identity,
    stream_id     integer not null references millrace_engine.stream (id) on delete cascade,  -- of the priority it was published with
    due_at        timestamptz not null,
    key           text,
    headers       jsonb,
    payload       jsonb,
    payload_bytes bytea,
    created_at    timestamptz not null default now(),
    constraint delayed_pkey primary key (id),
    constraint delayed_one_payload check (num_nonnulls(payload, payload_bytes) = 1)
);
create index delayed_due_at_idx on millrace_engine.delayed (due_at, id);
create index delayed_stream_id_idx on millrace_engine.delayed (stream_id);
