-- 0013_frames.sql
-- What:  streams that take frames: small messages of a key with ids of its own, a rolling summary per key, and frames that are only live.
-- Why:   a job that writes tokens or progress needs order and ids per key without a row that every frame updates, and live frames need a place that costs no
--        WAL and leaves no dead rows.
-- Locks: access exclusive on millrace_engine.stream, for a moment; the table is small.
-- Cost:  a few milliseconds. The new column has no default, so no row is written.
-- Skew:  the previous release's clients neither see nor need any of it.

-- {ttl_seconds, min_length, max_length, alpha, summary_ttl_seconds}, all filled in; null: no frames.
alter table millrace_engine.stream add column frames jsonb;

-- Best-effort frames of all streams: append-only, in two rings that take turns (live_frame.sql). Not logged: they are empty after a crash.
create table millrace_engine.live_frame (
    stream_id     integer not null,
    ring          smallint not null,
    bound         integer not null,            -- how many of the key's best-effort frames are kept, as of this one
    burst         integer not null,            -- how many of them were appended in this frame's millisecond so far
    frame         bigint not null,             -- the id: milliseconds << 20 | number
    frame_count   bigint not null,             -- frames of the key up to this one, durable ones too
    live_count    bigint not null,             -- best-effort frames of the key up to this one
    rate          double precision not null,   -- frames a second: an exponential moving average
    created_at    timestamptz not null,
    key           text collate "C" not null,
    headers       jsonb not null,
    payload       jsonb,
    payload_bytes bytea
) partition by list (ring);
do $$
begin
    for r in 0..1 loop
        execute format('create unlogged table millrace_engine.live_frame_%1$s partition of millrace_engine.live_frame for values in (%1$s)
            with (autovacuum_vacuum_insert_threshold = -1)', r);
        execute format('create index live_frame_%1$s_key_idx on millrace_engine.live_frame_%1$s (stream_id, key, frame, live_count)', r);
    end loop;
end $$;
create sequence millrace_engine.live_frame_ring as smallint minvalue 0 maxvalue 1 start 0 cache 1 no cycle;
comment on sequence millrace_engine.live_frame_ring is 'Which of the two rings new best-effort frames go to.';
create sequence millrace_engine.live_frame_kept as bigint minvalue 0 start 0 cache 1;
comment on sequence millrace_engine.live_frame_kept is 'The size of the current ring, in bytes, after the last rotation: what is kept anyway.';
select setval('millrace_engine.live_frame_ring', 0), setval('millrace_engine.live_frame_kept', 0);

-- The rolling document of each key. Updates within an hour stay in their page (HOT): nothing else that changes is in an index.
create table millrace_engine.frame_summary (
    stream_id integer not null references millrace_engine.stream (id) on delete cascade,
    hour      integer not null,                -- of last_at, since 1970
    version   bigint not null,                 -- how many patches
    first_at  timestamptz not null,
    last_at   timestamptz not null,
    key       text collate "C" not null,
    document  jsonb not null,
    constraint frame_summary_pkey primary key (stream_id, key)
) with (fillfactor = 70);
create index frame_summary_hour_idx on millrace_engine.frame_summary (stream_id, hour);

-- Who appends a frame to a key notifies while somebody waits for it. Forgotten by a crash, and waited for again within seconds.
create unlogged table millrace_engine.frame_waiter (
    stream_id integer not null,
    key       text collate "C" not null,
    until     timestamptz not null,
    constraint frame_waiter_pkey primary key (stream_id, key)
) with (fillfactor = 50);

drop function if exists millrace.create_stream(text, integer, text, integer, integer, bigint, bigint, bigint, bigint, text, boolean);
