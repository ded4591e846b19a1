-- 0011_memory.sql
-- What:  workflow memories: which there are, in which table each keeps its workflows, and how long completed ones stay; the numbers of locks.
-- Why:   handlers of messages that belong to one workflow keep its state between them (functions/memory.sql).
-- Locks: creates only.
-- Cost:  a few milliseconds.
-- Skew:  the previous release neither sees nor needs any of it.

create table millrace_engine.memory (
    id                     integer generated always as identity,
    name                   text not null,
    relation               text not null,               -- its table, with its schema, quoted
    keep_completed_seconds bigint not null default 0,   -- 0: for ever
    created_at             timestamptz not null default now(),
    constraint memory_pkey primary key (id),
    constraint memory_name_unique unique (name),
    constraint memory_relation_unique unique (relation),
    constraint memory_name_safe check (name ~ '^[a-z][a-z0-9_]{0,47}$'),
    constraint memory_keep_completed_positive check (keep_completed_seconds >= 0)
);

-- Of all memories: a number is never given twice, even when what it had locked is removed and made anew.
create sequence millrace_engine.memory_token as bigint increment 1 cache 1 no cycle;
