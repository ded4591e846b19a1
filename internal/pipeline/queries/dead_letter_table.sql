-- dead_letter_table.sql: items that could not be decoded or written, with why. TABLE stands for the qualified name.
-- The key makes putting one aside repeatable; the digest is there because a Redis that lost its data starts ids over.
create table if not exists TABLE (
    id         bigint generated always as identity,
    processor  text        not null,
    stream     text        not null,
    entry_id   text        not null,
    digest     bytea       not null,                -- SHA-256 of entry
    deliveries integer     not null,
    reason     text        not null,
    entry      jsonb       not null,                -- fields in order: [{"name":…,"value":…}], "base64" for what is not text; a message: {"key":…,"payload":…}
    failed_at  timestamptz not null default now(),
    branch     text        not null default '',     -- of a fan-out that refuses the item; empty: the whole pipeline
    constraint millrace_dead_letter_pkey primary key (id),
    constraint millrace_dead_letter_entry unique (processor, stream, entry_id, digest, branch)
)
