-- incarnation_table.sql: how far each Redis stream ever reached, which Redis itself forgets when it loses its data. TABLE
-- stands for the qualified name.
create table if not exists TABLE (
    processor        text        not null,
    stream           text        not null,
    incarnation      integer     not null,
    top_id           text        not null,                -- greatest id the stream ever had
    added            bigint      not null,                -- entries ever added; -1 when Redis does not count them
    changed_at       timestamptz not null default now(),  -- when the incarnation was first seen
    mark_incarnation integer,                             -- the incarnation that the mark is of; any other one has none
    mark_id          text,                                -- an entry that the stream had
    mark_digest      bigint,                              -- of its fields
    constraint millrace_redis_stream_pkey primary key (processor, stream)
)
