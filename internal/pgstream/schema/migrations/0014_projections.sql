-- 0014_projections.sql
-- What:  projections that a consumer group runs, projections that a resource declares, rebuilds that go on in steps; tenants of an event store.
-- Why:   a rebuild in one transaction holds vacuum back as long as it takes, and begins again after a crash. A tenant that leaves takes a table with it.
-- Locks: access exclusive on millrace_engine.projection and stream, for a moment; the tables are small.
-- Cost:  a few milliseconds.
-- Skew:  the previous release's clients neither see nor need any of it.

alter table millrace_engine.projection
    add column id integer generated always as identity,
    add column group_id integer references millrace_engine.consumer_group (id) on delete cascade,   -- that runs it; null: it runs inside the append
    add column revision text not null default '',       -- changes when the function does, under the same name
    add column declared boolean not null default false, -- by the resource that owns the stream
    add column live boolean not null default true,      -- false until its first rebuild is done
    -- What a rebuild makes of it; the columns above hold until it is done.
    add column rebuilt_position bigint,                 -- everything up to it is in building; null: no rebuild is under way
    add column next_function text,
    add column next_documents text,
    add column next_document_id text[],
    add column next_group_id integer references millrace_engine.consumer_group (id) on delete cascade,
    add column next_revision text,
    add constraint projection_id_unique unique (id);

create unique index projection_group_idx on millrace_engine.projection (group_id);
create index projection_next_group_idx on millrace_engine.projection (next_group_id);

-- Documents of rebuilds that are under way, beside the live ones.
create table millrace_engine.building (
    projection_id integer not null references millrace_engine.projection (id) on delete cascade,
    key           text collate "C" not null,
    document      jsonb not null,
    version       bigint not null,
    constraint building_pkey primary key (projection_id, key)
);

-- A tenant has a partition of the stream's table for itself, beside the ring of segments.
alter table millrace_engine.stream add column has_tenants boolean not null default false;
create table millrace_engine.tenant (
    stream_id integer not null references millrace_engine.stream (id) on delete cascade,
    name      text collate "C" not null,
    segment   smallint not null,        -- above those of the ring
    constraint tenant_pkey primary key (stream_id, name),
    constraint tenant_segment_unique unique (stream_id, segment),
    constraint tenant_segment_outside_ring check (segment >= 16)
);

drop function if exists millrace.create_projection(text, text, text, text, text[]);
drop function if exists millrace_engine.project_document(millrace_engine.projection, text, jsonb, jsonb);
