-- 0001_init.sql
-- What:  the two schemas and every table that is shared by all streams of the database.
-- Why:   `millrace` is what applications see (streams and verbs); `millrace_engine` is ours alone, so that no stream can be
--        named like one of our tables, today or after an upgrade.
-- Locks: creates only.
-- Cost:  a few milliseconds.

create schema if not exists millrace;
create schema if not exists millrace_engine;
comment on schema millrace is 'Millrace streams and the functions that applications call.';
comment on schema millrace_engine is 'Internal state of Millrace. Applications never touch it directly.';

-- One row per stream. id is also the upper 24 bits of the publishers'' advisory lock (horizon.sql).
create table millrace_engine.stream (
    id                    integer generated always as identity (maxvalue 16777215),
    name                  text not null,
    incarnation           uuid not null default gen_random_uuid(),
    partitions            integer not null,
    payload_type          text not null,
    segments              smallint not null,
    retention_policy      text not null,
    max_age_seconds       bigint not null default 0,   -- 0: no limit, here and below
    max_bytes             bigint not null default 0,
    max_messages          bigint not null default 0,
    max_message_bytes     integer not null default 1048576,
    first_position        bigint not null default 1,   -- the trim mark: positions below it can no longer be read
    segment_started_at    timestamptz not null default now(),
    owner                 jsonb,                       -- {cluster, namespace, name, uid} of the Kubernetes resource
    created_at            timestamptz not null default now(),
    constraint stream_pkey primary key (id),
    constraint stream_name_unique unique (name),
    constraint stream_name_safe check (name ~ '^[a-z][a-z0-9_]{0,47}$'),
    constraint stream_partitions_range check (partitions between 1 and 1024),
    constraint stream_payload_type_known check (payload_type in ('JSON', 'Bytes')),
    constraint stream_segments_range check (segments between 2 and 16),
    constraint stream_retention_policy_known check (retention_policy in ('Limits', 'Interest', 'WorkQueue')),
    constraint stream_limits_positive check (max_age_seconds >= 0 and max_bytes >= 0 and max_messages >= 0 and max_message_bytes > 0)
);

create table millrace_engine.consumer_group (
    id                 integer generated always as identity (maxvalue 268435455),
    stream_id          integer not null references millrace_engine.stream (id) on delete cascade,
    name               text not null,
    mode               text not null,
    start              jsonb not null,                -- {from, position, time} as asked for; never changes
    ack_wait_ms        bigint not null default 30000,
    max_attempts       integer not null default 10,   -- 0: no limit
    backoff_initial_ms bigint not null default 1000,
    backoff_max_ms     bigint not null default 300000,
    failure_policy     text not null default 'Block',
    paused             boolean not null default false,
    owner              jsonb,
    created_at         timestamptz not null default now(),
    constraint consumer_group_pkey primary key (id),
    constraint consumer_group_name_unique unique (stream_id, name),
    constraint consumer_group_name_safe check (name ~ '^[a-z][a-z0-9_]{0,47}$'),
    constraint consumer_group_mode_known check (mode in ('Ordered', 'Shared')),
    constraint consumer_group_failure_policy_known check (failure_policy in ('Block', 'Skip')),
    constraint consumer_group_times_positive check (ack_wait_ms > 0 and max_attempts >= 0 and backoff_initial_ms >= 0
        and backoff_max_ms >= backoff_initial_ms)
);

-- A lane is a contiguous range of hash slots with one line of claims. A Shared group has one lane and no owner. An Ordered
-- group starts with one lane; lanes are split and merged while idle so that members share the slots
-- (docs/design/engine.md, "Lanes").
create table millrace_engine.lane (
    id        bigint generated always as identity (maxvalue 536870911),
    group_id  integer not null references millrace_engine.consumer_group (id) on delete cascade,
    slot_low  smallint not null,
    slot_high smallint not null,              -- exclusive
    member    text,                           -- Ordered: the owner
    epoch     bigint not null default 0,      -- grows with every change of owner
    -- When a claim was given back: look at the open claims then, whatever the ledger's next_check says.
    recheck_at timestamptz not null default 'infinity',
    constraint lane_pkey primary key (id),
    constraint lane_slots_valid check (0 <= slot_low and slot_low < slot_high and slot_high <= 1024)
) with (fillfactor = 50);
create index lane_group_id_idx on millrace_engine.lane (group_id, slot_low);

-- Members of Ordered groups. Their leases are renewed only when half used up.
create table millrace_engine.member (
    group_id   integer not null references millrace_engine.consumer_group (id) on delete cascade,
    name       text not null,
    joined     bigint generated always as identity,
    expires_at timestamptz not null,
    constraint member_pkey primary key (group_id, name)
) with (fillfactor = 50);

-- Which of the three ledger rings new rows go to.
create table millrace_engine.ledger (
    id         smallint not null default 1,
    ring       smallint not null default 0,
    rotated_at timestamptz not null default now(),
    constraint ledger_pkey primary key (id),
    constraint ledger_single_row check (id = 1),
    constraint ledger_ring_range check (ring between 0 and 2)
) with (fillfactor = 50);
insert into millrace_engine.ledger default values;

-- The ledger of claims: one row per range of messages handed out, never updated, never deleted. Emptied by TRUNCATE of a whole
-- ring after what is still needed was carried over (rotate_ledger.sql).
create table millrace_engine.claim (
    lane_id    bigint not null,
    claim      bigint not null,           -- counts up per lane
    low        bigint not null,           -- exclusive
    high       bigint not null,           -- inclusive
    frontier   bigint not null,           -- everything up to it has been claimed at least once
    horizon    bigint not null,           -- the highest horizon handed out so far: a cache, and never goes back
    floor      bigint not null,           -- every claim up to this number is settled, but for the stragglers; lags behind the truth, never ahead
    nonce      bigint not null,           -- random: claim numbers can be reused after a crash, nonces are not
    expires_at timestamptz not null,
    next_check timestamptz not null,      -- no open claim expires before it
    messages   integer not null,
    attempt    integer not null,
    ring       smallint not null,
    copy       smallint not null default 0,  -- how often it was carried over to a newer ring; the newest copy counts
    member     text,
    stragglers bigint[],                  -- claims up to floor that are still open: at most 64, so that one slow member keeps no scan long
    careful_to bigint not null default 0, -- Ordered: messages up to it are handed out one at a time, because a claim with them expired twice
    settled    int8multirange             -- settled before this claim was made (a reclaimed or carried-over range)
) partition by list (ring);
create table millrace_engine.settlement (
    lane_id      bigint not null,
    claim        bigint not null,
    at           timestamptz not null,
    expires_at   timestamptz,             -- kinds E and R: the claim's new end
    next_attempt integer,                 -- kind R: attempt number of the next delivery
    ring         smallint not null,
    kind         "char" not null,         -- A acked; T taken over; P some messages settled; E extended; R given back
    settled      int8multirange,          -- kind P
    constraint settlement_kind_known check (kind in ('A', 'T', 'P', 'E', 'R'))
) partition by list (ring);

do $$
begin
    for r in 0..2 loop
        execute format('create table millrace_engine.claim_%1$s partition of millrace_engine.claim for values in (%1$s)
            with (autovacuum_vacuum_insert_threshold = -1)', r);
        execute format('create index claim_%1$s_lane_claim_idx on millrace_engine.claim_%1$s (lane_id, claim)', r);
        execute format('create table millrace_engine.settlement_%1$s partition of millrace_engine.settlement for values in (%1$s)
            with (autovacuum_vacuum_insert_threshold = -1)', r);
        execute format('create index settlement_%1$s_lane_claim_idx on millrace_engine.settlement_%1$s (lane_id, claim)', r);
    end loop;
end $$;

-- Exceptions: messages of Shared groups that were nacked, or whose claim kept expiring. The only rows that change.
create table millrace_engine.delivery (
    id            bigint generated always as identity,
    group_id      integer not null references millrace_engine.consumer_group (id) on delete cascade,
    "position"    bigint not null,
    key           text,
    headers       jsonb,
    payload       jsonb,
    payload_bytes bytea,
    created_at    timestamptz not null,
    attempt       integer not null,          -- deliveries so far
    visible_at    timestamptz not null,      -- due, or end of the lease while nonce is set
    nonce         bigint,
    member        text,
    suspect       boolean not null default false,  -- from a claim that expired twice: handed out alone
    errors        jsonb not null default '[]',
    constraint delivery_pkey primary key (id),
    constraint delivery_position_unique unique (group_id, "position")
) with (fillfactor = 70);
create index delivery_visible_at_idx on millrace_engine.delivery (group_id, visible_at);
create index delivery_nonce_idx on millrace_engine.delivery (group_id, nonce) where nonce is not null;

create table millrace_engine.dead_letter (
    id            bigint generated always as identity,
    group_id      integer not null references millrace_engine.consumer_group (id) on delete cascade,
    "position"    bigint not null,
    key           text,
    headers       jsonb,
    payload       jsonb,
    payload_bytes bytea,
    created_at    timestamptz not null,
    attempts      integer not null,
    reason        text not null,
    errors        jsonb not null default '[]',
    dead_at       timestamptz not null,
    constraint dead_letter_pkey primary key (id),
    constraint dead_letter_position_unique unique (group_id, "position")
);

-- Facts about this installation of the engine: runtime_role.
create table millrace_engine.setting (
    name  text not null,
    value text not null,
    constraint setting_pkey primary key (name)
);
