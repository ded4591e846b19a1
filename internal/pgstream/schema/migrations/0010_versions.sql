-- 0010_versions.sql
-- What:  streams whose messages have versions per key, for event stores; where each key stands; projections that run with an append.
-- Why:   appending with an expected version needs one row per key to compare with and to lock: the log has no unique index, and no update.
-- Locks: access exclusive on millrace_engine.stream, for a moment; the table is small.
-- Cost:  a few milliseconds. The default is constant, so no row is written.
-- Skew:  the previous release's clients neither see nor need any of it.

alter table millrace_engine.stream add column versions boolean not null default false;

-- The last version of each key of a stream with versions. Updates stay in their page (HOT): version is in no index.
create table millrace_engine.entity (
    stream_id integer not null references millrace_engine.stream (id) on delete cascade,
    key       text collate "C" not null,
    version   bigint not null,          -- of the newest message, counted from 1
    constraint entity_pkey primary key (stream_id, key)
) with (fillfactor = 80);

create table millrace_engine.projection (
    stream_id   integer not null references millrace_engine.stream (id) on delete cascade,
    name        text not null,
    function    text not null,          -- schema-qualified, without arguments
    documents   text,                   -- schema-qualified table of documents; null: the function does everything
    document_id text[],                 -- path in the payload that names the document; null: the key
    constraint projection_pkey primary key (stream_id, name)
);

drop function if exists millrace.create_stream(text, integer, text, integer, integer, bigint, bigint, bigint, bigint, text);
