-- ledger_table.sql: the Redis entries that are written and may still come again. TABLE stands for the qualified name.
-- The key begins with what pruning looks for, so that one index does both. The digest is there because a Redis that lost its data starts ids over.
create table if not exists TABLE (
    processor  text        not null,
    target     text        not null,                -- the table that was written
    stream     text        not null,
    entry_at   timestamptz not null,                -- the time in the entry's id
    entry_id   text        not null,
    digest     bigint      not null,                -- FNV-1a of the entry's fields
    written_at timestamptz not null default now(),
    constraint millrace_ledger_pkey primary key (processor, target, stream, entry_at, entry_id, digest)
)
