-- What the first release of the schema installs, as schema.SQL() of that version printed it. Migrations start from here in the tests.
create schema if not exists millrace_engine;
create table if not exists millrace_engine.schema_version (
    version    integer not null,
    applied_at timestamptz not null default now(),
    functions  text,                        -- hash of the functions that belong to it
    constraint schema_version_pkey primary key (version)
);

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

insert into millrace_engine.schema_version (version) values (1);

-- millrace.ack(claim) returns void
-- Settles every message of the claim. In the caller's transaction: effect and ack commit together, which makes the effect exactly once.
-- Raises: MR001 the claim has ended; nothing is settled then, and the caller must undo what it did for these messages; MR003 isolation level.
create or replace function millrace.ack(p_claim text) returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
begin
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        delete from millrace_engine.delivery d where d.group_id = t[1] and d.nonce = t[4];
    else
        if current_setting('transaction_isolation') <> 'read committed' then
            perform millrace_engine.refuse_isolation();
        end if;
        -- As hold_claim, with the settlement in the same statement: this is the hot path.
        perform pg_advisory_xact_lock((1610612736 + t[2])::integer, (t[3] & 2147483647)::integer),
                pg_advisory_xact_lock_shared((1073741824 + t[2])::integer, (t[3] & 2147483647)::integer);
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            select c.lane_id, c.claim, millrace_engine.clock(), l.ring, 'A'
            from millrace_engine.claim c join millrace_engine.ledger l on l.id = 1
            where c.lane_id = t[2] and c.claim = t[3] and c.nonce = t[4]
              and not exists (select from millrace_engine.settlement s
                  where s.lane_id = t[2] and s.claim = t[3] and s.kind in ('A', 'T', 'R'))
            limit 1;
    end if;
    if not found then
        raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
            hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
    end if;
end $$;
comment on function millrace.ack(text) is 'Settles all messages of a claim, in the caller''s transaction.';

-- millrace.ack_messages(claim, positions) returns void
-- Settles some messages of the claim; the rest stay held. The last of them settles the claim.
-- Raises: MR001 the claim has ended, or one of the messages is settled already; MR004 a position that the claim does not hold.
create or replace function millrace.ack_messages(p_claim text, p_positions bigint[]) returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    n integer;
begin
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        delete from millrace_engine.delivery d where d.group_id = t[1] and d.nonce = t[4] and d."position" = any (p_positions);
        get diagnostics n = row_count;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    if exists (select from unnest(p_positions) p where c.settled @> p) then
        raise exception 'some of these messages are settled already' using errcode = 'MR001', hint = 'Their effect is done; undo this one.';
    end if;
    perform millrace_engine.settle_messages(c, p_positions);
end $$;
comment on function millrace.ack_messages(text, bigint[]) is 'Settles some messages of a claim, in the caller''s transaction.';

-- millrace_engine.settle_messages(claim, positions) returns void
-- Notes progress inside a held range claim, and settles the claim when nothing is left in it.
create or replace function millrace_engine.settle_messages(p_claim millrace_engine.claim, p_positions bigint[]) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    done int8multirange;
    progress int8multirange;
    total bigint;
    rest boolean;
    source text;
begin
    select range_agg(int8range(p, p, '[]')) into progress from unnest(p_positions) p;
    if progress is null then
        return;
    end if;
    if not int8range(p_claim.low, p_claim.high, '(]') @> range_merge(progress) then
        raise exception 'the claim does not hold all of these positions' using errcode = 'MR004',
            hint = 'Pass positions that came with this claim.';
    end if;
    insert into millrace_engine.settlement (lane_id, claim, at, ring, kind, settled)
        select p_claim.lane_id, p_claim.claim, millrace_engine.clock(), l.ring, 'P', progress from millrace_engine.ledger l where l.id = 1;
    select coalesce(range_agg(s.settled), '{}') + coalesce(p_claim.settled, '{}') into done from millrace_engine.settlement s
        where s.lane_id = p_claim.lane_id and s.claim = p_claim.claim and s.kind = 'P';
    select coalesce(sum(upper(r) - lower(r)), 0) into total from unnest(done) r;
    if total < p_claim.messages then
        return;
    end if;
    -- Enough positions to be everything; make sure that they are the right ones before the rest is given up.
    select format('select exists (select from millrace.%I m where m."position" > $1 and m."position" <= $2
            and millrace_engine.slot(m.key, m."position") between %s and %s - 1 and not $3 @> m."position")', st.name, l.slot_low, l.slot_high) into source
        from millrace_engine.lane l
        join millrace_engine.consumer_group g on g.id = l.group_id
        join millrace_engine.stream st on st.id = g.stream_id
        where l.id = p_claim.lane_id;
    execute source into rest using p_claim.low, p_claim.high, done;
    if not rest then
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            select p_claim.lane_id, p_claim.claim, millrace_engine.clock(), l.ring, 'A' from millrace_engine.ledger l where l.id = 1;
    end if;
end $$;

-- millrace_engine.apply_group(spec jsonb) returns integer
-- Creates the consumer group, or brings its settings to the spec. Idempotent.
-- Keys: stream, name, mode, start {from, position, time}, ack_wait_ms, max_attempts, backoff_initial_ms, backoff_max_ms, failure_policy,
--       paused, owner. A missing key keeps the present value, or takes the default.
-- Raises: MR002 no such stream; MR004 for what can never be done, with what to do instead; MR007 it has another owner.
create or replace function millrace_engine.apply_group(p_spec jsonb) returns integer
language plpgsql volatile as $$
declare
    stream integer := millrace_engine.stream_id(p_spec ->> 'stream');
    s millrace_engine.stream;
    g millrace_engine.consumer_group;
    wanted millrace_engine.consumer_group;
    first_ bigint;
begin
    if p_spec ->> 'name' is null or p_spec ->> 'name' !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'consumer group name % is not usable', coalesce(quote_literal(p_spec ->> 'name'), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    -- The stream''s row: retention decides with the same lock what no group needs any more.
    select * into strict s from millrace_engine.stream x where x.id = stream for update;
    select * into g from millrace_engine.consumer_group x where x.stream_id = stream and x.name = p_spec ->> 'name' for update;
    if found then
        wanted := jsonb_populate_record(g, jsonb_strip_nulls(p_spec) - 'id' - 'stream_id' - 'created_at');
        if g.owner <> (p_spec -> 'owner') then
            raise exception 'consumer group "%" belongs to %', g.name, g.owner using errcode = 'MR007', hint = 'Let its owner release it first.';
        end if;
        if wanted.mode <> g.mode then
            raise exception 'consumer group "%" is % and cannot become %', g.name, g.mode, wanted.mode using errcode = 'MR004',
                hint = 'Create another group with that mode, starting at the position this one has reached.';
        end if;
        if wanted.start <> g.start then
            raise exception 'consumer group "%" has started at % and cannot start elsewhere', g.name, g.start using errcode = 'MR004',
                hint = 'Create another group with that start.';
        end if;
        if wanted is distinct from g then
            update millrace_engine.consumer_group x set ack_wait_ms = wanted.ack_wait_ms, max_attempts = wanted.max_attempts,
                    backoff_initial_ms = wanted.backoff_initial_ms, backoff_max_ms = wanted.backoff_max_ms,
                    failure_policy = wanted.failure_policy, paused = wanted.paused, owner = wanted.owner
                where x.id = g.id;
        end if;
        return g.id;
    end if;
    if s.retention_policy = 'WorkQueue' and exists (select from millrace_engine.consumer_group x where x.stream_id = stream) then
        raise exception 'stream "%" has retention WorkQueue, which allows one consumer group, and it has one', s.name using errcode = 'MR004',
            hint = 'Use retention Interest or Limits for several groups.';
    end if;
    wanted := jsonb_populate_record(null::millrace_engine.consumer_group,
        '{"mode": "Shared", "start": {"from": "Earliest"}, "ack_wait_ms": 30000, "max_attempts": 10, "backoff_initial_ms": 1000,
          "backoff_max_ms": 300000, "failure_policy": "Block", "paused": false}'::jsonb || jsonb_strip_nulls(p_spec));
    case wanted.start ->> 'from'
        when 'Earliest' then first_ := s.first_position;
        when 'Latest' then first_ := greatest(millrace_engine.horizon(stream) + 1, s.first_position);
        when 'Position' then first_ := (wanted.start ->> 'position')::bigint;
        when 'Time' then
            -- The horizon first: what is committed while we look may have lower positions than what we find.
            first_ := millrace_engine.horizon(stream) + 1;
            execute format('select least($2, min("position")) from millrace.%I where created_at >= $1', s.name)
                into first_ using (wanted.start ->> 'time')::timestamptz, first_;
        else
            raise exception 'a consumer group cannot start at %', wanted.start ->> 'from' using errcode = 'MR004',
                hint = 'Use Earliest, Latest, Position or Time.';
    end case;
    if first_ is null or first_ < 1 then
        raise exception 'start position % is not valid', first_ using errcode = 'MR004', hint = 'Positions begin with 1.';
    end if;
    insert into millrace_engine.consumer_group (stream_id, name, mode, start, ack_wait_ms, max_attempts, backoff_initial_ms, backoff_max_ms,
            failure_policy, paused, owner)
        values (stream, wanted.name, wanted.mode, wanted.start, wanted.ack_wait_ms, wanted.max_attempts, wanted.backoff_initial_ms,
            wanted.backoff_max_ms, wanted.failure_policy, wanted.paused, wanted.owner)
        returning * into g;
    perform millrace_engine.open_lane(g.id, 0, 1024, first_ - 1, null);
    return g.id;
end $$;
comment on function millrace_engine.apply_group(jsonb) is 'Creates a consumer group or brings it to the given settings.';

-- millrace.create_group(stream, group, mode, start) returns integer
-- For users without Kubernetes. mode is Shared or Ordered; start is Earliest or Latest. Changes nothing when the group exists like that.
create or replace function millrace.create_group(p_stream text, p_group text, p_mode text default 'Shared', p_start text default 'Earliest')
returns integer
language sql volatile
return millrace_engine.apply_group(jsonb_build_object('stream', p_stream, 'name', p_group, 'mode', p_mode,
    'start', jsonb_build_object('from', p_start)));
comment on function millrace.create_group(text, text, text, text) is 'Creates a consumer group of a stream. Repeating it is harmless.';

-- millrace_engine.drop_group(stream, group) returns void
-- Removes the group with its deliveries and dead letters. Nothing happens when it does not exist. Rows left in the ledgers are unreachable
-- without their lane, and go with the next truncation.
create or replace function millrace_engine.drop_group(p_stream text, p_group text) returns void
language plpgsql volatile as $$
declare
    g integer;
begin
    select x.id into g from millrace_engine.consumer_group x join millrace_engine.stream s on s.id = x.stream_id
        where s.name = p_stream and x.name = p_group for update of x;
    if found then
        perform pg_advisory_xact_lock(536870912 + g, 0);
        delete from millrace_engine.consumer_group x where x.id = g;
    end if;
end $$;
comment on function millrace_engine.drop_group(text, text) is 'Removes a consumer group.';

-- millrace_engine.apply_stream(spec jsonb) returns integer
-- Creates the stream, or brings its settings and its database objects to the spec. Idempotent; concurrent callers wait for each other.
-- Keys: name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes, max_messages,
--       max_message_bytes, owner. A missing key keeps the present value, or takes the default.
-- Raises: MR004 for what can never be done, with what to do instead; MR007 it has another owner.
create or replace function millrace_engine.apply_stream(p_spec jsonb) returns integer
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    wanted millrace_engine.stream;
    step record;
begin
    if p_spec ->> 'name' is null or p_spec ->> 'name' !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'stream name % is not usable', coalesce(quote_literal(p_spec ->> 'name'), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    -- One lock for all changes of structure: they are rare, and CREATE TABLE takes more than one lock.
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.name = p_spec ->> 'name' for update;
    if not found then
        wanted := jsonb_populate_record(null::millrace_engine.stream,
            '{"partitions": 8, "payload_type": "JSON", "segments": 4, "retention_policy": "Limits", "max_age_seconds": 0, "max_bytes": 0,
              "max_messages": 0, "max_message_bytes": 1048576}'::jsonb || jsonb_strip_nulls(p_spec));
        insert into millrace_engine.stream (name, partitions, payload_type, segments, retention_policy, max_age_seconds, max_bytes,
                max_messages, max_message_bytes, owner)
            values (wanted.name, wanted.partitions, wanted.payload_type, wanted.segments, wanted.retention_policy, wanted.max_age_seconds,
                wanted.max_bytes, wanted.max_messages, wanted.max_message_bytes, wanted.owner)
            returning * into s;
    else
        wanted := jsonb_populate_record(s, jsonb_strip_nulls(p_spec) - 'id' - 'incarnation' - 'first_position' - 'segment_started_at' - 'created_at');
        if s.owner <> (p_spec -> 'owner') then
            raise exception 'stream "%" belongs to %', s.name, s.owner using errcode = 'MR007', hint = 'Let its owner release it first.';
        end if;
        if wanted.partitions < s.partitions then
            raise exception 'stream "%" has % partitions and cannot go down to %', s.name, s.partitions, wanted.partitions
                using errcode = 'MR004', hint = format('Keep %s or more. For fewer, create another stream and move its consumers.', s.partitions);
        end if;
        if wanted.payload_type <> s.payload_type then
            raise exception 'the payload type of stream "%" is % and cannot become %', s.name, s.payload_type, wanted.payload_type
                using errcode = 'MR004', hint = 'Create another stream with that payload type.';
        end if;
        if wanted.segments < s.segments then
            raise exception 'stream "%" has % segments and cannot go down to %', s.name, s.segments, wanted.segments
                using errcode = 'MR004', hint = format('Keep %s or more.', s.segments);
        end if;
        if wanted is distinct from s then
            update millrace_engine.stream x set partitions = wanted.partitions, segments = wanted.segments,
                    retention_policy = wanted.retention_policy, max_age_seconds = wanted.max_age_seconds, max_bytes = wanted.max_bytes,
                    max_messages = wanted.max_messages,
                    max_message_bytes = wanted.max_message_bytes, owner = wanted.owner
                where x.id = s.id;
        end if;
    end if;
    for step in select r.statement from millrace_engine.stream_repairs(s.id) r loop
        execute step.statement;
    end loop;
    return s.id;
end $$;
comment on function millrace_engine.apply_stream(jsonb) is 'Creates a stream or brings it to the given settings; repairs what is missing.';

-- millrace_engine.assign(group, member, partitions, now, lease in ms) returns void
-- Ordered groups only, under the group's receive lock. Renews the member's lease, forgets members whose lease has ended, and brings the
-- lanes nearer to a fair share: the live members, in the order they joined, each get an equal run of partitions. A lane is split, merged
-- or handed over only while none of its claims is open, so there is no moment at which two members hold one key, and nobody else stops.
-- A lane of a dead member is taken over with its open claim; receive fences that claim before it delivers again.
create or replace function millrace_engine.assign(p_group integer, p_member text, p_partitions integer, p_now timestamptz, p_lease_ms bigint)
returns void
language plpgsql volatile as $$
declare
    members integer;
    rank integer;
    mine_low integer;
    mine_high integer;
    l record;
    left_id bigint;      -- the idle lane of this member that ends where the present one begins, if any
    left_low smallint;
    left_high smallint;
    left_frontier bigint;
begin
    update millrace_engine.member m set expires_at = p_now + make_interval(secs => p_lease_ms / 1000.0)
        where m.group_id = p_group and m.name = p_member and m.expires_at < p_now + make_interval(secs => p_lease_ms / 2000.0);
    insert into millrace_engine.member (group_id, name, expires_at)
        values (p_group, p_member, p_now + make_interval(secs => p_lease_ms / 1000.0)) on conflict do nothing;
    -- A member that is being extended just now holds its row, and is alive.
    delete from millrace_engine.member m where m.group_id = p_group and m.name in (
        select x.name from millrace_engine.member x where x.group_id = p_group and x.expires_at <= p_now for update skip locked);

    select count(*), count(*) filter (where m.joined < me.joined) into members, rank
        from millrace_engine.member m, (select x.joined from millrace_engine.member x where x.group_id = p_group and x.name = p_member) me
        where m.group_id = p_group;
    mine_low := (rank * p_partitions / members) * 1024 / p_partitions;
    mine_high := ((rank + 1) * p_partitions / members) * 1024 / p_partitions;

    for l in
        select x.*, f.frontier, f.settled, f.idle, x.member is not distinct from p_member as mine,
               x.member is null or not exists (select from millrace_engine.member m where m.group_id = p_group and m.name = x.member) as free
        from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f
        where x.group_id = p_group order by x.slot_low
    loop
        if l.idle and (l.mine or l.free) and mine_low < mine_high and ((l.slot_low < mine_low and mine_low < l.slot_high) or (l.slot_low < mine_high and mine_high < l.slot_high)) then
            perform millrace_engine.split_lane(l.id, l.frontier, l.settled, array[l.slot_low, mine_low, mine_high, l.slot_high], p_member, mine_low, mine_high);
            left_id := null;
        elsif l.mine and l.idle and (l.slot_high <= mine_low or l.slot_low >= mine_high) then
            update millrace_engine.lane x set member = null where x.id = l.id;
            left_id := null;
        elsif l.free and l.slot_low < mine_high and l.slot_high > mine_low then
            update millrace_engine.lane x set member = p_member, epoch = x.epoch + 1 where x.id = l.id;
            left_id := null;
        elsif l.mine and l.idle and left_id is not null and left_high = l.slot_low and left_frontier = l.frontier and l.settled is null then
            -- Two idle neighbours of one member at one place: read them as one.
            delete from millrace_engine.lane x where x.id in (left_id, l.id);
            perform millrace_engine.open_lane(p_group, left_low, l.slot_high, l.frontier, p_member);
            left_id := null;
        elsif l.mine and l.idle and l.settled is null then
            left_id := l.id;
            left_low := l.slot_low;
            left_high := l.slot_high;
            left_frontier := l.frontier;
        else
            left_id := null;
        end if;
    end loop;
end $$;
comment on function millrace_engine.assign(integer, text, integer, timestamptz, bigint) is
    'Brings the lanes of an Ordered group nearer to a fair share for the calling member.';

-- millrace_engine.lane_progress(lane, out frontier, out horizon, out floor, out stragglers, out next_check, out claim, out settled, out idle)
-- The newest row of the lane's ledger, and whether none of its claims is open.
create or replace function millrace_engine.lane_progress(p_lane bigint,
    out frontier bigint, out horizon bigint, out floor bigint, out stragglers bigint[], out next_check timestamptz, out claim bigint,
    out settled int8multirange, out idle boolean)
language plpgsql volatile as $$
begin
    select c.frontier, c.horizon, c.floor, c.stragglers, c.next_check, c.claim, nullif(c.settled * int8multirange(int8range(c.frontier, null, '()')), '{}')
        into frontier, horizon, floor, stragglers, next_check, claim, settled
        from millrace_engine.claim c where c.lane_id = p_lane order by c.claim desc limit 1;
    if not found then
        raise exception 'broken invariant: lane % has no claim row', p_lane using errcode = 'MR009';
    end if;
    -- The newest claim is often the only one that may be open, and looking for its settlement is far cheaper than listing the open claims.
    idle := stragglers is null and (floor >= claim or floor = claim - 1 and millrace_engine.is_settled(p_lane, claim))
        or not exists (select from millrace_engine.open_claims(p_lane, floor, stragglers));
end $$;

-- millrace_engine.open_lane(group, slots, position, member, settled beyond it) returns bigint
-- A new lane with its first ledger row: a lane without a row would look like one that has delivered nothing.
create or replace function millrace_engine.open_lane(p_group integer, p_low integer, p_high integer, p_frontier bigint, p_member text,
    p_settled int8multirange default null) returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    insert into millrace_engine.lane (group_id, slot_low, slot_high, member, epoch)
        values (p_group, p_low, p_high, p_member, (p_member is not null)::integer) returning id into result;
    insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring, settled)
        select result, 0, p_frontier, p_frontier, p_frontier, p_frontier, 0, 0, 'infinity', 'infinity', 0, 0, x.ring, p_settled
        from millrace_engine.ledger x where x.id = 1;
    return result;
end $$;

-- millrace_engine.split_lane(lane, frontier, settled, cuts, member, low, high) returns void
-- Replaces an idle lane by its parts between the cuts. Parts within [low, high) belong to member, the others to nobody.
create or replace function millrace_engine.split_lane(p_lane bigint, p_frontier bigint, p_settled int8multirange, p_cuts integer[], p_member text, p_low integer,
    p_high integer)
returns void
language plpgsql volatile as $$
declare
    old millrace_engine.lane;
    cuts integer[];
begin
    delete from millrace_engine.lane x where x.id = p_lane returning * into strict old;
    select array_agg(distinct c order by c) into cuts from unnest(p_cuts) c where c between old.slot_low and old.slot_high;
    for i in 1 .. cardinality(cuts) - 1 loop
        perform millrace_engine.open_lane(old.group_id, cuts[i], cuts[i + 1], p_frontier,
            case when cuts[i] >= p_low and cuts[i + 1] <= p_high then p_member end, p_settled);
    end loop;
end $$;

-- A claim's token is <group>.<lane>.<claim>.<nonce>; lane and claim are 0 when its messages come from the delivery table. Callers treat it
-- as opaque.
--
-- millrace_engine.parse_token(token) returns bigint[4]
-- Raises: MR004 when it is not a token.
create or replace function millrace_engine.parse_token(p_token text) returns bigint[]
language plpgsql immutable as $$
begin
    if p_token is null or p_token !~ '^[0-9]{1,10}\.[0-9]{1,10}\.[0-9]{1,18}\.[1-9][0-9]{0,17}$' then
        raise exception 'not a claim token' using errcode = 'MR004', hint = 'Pass the value of the column "claim" that receive returned.';
    end if;
    return string_to_array(p_token, '.')::bigint[];
end $$;

-- Advisory locks of the engine, in the two-integer key space, with a tag in the upper bits that applications are unlikely to use:
--   claim:   (0x40000000 + lane, claim)  shared by ack, nack and extend; exclusive, by try, for takeover
--   retries: (0x40000000, nonce)         the same for a claim of messages from the delivery table; no lane has number 0
--   settle:  (0x60000000 + lane, claim)  one transaction at a time settles messages of a claim: of two that do it for one token, as when a commit
--                                        whose answer was lost is tried again, the second must see what the first did
--   receive: (0x20000000 + group, 0)     serialises the receives of one group

-- millrace_engine.hold_retries(nonce) returns void
-- Keeps a claim of messages from the delivery table from being taken over until the end of the transaction. It is taken over as a whole
-- (receive_deliveries.sql), so that whoever lost one of its messages cannot commit the effects of the others with an ack.
create or replace function millrace_engine.hold_retries(p_nonce bigint) returns void
language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock_shared(1073741824, (p_nonce & 2147483647)::integer);
end $$;

-- millrace_engine.clock() returns timestamptz
-- The engine's only source of time for leases and due messages. Tests replace it in their own database to make time jump.
create or replace function millrace_engine.clock() returns timestamptz
language sql volatile parallel safe
return clock_timestamp();
comment on function millrace_engine.clock() is 'Time of leases and due messages: the database''s wall clock.';

-- millrace.create_stream(name, partitions, payload_type, segments) returns integer
-- For users without Kubernetes: creates a stream, or changes nothing when it exists like that.
-- Raises: MR004 bad name or value, or a change that can never be done.
create or replace function millrace.create_stream(
    p_name text, p_partitions integer default 8, p_payload_type text default 'JSON', p_segments integer default 4) returns integer
language sql volatile
return millrace_engine.apply_stream(jsonb_build_object('name', p_name, 'partitions', p_partitions, 'payload_type', p_payload_type,
    'segments', p_segments));
comment on function millrace.create_stream(text, integer, text, integer) is
    'Creates a stream: its table millrace.<name>, segments, sequence and functions. Repeating it is harmless.';

-- millrace_engine.drop_stream(name, only_if_empty) returns void
-- Removes the stream with its groups and messages. Nothing happens when it does not exist.
-- Raises: MR005 when it has messages and only_if_empty is set; nothing is removed then.
create or replace function millrace_engine.drop_stream(p_name text, p_only_if_empty boolean default false) returns void
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    f record;
    used boolean;
begin
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.name = p_name for update;
    if not found then
        return;
    end if;
    if p_only_if_empty and to_regclass(format('millrace.%I', s.name)) is not null then
        -- Locked first, so that nothing arrives between the look and the drop.
        execute format('lock table millrace.%I in access exclusive mode', s.name);
        execute format('select exists (select from millrace.%I)', s.name) into used;
        if used then
            raise exception 'stream "%" has messages', s.name using errcode = 'MR005', hint = 'Let them be consumed and removed, or drop it with its messages.';
        end if;
    end if;
    execute format('drop table if exists millrace.%I', s.name);
    execute format('drop sequence if exists millrace_engine.position_%1$s, millrace_engine.state_%1$s, millrace_engine.notified_%1$s', s.id);
    for f in select p.oid::regprocedure as signature from pg_proc p
             where p.pronamespace = 'millrace_engine'::regnamespace
               and p.proname in (select replace(t.proname, '_template', '_' || s.id) from pg_proc t
                                 where t.pronamespace = 'millrace_engine'::regnamespace and t.proname like '%\_template') loop
        execute 'drop function ' || f.signature;
    end loop;
    delete from millrace_engine.stream x where x.id = s.id;
end $$;
comment on function millrace_engine.drop_stream(text, boolean) is 'Removes a stream, its groups and its messages.';

-- millrace.extend(claim, seconds) returns timestamptz
-- Keeps the claim until now plus seconds, and returns that time. For handlers that need longer than the group's ack wait.
-- Raises: MR001 the claim has ended.
create or replace function millrace.extend(p_claim text, p_seconds double precision) returns timestamptz
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    ends timestamptz := millrace_engine.clock() + make_interval(secs => p_seconds);
begin
    if p_seconds is null or p_seconds <= 0 then
        raise exception 'cannot extend a claim by % seconds', p_seconds using errcode = 'MR004', hint = 'Pass a positive number of seconds.';
    end if;
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        update millrace_engine.delivery d set visible_at = ends where d.group_id = t[1] and d.nonce = t[4];
        if not found then
            raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001';
        end if;
        return ends;
    end if;
    c := millrace_engine.hold_claim(t, false);
    insert into millrace_engine.settlement (lane_id, claim, at, expires_at, ring, kind)
        select c.lane_id, c.claim, millrace_engine.clock(), ends, l.ring, 'E' from millrace_engine.ledger l where l.id = 1;
    update millrace_engine.member m set expires_at = ends
        where m.group_id = t[1] and m.name = c.member and m.expires_at < ends;
    return ends;
end $$;
comment on function millrace.extend(text, double precision) is 'Prolongs a claim to the given number of seconds from now.';

-- millrace_engine.hold_claim(token parts, to settle) returns millrace_engine.claim
-- Takes the shared lock on a range claim until the end of the transaction and returns the claim if it is still open and the token's own.
-- Ack against expiry would be a write skew in which both commit; the lock, and reading again after it in a new statement, prevent it.
-- To settle it waits for other transactions that do so for this claim. What was settled since the claim was made is added to its settled.
-- Raises: MR001 when the claim has ended; MR003 isolation level.
create or replace function millrace_engine.hold_claim(p_token bigint[], p_to_settle boolean default true) returns millrace_engine.claim
language plpgsql volatile as $$
declare
    c millrace_engine.claim;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform millrace_engine.refuse_isolation();
    end if;
    if p_to_settle then
        perform pg_advisory_xact_lock((1610612736 + p_token[2])::integer, (p_token[3] & 2147483647)::integer);
    end if;
    perform pg_advisory_xact_lock_shared((1073741824 + p_token[2])::integer, (p_token[3] & 2147483647)::integer);
    select d.* into c from millrace_engine.claim d
        where d.lane_id = p_token[2] and d.claim = p_token[3] and d.nonce = p_token[4]
          and exists (select from millrace_engine.lane l where l.id = d.lane_id)   -- gone with its group
          and not exists (select from millrace_engine.settlement s
              where s.lane_id = d.lane_id and s.claim = d.claim and s.kind in ('A', 'T', 'R'))
        order by d.copy desc limit 1;
    if not found then
        raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
            hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
    end if;
    select coalesce(c.settled, '{}') + coalesce(range_agg(s.settled), '{}') into c.settled from millrace_engine.settlement s
        where s.lane_id = c.lane_id and s.claim = c.claim and s.kind = 'P';
    return c;
end $$;
comment on function millrace_engine.hold_claim(bigint[], boolean) is 'Locks a claim against takeover until the end of the transaction.';

-- millrace_engine.refuse_isolation() returns void
-- Whoever settles a claim must see a takeover that committed a moment ago. The snapshot of REPEATABLE READ or SERIALIZABLE may be older, and
-- then both would take effect.
-- Raises: MR003, always.
create or replace function millrace_engine.refuse_isolation() returns void
language plpgsql stable as $$
begin
    raise exception 'a claim can be settled only at isolation level read committed, not %', current_setting('transaction_isolation')
        using errcode = 'MR003', hint = 'An older snapshot would not see that another member has taken the claim over. Use a READ COMMITTED transaction.';
end $$;

-- millrace_engine.horizon(stream id) returns bigint
-- The highest position that is safe to read: every position up to it is committed or will never exist.
--
-- H, the last allocated position, is read first; then the lowest L among the publishers that are still open. An open publisher whose
-- position is at most H already held its lock when H was read, because it locks before it allocates; and locks are released only
-- after the commit is visible. Hence horizon = least(H, min L). The order of the two reads matters, and the caller must read the log
-- in a later statement, in READ COMMITTED.
--
-- The lock's key is 24 bits of stream and the low 40 bits of L, decoded relative to H (L may also be a little above H).
-- Only locks of this database, granted, in share mode count.
create or replace function millrace_engine.horizon(p_stream integer) returns bigint
language plpgsql volatile as $$
declare
    h bigint;
    l bigint;
begin
    if pg_is_in_recovery() then
        raise exception 'the horizon cannot be read on a standby: the publishers'' locks are only on the primary'
            using errcode = 'MR003', hint = 'Connect to the primary.';
    end if;
    h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || p_stream)::regclass), 0);
    select min(h - (((h - (((k.classid::bigint & 255) << 32) | k.objid::bigint) + 549755813888) & 1099511627775) - 549755813888))
        into l
        from pg_locks k
        where k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
          and k.classid::bigint >> 8 = p_stream
          and k.database = (select d.oid from pg_database d where d.datname = current_database());
    return least(h, l);
end $$;
comment on function millrace_engine.horizon(integer) is
    'Highest position of a stream that is safe to read: everything up to it is committed or will never exist.';

-- millrace_engine.horizon_holder(stream id) returns integer
-- The backend whose open transaction holds the horizon back furthest, or null. For status and for people on call.
create or replace function millrace_engine.horizon_holder(p_stream integer) returns integer
language sql volatile
begin atomic
    select k.pid
    from pg_locks k
    where k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
      and k.classid::bigint >> 8 = p_stream
      and k.database = (select d.oid from pg_database d where d.datname = current_database())
    order by ((k.classid::bigint & 255) << 32) | k.objid::bigint, k.pid
    limit 1;
end;
comment on function millrace_engine.horizon_holder(integer) is
    'Process id of the open transaction that published to the stream longest ago, null when there is none.';

-- millrace_engine.install_functions(stream id) returns void
-- Makes the stream's own copy of each function whose name ends in _template. A static table name lets PostgreSQL keep their plans;
-- with EXECUTE every call would plan again, which costs more than the read itself.
create or replace function millrace_engine.install_functions(p_stream integer) returns void
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    f record;
    source text;
    runtime text;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream;
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    for f in select p.oid, p.proname from pg_proc p
             where p.pronamespace = 'millrace_engine'::regnamespace and p.proname like '%\_template' loop
        source := pg_get_functiondef(f.oid);
        source := replace(source, 'millrace.stream_template', format('millrace.%I', s.name));
        source := replace(source, '/* stream id */ 0', p_stream::text);
        source := replace(source, '_template', '_' || p_stream);
        if s.payload_type = 'Bytes' then
            source := replace(source, '/* json, bytes */ m.payload, null::bytea', 'null::jsonb, m.payload');
        end if;
        execute source;
        if runtime is not null then
            execute format('grant execute on function millrace_engine.%I to %I', replace(f.proname, '_template', '_' || p_stream), runtime);
        end if;
    end loop;
end $$;
comment on function millrace_engine.install_functions(integer) is 'Creates or replaces the functions that belong to one stream.';

-- millrace.leave(stream, group, member) returns void
-- Ends a membership: open claims of the member go back at once without counting an attempt, and in an Ordered group its partitions are
-- free for others. Harmless when there is no such member.
create or replace function millrace.leave(p_stream text, p_group text, p_member text) returns void
language plpgsql volatile as $$
declare
    g millrace_engine.consumer_group;
    l record;
    o millrace_engine.claim;
begin
    select x.* into g from millrace_engine.consumer_group x
        where x.stream_id = millrace_engine.stream_id(p_stream) and x.name = p_group;
    if not found then
        return;
    end if;
    perform pg_advisory_xact_lock(536870912 + g.id, 0);
    for l in select x.id, f.floor, f.stragglers from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and not f.idle loop
        for o in select * from millrace_engine.open_claims(l.id, l.floor, l.stragglers) x where x.member = p_member and x.nonce <> 0 loop  -- 0: given back already
            if pg_try_advisory_xact_lock((1073741824 + l.id)::integer, (o.claim & 2147483647)::integer) then
                begin
                    perform millrace.release(g.id || '.' || l.id || '.' || o.claim || '.' || o.nonce);
                exception when sqlstate 'MR001' then
                    null;  -- settled or given back meanwhile
                end;
            end if;
        end loop;
    end loop;
    update millrace_engine.lane x set member = null where x.group_id = g.id and x.member = p_member;
    delete from millrace_engine.member m where m.group_id = g.id and m.name = p_member;
    update millrace_engine.delivery d set nonce = null, member = null, attempt = d.attempt - 1, visible_at = millrace_engine.clock()
        where d.group_id = g.id and d.member = p_member and d.nonce is not null;
    perform pg_notify('millrace', g.stream_id::text);
end $$;
comment on function millrace.leave(text, text, text) is 'Ends a membership and gives everything it holds back at once.';

-- millrace_engine.maintain_stream(stream id) returns text[]
-- One round of rotation and retention for a stream; returns what it did. Publishing and consuming never wait for it and never need it.
-- Raises: 55P03 when readers keep a segment busy; call it again later.
create or replace function millrace_engine.maintain_stream(p_stream integer) returns text[]
language plpgsql volatile
set lock_timeout = '50ms' as $$
declare
    s millrace_engine.stream;
    current_ smallint;
    did text[] := '{}';
    seg record;
    bytes bigint := 0;
    keep_from bigint;
    next_ smallint;
    used boolean;
    top record;
    newest bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    -- Also taken by whoever creates or resets a group, so that a group cannot begin at what is removed meanwhile.
    select * into s from millrace_engine.stream x where x.id = p_stream for update;
    if not found then
        return did;
    end if;
    current_ := millrace_engine.segment(p_stream);

    -- Rotation. A segment covers a share of what the limits keep, so that removing one is a small step.
    next_ := (current_ + 1) % s.segments;
    execute format('select exists (select from millrace_engine.segment_%s_%s)', p_stream, next_) into used;
    bytes := pg_relation_size(format('millrace_engine.segment_%s_%s', p_stream, current_)::regclass);
    if not used and bytes > 0 and (bytes > coalesce(nullif(s.max_bytes, 0) / s.segments, 1073741824)
            or (s.max_age_seconds > 0 and clock_timestamp() > s.segment_started_at + make_interval(secs => s.max_age_seconds / (s.segments - 1.0)))
            or (s.max_messages > 0 and millrace_engine.segment_span(p_stream, current_) > s.max_messages / s.segments)
            or (s.retention_policy <> 'Limits' and bytes > 67108864)) then
        perform millrace_engine.set_state(p_stream, next_, null);
        update millrace_engine.stream x set segment_started_at = clock_timestamp() where x.id = p_stream;
        current_ := next_;
        did := did || format('rotated to segment %s', next_ + 1);
    end if;

    -- What every group has settled. Groups hold messages back under Interest and WorkQueue only.
    if s.retention_policy <> 'Limits' then
        select min(t.ack_floor) into keep_from from millrace.stats(s.name) t;
        if keep_from is null and s.retention_policy = 'WorkQueue' then
            keep_from := 0;   -- nobody has worked on the queue yet
        end if;
    end if;
    newest := coalesce(pg_sequence_last_value(('millrace_engine.position_' || p_stream)::regclass), 0);

    for k in 1 .. s.segments - 1 loop
        seg := null;
        next_ := (current_ + k) % s.segments;
        execute format('select exists (select from millrace_engine.segment_%s_%s)', p_stream, next_) into used;
        continue when not used;
        select coalesce(sum(pg_total_relation_size(format('millrace_engine.segment_%s_%s', p_stream, i)::regclass)), 0) into bytes
            from generate_series(0, s.segments - 1) i;
        execute format('select "position", created_at from millrace_engine.segment_%s_%s order by "position" desc limit 1', p_stream, next_) into top;
        if not millrace_engine.removable(s, top."position", top.created_at, keep_from, newest, bytes) then
            exit;   -- segments after it are younger
        end if;
        execute format('lock table millrace_engine.segment_%s_%s in access exclusive mode', p_stream, next_);
        execute format('select max("position") as "position", max(created_at) as created_at from millrace_engine.segment_%s_%s', p_stream, next_) into top;
        if millrace_engine.removable(s, top."position", top.created_at, keep_from, newest, bytes) then
            execute format('truncate millrace_engine.segment_%s_%s', p_stream, next_);
            update millrace_engine.stream x set first_position = greatest(x.first_position, top."position" + 1) where x.id = p_stream;
            did := did || format('truncated segment %s up to position %s', next_ + 1, top."position");
        end if;
        exit;   -- one segment per round: locks stay short
    end loop;
    return did;
end $$;
comment on function millrace_engine.maintain_stream(integer) is 'One round of segment rotation and retention.';

-- millrace_engine.removable(stream, highest position, newest created_at, settled up to, last position, bytes) returns boolean
-- The retention policy's verdict on a segment.
create or replace function millrace_engine.removable(s millrace_engine.stream, p_position bigint, p_created timestamptz, p_settled bigint,
    p_newest bigint, p_bytes bigint) returns boolean
language sql stable
return case
    when p_position is null then false
    when s.retention_policy <> 'Limits' and (p_settled is null or p_position <= p_settled) then true
    else (s.max_age_seconds > 0 and p_created < clock_timestamp() - make_interval(secs => s.max_age_seconds))
      or (s.max_bytes > 0 and p_bytes > s.max_bytes)
      or (s.max_messages > 0 and p_newest - p_position >= s.max_messages)
end;

-- millrace_engine.segment_span(stream id, segment) returns bigint
-- How many positions the segment spans: an upper bound of its messages that costs two index probes.
create or replace function millrace_engine.segment_span(p_stream integer, p_segment integer) returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    execute format('select coalesce((select "position" from millrace_engine.segment_%1$s_%2$s order by "position" desc limit 1)
        - (select "position" from millrace_engine.segment_%1$s_%2$s order by "position" limit 1) + 1, 0)', p_stream, p_segment) into result;
    return result;
end $$;

-- millrace.nack(claim, positions, delay_seconds, reason) returns void
-- Gives messages back to be delivered again after the delay; null means the group's backoff for this attempt. The reason is kept.
-- Shared:  each message goes to the delivery table, or to the dead letters when it has had all its attempts. The rest of the claim
--          stays held.
-- Ordered: the claim ends. Everything in it that is not settled is delivered again, in order, after the delay: settle what is done
--          before. With failure policy Skip, messages that have had all their attempts become dead letters and are passed over.
-- Raises: MR001 the claim has ended; MR004 a position that the claim does not hold.
create or replace function millrace.nack(p_claim text, p_positions bigint[], p_delay_seconds double precision default null, p_reason text default null)
returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    g millrace_engine.consumer_group;
    c millrace_engine.claim;
    n integer;
begin
    select * into g from millrace_engine.consumer_group x where x.id = t[1];
    if not found then
        raise exception 'the claim has ended: its group was dropped' using errcode = 'MR001';
    end if;
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        with held as (
            select d.* from millrace_engine.delivery d
            where d.group_id = g.id and d.nonce = t[4] and d."position" = any (p_positions) for update
        ), dead as (
            insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
            select h.group_id, h."position", h.key, h.headers, h.payload, h.payload_bytes, h.created_at, h.attempt,
                   coalesce(p_reason, 'nacked'), millrace_engine.add_error(h.errors, h.attempt, p_reason), millrace_engine.clock()
            from held h where g.max_attempts > 0 and h.attempt >= g.max_attempts
            on conflict on constraint dead_letter_position_unique do nothing
        ), gone as (
            delete from millrace_engine.delivery d using held h
            where d.id = h.id and g.max_attempts > 0 and h.attempt >= g.max_attempts
        ), back as (
            update millrace_engine.delivery d set nonce = null, member = null, suspect = false,
                visible_at = millrace_engine.clock() + millrace_engine.delay(g, h.attempt, p_delay_seconds),
                errors = millrace_engine.add_error(h.errors, h.attempt, p_reason)
            from held h where d.id = h.id and not (g.max_attempts > 0 and h.attempt >= g.max_attempts)
        )
        select count(*) into n from held;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    if g.mode = 'Shared' then
        perform millrace_engine.set_aside(c, p_positions, g.max_attempts > 0 and c.attempt >= g.max_attempts,
            c.attempt, millrace_engine.delay(g, c.attempt, p_delay_seconds), coalesce(p_reason, 'nacked'), false);
        perform millrace_engine.settle_messages(c, p_positions);
    elsif g.failure_policy = 'Skip' and g.max_attempts > 0 and c.attempt >= g.max_attempts then
        perform millrace_engine.set_aside(c, p_positions, true, c.attempt, null, coalesce(p_reason, 'nacked'), false);
        perform millrace_engine.settle_messages(c, p_positions);
        perform millrace_engine.give_back(c, g.stream_id, interval '0', 1);
    else
        perform millrace_engine.give_back(c, g.stream_id, millrace_engine.delay(g, c.attempt, p_delay_seconds), c.attempt + 1);
    end if;
end $$;
comment on function millrace.nack(text, bigint[], double precision, text) is
    'Gives messages of a claim back, to be delivered again after a delay.';

-- millrace.dead_letter(claim, positions, reason) returns void
-- Moves messages of the claim to the dead letters at once, whatever their attempt; the rest of the claim stays held.
-- Raises: MR001 the claim has ended; MR004 a position that the claim does not hold.
create or replace function millrace.dead_letter(p_claim text, p_positions bigint[], p_reason text) returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    n integer;
begin
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        with gone as (
            delete from millrace_engine.delivery d
            where d.group_id = t[1] and d.nonce = t[4] and d."position" = any (p_positions) returning d.*
        ), dead as (
            insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
            select h.group_id, h."position", h.key, h.headers, h.payload, h.payload_bytes, h.created_at, h.attempt,
                   coalesce(p_reason, ''), millrace_engine.add_error(h.errors, h.attempt, p_reason), millrace_engine.clock()
            from gone h on conflict on constraint dead_letter_position_unique do nothing
        )
        select count(*) into n from gone;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    perform millrace_engine.set_aside(c, p_positions, true, c.attempt, null, coalesce(p_reason, ''), false);
    perform millrace_engine.settle_messages(c, p_positions);
end $$;
comment on function millrace.dead_letter(text, bigint[], text) is 'Moves messages of a claim to the dead letters.';

-- millrace.release(claim) returns void
-- Gives the whole claim back at once and does not count the attempt. For a consumer that stops.
-- Raises: MR001 the claim has ended.
create or replace function millrace.release(p_claim text) returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    stream integer;
begin
    select g.stream_id into stream from millrace_engine.consumer_group g where g.id = t[1];
    if not found then
        raise exception 'the claim has ended: its group was dropped' using errcode = 'MR001';
    end if;
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        update millrace_engine.delivery d set nonce = null, member = null, attempt = d.attempt - 1, visible_at = millrace_engine.clock()
            where d.group_id = t[1] and d.nonce = t[4];
        if not found then
            raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001';
        end if;
        perform pg_notify('millrace', stream::text);
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    perform millrace_engine.give_back(c, stream, interval '0', c.attempt);
end $$;
comment on function millrace.release(text) is 'Gives a claim back at once, without counting an attempt.';

-- millrace_engine.open_claims(lane, floor, stragglers) returns setof millrace_engine.claim
-- The claims above floor, and the stragglers below it, that nothing has settled, as they stand now: expires_at after every extension, settled with everything settled
-- since, messages as the number of those left, attempt as the number that the next delivery would have less one. A claim that was carried over to a newer ring appears once.
-- Cost: claims between the floor and now: about a hundred, however long a slow member takes.
create or replace function millrace_engine.open_claims(p_lane bigint, p_floor bigint, p_stragglers bigint[]) returns setof millrace_engine.claim
language plpgsql volatile as $$
begin
    -- Not in language sql, which would plan again at every call.
    return query select c.lane_id, c.claim, c.low, c.high, c.frontier, c.horizon, c.floor,
           case when last_end.kind = 'R' then 0 else c.nonce end,   -- given back: the old token must not fit a copy
           coalesce(last_end.expires_at, c.expires_at), c.next_check,
           c.messages - (select coalesce(sum(upper(r) - lower(r)), 0)::integer from unnest(progress.settled - coalesce(c.settled, '{}')) r),
           coalesce(last_end.next_attempt - 1, c.attempt), c.ring, c.copy, c.member, c.stragglers, c.careful_to,
           coalesce(c.settled, '{}'::int8multirange) + coalesce(progress.settled, '{}'::int8multirange)
    from (select distinct on (d.claim) d.* from (
              select x.* from millrace_engine.claim x where x.lane_id = p_lane and x.claim > p_floor
              union all
              select x.* from millrace_engine.claim x where x.lane_id = p_lane and x.claim = any (p_stragglers) and x.claim <= p_floor) d
          order by d.claim, d.copy desc) c
    left join lateral (select e.expires_at, e.next_attempt, e.kind from millrace_engine.settlement e
          where e.lane_id = c.lane_id and e.claim = c.claim and e.kind in ('E', 'R')
          order by e.kind desc, e.at desc limit 1) last_end on true
    left join lateral (select range_agg(p.settled) as settled from millrace_engine.settlement p
          where p.lane_id = c.lane_id and p.claim = c.claim and p.kind = 'P') progress on true
    where not exists (select from millrace_engine.settlement s
          where s.lane_id = c.lane_id and s.claim = c.claim and s.kind in ('A', 'T'))
    order by c.claim;
end $$;
comment on function millrace_engine.open_claims(bigint, bigint, bigint[]) is 'Claims of a lane that are neither acked nor taken over, with their present end.';

-- millrace_engine.is_settled(lane, claim) returns boolean
-- Whether the claim was acked or taken over.
create or replace function millrace_engine.is_settled(p_lane bigint, p_claim bigint) returns boolean
language plpgsql volatile as $$
begin
    return exists (select from millrace_engine.settlement s where s.lane_id = p_lane and s.claim = p_claim and s.kind in ('A', 'T'));
end $$;

-- millrace_engine.open_claim(lane, claim) returns setof millrace_engine.claim
-- One claim, if it is open.
create or replace function millrace_engine.open_claim(p_lane bigint, p_claim bigint) returns setof millrace_engine.claim
language sql volatile
begin atomic
    select * from millrace_engine.open_claims(p_lane, 9223372036854775807, array[p_claim]);
end;

-- millrace.publish(stream, payload, key, headers) returns bigint
-- Appends one message inside the caller's transaction and returns its position. If the transaction rolls back, it never happened.
-- Order:  messages of one key are delivered in position order to Ordered groups.
-- Raises: MR002 no such stream; MR004 payload null or too large, or headers not an object.
-- Plain INSERT and COPY into millrace.<stream> do the same without the checks of size.
create or replace function millrace.publish(p_stream text, p_payload jsonb, p_key text default null, p_headers jsonb default null)
returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    perform millrace_engine.check_message(p_stream, 'JSON', pg_column_size(p_payload), p_headers);
    execute format('insert into millrace.%I (key, headers, payload) values ($1, $2, $3) returning "position"', p_stream)
        into result using p_key, p_headers, p_payload;
    return result;
end $$;
comment on function millrace.publish(text, jsonb, text, jsonb) is
    'Appends one JSON message to a stream in the caller''s transaction and returns its position.';

-- millrace.publish_bytes(stream, payload, key, headers) returns bigint
-- The same for streams with payload type Bytes.
create or replace function millrace.publish_bytes(p_stream text, p_payload bytea, p_key text default null, p_headers jsonb default null)
returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    perform millrace_engine.check_message(p_stream, 'Bytes', pg_column_size(p_payload), p_headers);
    execute format('insert into millrace.%I (key, headers, payload) values ($1, $2, $3) returning "position"', p_stream)
        into result using p_key, p_headers, p_payload;
    return result;
end $$;
comment on function millrace.publish_bytes(text, bytea, text, jsonb) is
    'Appends one message of bytes to a stream in the caller''s transaction and returns its position.';

-- millrace.publish_batch(stream, payloads, keys, headers) returns setof bigint
-- Appends many JSON messages in the order of the array and returns their positions in that order. keys and headers are null, or arrays
-- of the same length with null where a message has none. At most 100,000 messages in one call.
-- Raises: as publish; nothing is appended when one message is refused.
create or replace function millrace.publish_batch(p_stream text, p_payloads jsonb[], p_keys text[] default null, p_headers jsonb[] default null)
returns setof bigint
language plpgsql volatile as $$
declare
    largest integer;
    bad jsonb;
begin
    if cardinality(p_payloads) = 0 then
        return;
    end if;
    perform millrace_engine.check_batch(cardinality(p_payloads), cardinality(p_keys), cardinality(p_headers));
    select max(pg_column_size(x)) into largest from unnest(p_payloads) x;
    select x into bad from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1;
    perform millrace_engine.check_message(p_stream, 'JSON', case when array_position(p_payloads, null) is null then largest end, bad);
    return query execute format(
        'insert into millrace.%I (key, headers, payload) select x.key, x.headers, x.payload
         from unnest($1, $2, $3) with ordinality x(payload, key, headers, n) order by x.n returning "position"', p_stream)
        using p_payloads, p_keys, p_headers;
end $$;
comment on function millrace.publish_batch(text, jsonb[], text[], jsonb[]) is
    'Appends many JSON messages in order and returns their positions.';

-- millrace_engine.check_message(stream, payload type, size in bytes or null, headers) returns void
create or replace function millrace_engine.check_message(p_stream text, p_type text, p_size integer, p_headers jsonb) returns void
language plpgsql stable as $$
declare
    s record;
begin
    select x.payload_type, x.max_message_bytes into s from millrace_engine.stream x where x.name = p_stream;
    if not found then
        raise exception 'stream "%" does not exist', p_stream using errcode = 'MR002',
            hint = 'Create it with a Stream resource or with millrace.create_stream.';
    end if;
    if s.payload_type <> p_type then
        raise exception 'stream "%" has payloads of type %', p_stream, s.payload_type using errcode = 'MR004',
            hint = case s.payload_type when 'JSON' then 'Use millrace.publish.' else 'Use millrace.publish_bytes.' end;
    end if;
    if p_size is null then
        raise exception 'a payload is null' using errcode = 'MR004', hint = 'Publish the JSON value null as ''null''::jsonb.';
    end if;
    if p_size > s.max_message_bytes then
        raise exception 'a message of % bytes is larger than the % allowed in stream "%"', p_size, s.max_message_bytes, p_stream
            using errcode = 'MR004', hint = 'Store large payloads elsewhere and publish a reference, or raise maxMessageBytes.';
    end if;
    if jsonb_typeof(p_headers) <> 'object' then
        raise exception 'headers must be a JSON object, not %', jsonb_typeof(p_headers) using errcode = 'MR004';
    end if;
end $$;

-- millrace_engine.check_batch(number of payloads, keys, headers) returns void
create or replace function millrace_engine.check_batch(p_payloads integer, p_keys integer, p_headers integer) returns void
language plpgsql immutable as $$
begin
    if p_payloads > 100000 then
        raise exception '% messages in one batch; at most 100000 are possible', p_payloads using errcode = 'MR004',
            hint = 'Split the batch: several calls in one transaction are as atomic as one.';
    end if;
    if p_keys <> p_payloads or p_headers <> p_payloads then
        raise exception 'keys and headers must be null or as long as payloads' using errcode = 'MR004';
    end if;
end $$;

-- millrace.publish_batch_bytes(stream, payloads, keys, headers) returns setof bigint
-- publish_batch for streams with payload type Bytes.
create or replace function millrace.publish_batch_bytes(p_stream text, p_payloads bytea[], p_keys text[] default null, p_headers jsonb[] default null)
returns setof bigint
language plpgsql volatile as $$
declare
    largest integer;
    bad jsonb;
begin
    if cardinality(p_payloads) = 0 then
        return;
    end if;
    perform millrace_engine.check_batch(cardinality(p_payloads), cardinality(p_keys), cardinality(p_headers));
    select max(octet_length(x)) into largest from unnest(p_payloads) x;
    select x into bad from unnest(p_headers) x where jsonb_typeof(x) <> 'object' limit 1;
    perform millrace_engine.check_message(p_stream, 'Bytes', case when array_position(p_payloads, null) is null then largest end, bad);
    return query execute format(
        'insert into millrace.%I (key, headers, payload) select x.key, x.headers, x.payload
         from unnest($1, $2, $3) with ordinality x(payload, key, headers, n) order by x.n returning "position"', p_stream)
        using p_payloads, p_keys, p_headers;
end $$;
comment on function millrace.publish_batch_bytes(text, bytea[], text[], jsonb[]) is
    'Appends many messages of bytes to a stream in order and returns their positions.';

-- millrace_engine.publish_guard_template() returns trigger
-- Copied once per stream (install_functions.sql). Fires once per statement before any row of an INSERT or COPY into a stream, so that it always runs
-- before the position is allocated. On the transaction's first statement for this stream it
--   1. takes the shared advisory lock that carries L, the position allocated last, until the end of the transaction: readers stay
--      below L while the lock is held (horizon.sql);
--   2. tells the column default which segment to write to;
--   3. notifies, if somebody waits and nobody has notified in the last two milliseconds.
-- That it has run is remembered in a transaction-local setting: a letter for the segment, which the column default reads, and the transaction's id. Without
-- the id, a setting leaked by a pooler into a later transaction would silence the lock, and messages would be lost.
-- PostgreSQL holds one lock for all notifying transactions of the server while they flush their commit. Without a limit, one waiting consumer would cost
-- all publishers their group commit: 1,200 instead of 3,500 transactions a second. Who is not announced is found by the consumer that was woken,
-- which looks again after one millisecond, two, four (wake.go).
-- PostgreSQL cannot PREPARE a transaction that has notified: whoever uses two-phase commit sets millrace.notify to off, and waiting consumers poll.
-- Enabled ALWAYS, on the stream and on every segment. It is on every publisher's path, so it runs no query: conditions and assignments of single
-- functions are far cheaper in PL/pgSQL.
create or replace function millrace_engine.publish_guard_template() returns trigger
language plpgsql volatile as $$
declare
    xid text := pg_current_xact_id()::text;
    state bigint;
    now_ms bigint;
begin
    if substr(current_setting('millrace.guard_template', true), 2) = xid then
        return null;
    end if;
    if pg_advisory_xact_lock_shared((/* stream id */ 0::bigint << 40)
            | (coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0) & 1099511627775)) is null then
        return null;   -- cannot be: a void is not null
    end if;
    state := pg_sequence_last_value('millrace_engine.state_template');
    if to_timestamp(state >> 4) > clock_timestamp() and current_setting('millrace.notify', true) is distinct from 'off' then
        now_ms := extract(epoch from clock_timestamp()) * 1000;
        if now_ms not between pg_sequence_last_value('millrace_engine.notified_template') and pg_sequence_last_value('millrace_engine.notified_template') + 1 then
            now_ms := setval('millrace_engine.notified_template', now_ms);
            perform pg_notify('millrace', '/* stream id */ 0');
        end if;
    end if;
    xid := set_config('millrace.guard_template', chr(97 + (state & 15)::integer) || xid, true);
    return null;
end $$;
comment on function millrace_engine.publish_guard_template() is
    'Statement trigger of every stream: locks the publisher''s position for readers, chooses the segment, wakes waiting consumers.';

-- millrace_engine.raise_floor(newest claim row, out floor, out stragglers)
-- Moves the floor up as far as claims are settled. Open claims more than 64 behind become stragglers, up to 64 of them, and the floor passes
-- them: otherwise one member that holds a claim for minutes would make every look at the open claims read all that was settled since.
create or replace function millrace_engine.raise_floor(p_last millrace_engine.claim, out floor bigint, out stragglers bigint[])
language plpgsql volatile as $$
begin
    select array_agg(x.claim order by x.claim) filter (where x.n <= 64 and x.claim <= p_last.claim - 64),
           min(x.claim) filter (where not (x.n <= 64 and x.claim <= p_last.claim - 64)) - 1
        into stragglers, floor
        from (select o.claim, row_number() over (order by o.claim) as n
              from millrace_engine.open_claims(p_last.lane_id, p_last.floor, p_last.stragglers) o) x;
    floor := coalesce(floor, p_last.claim);
end $$;

-- millrace.receive(stream, group, member, max, lease_seconds, ack) returns the messages of one claim
-- Gives the member up to max messages that nobody else in the group holds, for lease_seconds (null: the group's ack wait). Returns no row
-- when there is nothing now. Every row carries the same claim; settle it with ack, ack_messages, nack, dead_letter or release before
-- expires_at, or extend it. ack, when not null, settles the previous claim first, in the same round trip.
-- payload is set in JSON streams, payload_bytes in Bytes streams. attempt is 1 on the first delivery.
-- Raises: as receive_template.
create or replace function millrace.receive(p_stream text, p_group text, p_member text, p_max integer default 100,
    p_lease_seconds double precision default null, p_ack text default null)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile as $$
declare
    stream integer := millrace_engine.stream_id(p_stream);
begin
    return query execute format('select * from millrace_engine.receive_%s($1, $2, $3, $4, $5)', stream)
        using p_group, p_member, p_max, (p_lease_seconds * 1000)::bigint, p_ack;
end $$;
comment on function millrace.receive(text, text, text, integer, double precision, text) is
    'Claims messages for a member of a consumer group, after settling its previous claim.';

-- millrace_engine.stream_id(name) returns integer
-- Raises: MR002 no such stream.
create or replace function millrace_engine.stream_id(p_stream text) returns integer
language plpgsql stable as $$
declare
    result integer;
begin
    select s.id into result from millrace_engine.stream s where s.name = p_stream;
    if not found then
        raise exception 'stream "%" does not exist', p_stream using errcode = 'MR002',
            hint = 'Create it with a Stream resource or with millrace.create_stream.';
    end if;
    return result;
end $$;

-- millrace_engine.receive_deliveries(group, member, max, now, end of the lease, nonce) returns messages
-- Hands out due messages of the delivery table, oldest due first; a suspect alone. A message that was handed out for the last time and
-- whose lease ended is a dead letter.
create or replace function millrace_engine.receive_deliveries(p_group integer, p_member text, p_max integer, p_now timestamptz, p_ends timestamptz,
    p_nonce bigint)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    expired bigint;
begin
    -- An expired claim is taken over as a whole, or not at all while somebody settles it.
    for expired in select distinct x.nonce from millrace_engine.delivery x where x.group_id = p_group and x.visible_at <= p_now and x.nonce is not null loop
        if pg_try_advisory_xact_lock(1073741824, (expired & 2147483647)::integer) then
            update millrace_engine.delivery d set nonce = null, member = null where d.group_id = p_group and d.nonce = expired and d.visible_at <= p_now;
        end if;
    end loop;
    with worn as (
        delete from millrace_engine.delivery d using millrace_engine.consumer_group g
        where g.id = p_group and g.max_attempts > 0
          and d.id in (select x.id from millrace_engine.delivery x
                       where x.group_id = p_group and x.visible_at <= p_now and x.nonce is null and x.attempt >= g.max_attempts for update skip locked)
        returning d.*
    )
    insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
        select w.group_id, w."position", w.key, w.headers, w.payload, w.payload_bytes, w.created_at, w.attempt,
               'not settled within the ack wait', w.errors, p_now
        from worn w on conflict on constraint dead_letter_position_unique do nothing;
    return query
        with due as (
            select x.id, x.suspect, row_number() over (order by x.visible_at, x."position") as n
            from (select y.id, y.suspect, y.visible_at, y."position" from millrace_engine.delivery y
                  where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null
                  order by y.visible_at, y."position" limit p_max for update skip locked) x
        ), chosen as (
            select d.id from due d where d.n = 1 or (not d.suspect and not (select f.suspect from due f where f.n = 1))
        )
        update millrace_engine.delivery d
            set attempt = d.attempt + 1, nonce = p_nonce, member = p_member, visible_at = p_ends
            from chosen where d.id = chosen.id
            returning p_group || '.0.0.' || p_nonce, d."position", d.key, d.headers, d.payload, d.payload_bytes, d.created_at, d.attempt, p_ends;
end $$;
comment on function millrace_engine.receive_deliveries(integer, text, integer, timestamptz, timestamptz, bigint) is
    'Hands out messages that are due again after a nack or an expiry.';

-- millrace_engine.receive_template(group, member, max, lease in ms, ack) returns the messages of one claim
-- Copied once per stream with the names filled in (install_functions.sql); millrace.receive and the Go client call the copy.
--
-- In this order, under the group's receive lock: settles the claim `ack`, so that finishing one claim and getting the next is one round trip;
-- hands out due messages of the delivery table (Shared); takes over one expired claim; or claims the next range up to the horizon.
-- Consuming writes one claim row and one settlement row per claim, and nothing per message.
--
-- Order:   by position; Ordered groups get a key's messages strictly in order, and nothing of a lane while a claim of it is open.
-- Repeat:  a second call returns other messages; a lost reply costs one lease, not a message.
-- Locks:   the group's receive lock until the end of the transaction, so the call stands in a transaction of its own.
-- Raises:  MR001 the claim to ack has ended; MR002 no such group; MR003 isolation level; MR004 bad argument; MR006 the transaction has
--          already written.
-- The plan settings keep the one good plan, an ordered index scan, whatever the statistics said when a segment was empty.
create or replace function millrace_engine.receive_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    now_    timestamptz;
    ends    timestamptz;
    g       record;
    lanes   bigint[];
    lane    millrace_engine.lane;
    lane_id bigint;
    last    millrace_engine.claim;
    o       millrace_engine.claim;
    again   millrace_engine.claim;
    taken   millrace_engine.claim;
    aside   boolean;
    blocked boolean;
    fresh   boolean;
    next_   timestamptz;
    low_    bigint;
    high_   bigint;
    edge    bigint;
    safe    bigint;
    most    integer;
    n       integer;
    try     integer;
    skip    int8multirange;
    nonce_  bigint;
    token   text;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'receive needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot would miss messages for ever. Call receive in a READ COMMITTED transaction of its own.';
    end if;
    if pg_current_xact_id_if_assigned() is not null then
        raise exception 'receive must stand in a transaction of its own' using errcode = 'MR006',
            hint = 'It serialises the group until the commit. Commit first; ack inside the transaction that does the work.';
    end if;
    if p_max is null or p_max not between 1 and 10000 then
        raise exception 'cannot receive % messages', p_max using errcode = 'MR004', hint = 'Ask for 1 to 10000.';
    end if;
    if p_ack is not null then
        perform millrace.ack(p_ack);
    end if;

    now_ := millrace_engine.clock();
    select x.id, x.mode, x.ack_wait_ms, x.max_attempts, x.failure_policy, x.paused, s.partitions, s.first_position, l.id as lane_id, l.recheck_at,
            x.mode = 'Shared' and exists (select from millrace_engine.delivery d where d.group_id = x.id and d.visible_at <= now_) as due
        into g
        from millrace_engine.consumer_group x
        join millrace_engine.stream s on s.id = c_stream
        left join millrace_engine.lane l on l.group_id = x.id and x.mode = 'Shared'
        where x.stream_id = c_stream and x.name = p_group;
    if not found then
        raise exception 'consumer group "%" does not exist', p_group using errcode = 'MR002',
            hint = 'Create it with a ConsumerGroup resource or with millrace.create_group.';
    end if;
    if g.paused then
        return;
    end if;
    if p_member is null or p_member = '' then
        raise exception 'the member has no name' using errcode = 'MR004', hint = 'Pass a name that is unique per process.';
    end if;
    if p_lease_ms <= 0 then
        raise exception 'cannot claim for % milliseconds', p_lease_ms using errcode = 'MR004', hint = 'Pass a positive time, or null for the group''s ack wait.';
    end if;
    ends := now_ + make_interval(secs => coalesce(p_lease_ms, g.ack_wait_ms) / 1000.0);
    nonce_ := floor(random() * 999999999999999)::bigint + 1;
    perform pg_advisory_xact_lock(536870912 + g.id, 0);

    if g.mode = 'Shared' then
        lanes := array[g.lane_id];
        if g.due then
            return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, now_, ends, nonce_);
            if found then
                return;
            end if;
        end if;
    else
        perform millrace_engine.assign(g.id, p_member, g.partitions, now_, coalesce(p_lease_ms, g.ack_wait_ms));
        select array_agg(x.id order by f.frontier) into lanes
            from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and x.member = p_member;
        if lanes is null then
            return;
        end if;
    end if;

    foreach lane_id in array lanes loop
        if g.mode = 'Ordered' then
            select x.* into strict lane from millrace_engine.lane x where x.id = lane_id;
        else
            lane.id := g.lane_id;
            lane.slot_low := 0;
            lane.slot_high := 1024;
            lane.recheck_at := g.recheck_at;
        end if;
        select x.* into last from millrace_engine.claim x where x.lane_id = lane.id order by x.claim desc limit 1;
        if not found then
            raise exception 'broken invariant: lane % has no claim row', lane.id using errcode = 'MR009';
        end if;

        -- Expired claims first: their messages are the oldest.
        next_ := last.next_check;
        taken := null;
        aside := false;
        blocked := false;
        if now_ >= last.next_check or now_ >= lane.recheck_at or (g.mode = 'Ordered' and last.floor < last.claim
                and not (last.floor = last.claim - 1 and millrace_engine.is_settled(lane.id, last.claim))) then
            next_ := 'infinity';
            for o in select * from millrace_engine.open_claims(lane.id, last.floor, last.stragglers) loop
                if o.expires_at > now_ then
                    next_ := least(next_, o.expires_at);
                    blocked := true;
                    continue;
                end if;
                -- Whoever settles this claim just now holds its lock: leave it, rather than make everybody wait for a slow sink.
                if taken.claim is not null or not pg_try_advisory_xact_lock((1073741824 + lane.id)::integer, (o.claim & 2147483647)::integer) then
                    next_ := now_;
                    blocked := true;
                    continue;
                end if;
                select x.* into again from millrace_engine.open_claim(lane.id, o.claim) x;
                if not found then
                    continue;
                elsif again.expires_at > now_ then
                    next_ := least(next_, again.expires_at);
                    blocked := true;
                    continue;
                end if;
                -- The ring is read here, under the lock: one from before it may be emptied while the claim lives on in a newer one.
                insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                    select lane.id, again.claim, now_, r.ring, 'T' from millrace_engine.ledger r where r.id = 1;
                if g.mode = 'Shared' and (again.attempt >= 2 or again.messages > p_max) then
                    -- A second expiry: some message may be killing its consumers. From here each is handed out alone, and the expiries
                    -- of the claim do not count against the innocent ones.
                    perform millrace_engine.set_aside(again, null, false, case when again.attempt >= 2 then 0 else again.attempt end,
                        interval '0', case when again.attempt >= 2 then 'the claim expired twice' end, again.attempt >= 2);
                    aside := true;
                else
                    taken := again;
                end if;
            end loop;
        end if;
        if aside and taken.claim is null then
            return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, millrace_engine.clock(), ends, nonce_);
            if found then
                return;
            end if;
        end if;
        token := g.id || '.' || lane.id || '.' || last.claim + 1 || '.' || nonce_;
        edge := last.frontier;
        safe := last.horizon;
        n := 0;

        if taken.claim is not null then
            low_ := greatest(taken.low, g.first_position - 1);
            high_ := taken.high;
            skip := taken.settled;
            try := taken.attempt + 1;
            most := p_max;
            if g.mode = 'Ordered' and try > 2 then
                -- It keeps expiring: from here one message at a time, to find the one that kills its consumers.
                most := 1;
                last.careful_to := greatest(last.careful_to, taken.high);
            end if;
            if g.mode = 'Ordered' and g.failure_policy = 'Skip' and g.max_attempts > 0 and taken.attempt >= g.max_attempts and taken.messages = 1 then
                perform millrace_engine.set_aside(taken, null, true, taken.attempt, null, 'the claim expired', false);
                edge := taken.high;
            else
                return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                    from millrace.stream_template m
                    where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                      and not skip @> m."position"
                    order by m."position" limit most;
                get diagnostics n = row_count;
                if n = most then
                    select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                        where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                          and not skip @> m."position"
                        order by m."position" limit most) x;
                end if;
                if g.mode = 'Ordered' then
                    edge := high_;
                end if;
            end if;
        elsif g.mode = 'Ordered' and blocked then
            continue;
        end if;

        if n = 0 then
            try := 1;
            skip := case when g.mode = 'Ordered' then last.settled end;
            if taken.claim is not null and g.mode = 'Ordered' then
                skip := taken.settled;
            end if;
            edge := greatest(edge, g.first_position - 1);
            low_ := edge;
            most := case when g.mode = 'Ordered' and edge < last.careful_to then 1 else p_max end;
            fresh := false;
            loop
                if safe <= edge then
                    exit when fresh;
                    safe := greatest(safe, millrace_engine.horizon(c_stream));
                    fresh := true;
                    continue;
                end if;
                if g.mode = 'Shared' then
                    -- Positions are nearly dense, so a claim of p_max positions needs no reading to be found.
                    high_ := least(edge + p_max, safe);
                    return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                        from millrace.stream_template m
                        where m."position" > edge and m."position" <= high_ order by m."position";
                    get diagnostics n = row_count;
                    low_ := edge;
                    edge := high_;
                    exit when n > 0;
                    -- A hole left by a rollback or a crash: jump over it.
                    select m."position" - 1 into edge from millrace.stream_template m
                        where m."position" > high_ and m."position" <= safe order by m."position" limit 1;
                    edge := coalesce(edge, safe);
                else
                    high_ := safe;
                    if skip is null or isempty(skip) then
                        return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                            from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                            order by m."position" limit most;
                    else
                        return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                            from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                              and not skip @> m."position"
                            order by m."position" limit most;
                    end if;
                    get diagnostics n = row_count;
                    if n = most then
                        select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                              and (skip is null or not skip @> m."position")
                            order by m."position" limit most) x;
                    end if;
                    low_ := edge;
                    edge := high_;
                    exit when n > 0;
                end if;
            end loop;
            if n = 0 and (taken.claim is null or g.mode = 'Shared')
                    and not (g.mode = 'Ordered' and edge > last.frontier + 1000) then
                continue;
            end if;
            -- Ordered: the lane has read past other lanes' messages, or past a dead letter. An empty claim keeps that progress.
        end if;

        if g.mode = 'Ordered' then
            last.floor := last.claim + (n = 0)::integer;   -- one open claim at most, and this is it
        elsif (last.claim + 1) % 32 = 0 then
            select f.floor, f.stragglers into last.floor, last.stragglers from millrace_engine.raise_floor(last) f;
        end if;
        insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt,
                ring, member, stragglers, careful_to, settled)
            select lane.id, last.claim + 1, low_, high_,
                case when g.mode = 'Shared' then greatest(last.frontier, edge) else edge end,
                greatest(last.horizon, safe),
                last.floor,
                nonce_, ends, least(next_, ends), n, try, r.ring, p_member, last.stragglers, last.careful_to,
                case when not isempty(skip) then nullif(skip * int8multirange(int8range(low_, null)), '{}') end
            from millrace_engine.stream s, millrace_engine.ledger r where s.id = c_stream and s.first_position <= low_ + 1 and r.id = 1;
        if not found then
            raise exception 'messages were removed by retention while they were read' using errcode = '40001', hint = 'Call receive again.';
        end if;
        if lane.recheck_at <= now_ then
            update millrace_engine.lane x set recheck_at = 'infinity' where x.id = lane.id and x.recheck_at = lane.recheck_at;
        end if;
        if n > 0 then
            return;
        end if;
    end loop;
end $$;

-- The ledgers are three rings. Rows go to the current one; what is still needed from the one before is carried over; the third is truncated.
--
-- millrace_engine.rotate_ledger(bytes) returns boolean
-- Moves to the next ring when the current one is larger than bytes and the next is empty. True when it moved. A writer that still has the old
-- ring in mind does no harm: every reader looks at all three.
create or replace function millrace_engine.rotate_ledger(p_bytes bigint) returns boolean
language plpgsql volatile as $$
declare
    cur smallint;
    next_ smallint;
    used boolean;
begin
    select l.ring into cur from millrace_engine.ledger l where l.id = 1 for update;
    next_ := (cur + 1) % 3;
    if pg_relation_size(format('millrace_engine.claim_%s', cur)::regclass)
            + pg_relation_size(format('millrace_engine.settlement_%s', cur)::regclass) < p_bytes then
        return false;
    end if;
    select exists (select from millrace_engine.claim c where c.ring = next_) or exists (select from millrace_engine.settlement s where s.ring = next_)
        into used;
    if used then
        return false;
    end if;
    update millrace_engine.ledger l set ring = next_, rotated_at = clock_timestamp() where l.id = 1;
    return true;
end $$;
comment on function millrace_engine.rotate_ledger(bigint) is 'Moves new ledger rows to the next ring when the current one is large.';

-- millrace_engine.carry_over(group) returns boolean
-- Copies what the group still needs into the current ring: its open claims, and a row that remembers how far it is. An emptied ledger would
-- begin again from the first claim otherwise. False when a claim is being settled this moment; call it again then.
-- Each open claim is locked exclusively, so no settlement can slip into the old ring beside its copy.
create or replace function millrace_engine.carry_over(p_group integer) returns boolean
language plpgsql volatile as $$
declare
    cur smallint;
    l record;
    last millrace_engine.claim;
    o millrace_engine.claim;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    perform pg_advisory_xact_lock(536870912 + p_group, 0);
    select x.ring into cur from millrace_engine.ledger x where x.id = 1;
    for l in select x.id from millrace_engine.lane x where x.group_id = p_group order by x.id loop
        select c.* into strict last from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1;
        for o in select * from millrace_engine.open_claims(l.id, last.floor, last.stragglers) loop
            continue when o.ring = cur;
            if not pg_try_advisory_xact_lock((1073741824 + l.id)::integer, (o.claim & 2147483647)::integer) then
                return false;
            end if;
            insert into millrace_engine.claim select (x).* from (
                select jsonb_populate_record(y, jsonb_build_object('ring', cur, 'copy', y.copy + 1)) as x
                from millrace_engine.open_claim(l.id, o.claim) y) z;
        end loop;
        if last.ring <> cur then
            insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring,
                    stragglers, careful_to, settled)
                select l.id, last.claim + 1, last.frontier, last.frontier, last.frontier, last.horizon, f.floor, 0, 'infinity', last.next_check,
                    0, 0, cur, f.stragglers, last.careful_to, last.settled
                from millrace_engine.raise_floor(last) f;
            insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                values (l.id, last.claim + 1, millrace_engine.clock(), cur, 'A');
        end if;
    end loop;
    return true;
end $$;
comment on function millrace_engine.carry_over(integer) is 'Copies the open claims and the progress of a group into the current ring.';

-- millrace_engine.truncate_ledger() returns boolean
-- Empties the ring that is neither current nor previous, when no lane needs it. True when it is empty afterwards.
-- Raises: 55P03 when readers keep it busy; call it again later.
create or replace function millrace_engine.truncate_ledger() returns boolean
language plpgsql volatile
set lock_timeout = '50ms' as $$
declare
    cur smallint;
    old smallint;
    needed boolean;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    select x.ring into cur from millrace_engine.ledger x where x.id = 1;
    old := (cur + 1) % 3;
    if not exists (select from millrace_engine.claim c where c.ring = old) and not exists (select from millrace_engine.settlement s where s.ring = old) then
        return true;
    end if;
    execute format('lock table millrace_engine.claim_%1$s, millrace_engine.settlement_%1$s in access exclusive mode', old);
    -- A new statement after the lock: writers that had this ring in mind are done now.
    select exists (
        select from millrace_engine.lane l, lateral millrace_engine.lane_progress(l.id) f
        where (select c.ring from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) = old
           or exists (select from millrace_engine.open_claims(l.id, f.floor, f.stragglers) o where o.ring = old
                and not exists (select from millrace_engine.claim d where d.lane_id = o.lane_id and d.claim = o.claim and d.ring <> old))
    ) into needed;
    if needed then
        return false;
    end if;
    execute format('truncate millrace_engine.claim_%1$s, millrace_engine.settlement_%1$s', old);
    return true;
end $$;
comment on function millrace_engine.truncate_ledger() is 'Empties the oldest ledger ring once nothing in it is needed.';

-- millrace_engine.set_aside(claim, positions, dead, attempt, delay, reason, suspect) returns void
-- Copies messages of a held range claim, payload included, to the delivery table or to the dead letters, so that they never keep the
-- claim or a segment from being finished with. positions null: everything in the claim that is not settled. The caller settles them in the claim.
create or replace function millrace_engine.set_aside(p_claim millrace_engine.claim, p_positions bigint[], p_dead boolean, p_attempt integer,
    p_delay interval, p_reason text, p_suspect boolean) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    source record;
    wanted text;
begin
    select st.name, l.slot_low, l.slot_high, l.group_id,
           case st.payload_type when 'JSON' then 'm.payload, null::bytea' else 'null::jsonb, m.payload' end as payload
        into strict source
        from millrace_engine.lane l
        join millrace_engine.consumer_group g on g.id = l.group_id
        join millrace_engine.stream st on st.id = g.stream_id
        where l.id = p_claim.lane_id;
    wanted := format('from millrace.%I m where m."position" > $1 and m."position" <= $2 and millrace_engine.slot(m.key, m."position") between %s and %s - 1
        and not $3 @> m."position" and ($4 is null or m."position" = any ($4))', source.name, source.slot_low, source.slot_high);
    if p_dead then
        execute format('insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at,
                attempts, reason, errors, dead_at)
            select %s, m."position", m.key, m.headers, %s, m.created_at, $5, $6, millrace_engine.add_error(''[]'', $5, $6), millrace_engine.clock() %s
            on conflict on constraint dead_letter_position_unique do nothing', source.group_id, source.payload, wanted)
            using p_claim.low, p_claim.high, coalesce(p_claim.settled, '{}'), p_positions, p_attempt, p_reason;
    else
        execute format('insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at,
                attempt, visible_at, suspect, errors)
            select %s, m."position", m.key, m.headers, %s, m.created_at, $5, millrace_engine.clock() + $7, $8,
                millrace_engine.add_error(''[]'', $5, $6) %s
            on conflict on constraint delivery_position_unique do nothing', source.group_id, source.payload, wanted)
            using p_claim.low, p_claim.high, coalesce(p_claim.settled, '{}'), p_positions, p_attempt, p_reason, p_delay, p_suspect;
    end if;
end $$;

-- millrace_engine.give_back(claim, stream, delay, next attempt) returns void
-- Ends a held claim so that its unsettled messages are claimed again, in order, after the delay.
create or replace function millrace_engine.give_back(p_claim millrace_engine.claim, p_stream integer, p_delay interval, p_next_attempt integer)
returns void
language plpgsql volatile as $$
declare
    due timestamptz := millrace_engine.clock() + p_delay;
begin
    insert into millrace_engine.settlement (lane_id, claim, at, expires_at, next_attempt, ring, kind)
        select p_claim.lane_id, p_claim.claim, millrace_engine.clock(), due, p_next_attempt, l.ring, 'R'
        from millrace_engine.ledger l where l.id = 1;
    -- Ordered groups look at their one open claim anyway, and would wait here for a caller whose transaction stays open.
    update millrace_engine.lane l set recheck_at = least(l.recheck_at, due) from millrace_engine.consumer_group g
        where l.id = p_claim.lane_id and g.id = l.group_id and g.mode = 'Shared';
    if p_delay <= interval '0' then
        perform pg_notify('millrace', p_stream::text);
    end if;
end $$;

-- millrace_engine.delay(group, attempt, asked for) returns interval
-- The caller's delay, or exponential backoff with half of it at random so that messages nacked together do not come back together.
create or replace function millrace_engine.delay(p_group millrace_engine.consumer_group, p_attempt integer, p_seconds double precision)
returns interval
language sql volatile
return make_interval(secs => coalesce(p_seconds,
    least(p_group.backoff_initial_ms * power(2, least(p_attempt - 1, 40)), p_group.backoff_max_ms) / 1000.0 * (0.5 + random() / 2)));

-- millrace_engine.add_error(errors, attempt, reason) returns jsonb
-- The error history, newest last, at most ten entries of at most 1,000 characters.
create or replace function millrace_engine.add_error(p_errors jsonb, p_attempt integer, p_reason text) returns jsonb
language sql volatile
return case when p_reason is null then p_errors else
    (case when jsonb_array_length(p_errors) >= 10 then p_errors - 0 else p_errors end)
    || jsonb_build_object('attempt', p_attempt, 'at', millrace_engine.clock(), 'error', left(p_reason, 1000)) end;

-- millrace_engine.slot(key, position) returns bigint
-- The hash slot of a message, 0 to 1023: a stable property of its key, so that all messages of a key are in one lane of an Ordered group. A message
-- without a key has no order to keep and is spread by its position. It is computed by the readers that need it and not stored, because a stored generated
-- column costs every publisher a tenth of its time. PostgreSQL keeps this hash unchanged over major versions: hash partitions are stored by it.
create or replace function millrace_engine.slot(p_key text, p_position bigint) returns bigint
language sql immutable parallel safe
return coalesce(hashtextextended(p_key, 0), p_position) & 1023;
comment on function millrace_engine.slot(text, bigint) is 'Hash slot of a message, 0 to 1023: all messages of a key share one.';

-- millrace.stats(stream) returns one row per consumer group of the stream; null: of every stream
-- Progress of every group in one call; its cost does not depend on the backlog: positions are subtracted, not rows counted, so lag is an
-- upper bound where transactions rolled back; it is zero when no message is left.
create or replace function millrace.stats(p_stream text default null)
returns table (stream text, "group" text, mode text, lag bigint, in_flight bigint, retrying bigint, dead_letters bigint,
    oldest_age interval, ack_floor bigint, members jsonb)
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics say of a table that was empty when they were made
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    look_ahead constant integer := 2000;   -- more than a lane reads without noting it
    s record;
    g record;
    l record;
    h bigint;
    open_low bigint;
    open_count bigint;
    safe bigint;
    reach bigint;
    look record;
    oldest timestamptz;
    left_ timestamptz;
begin
    for s in select x.id, x.name, x.partitions, x.first_position from millrace_engine.stream x
             where p_stream is null or x.name = p_stream order by x.name loop
        h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0);
        safe := null;
        for g in select x.id, x.name, x.mode from millrace_engine.consumer_group x where x.stream_id = s.id order by x.name loop
            stream := s.name;
            "group" := g.name;
            mode := g.mode;
            lag := 0;
            in_flight := 0;
            ack_floor := null;
            for l in select x.slot_low, x.slot_high, x.id, f.frontier, f.settled, f.floor, f.stragglers from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f
                     where x.group_id = g.id loop
                select min(o.low), coalesce(sum(o.messages), 0) into open_low, open_count from millrace_engine.open_claims(l.id, l.floor, l.stragglers) o;
                reach := greatest(l.frontier, s.first_position - 1);
                if reach < h and not pg_is_in_recovery() and current_setting('transaction_isolation') = 'read committed' then
                    -- A lane does not note at once that it has read past a hole or other lanes' messages: look where its next message is.
                    safe := coalesce(safe, millrace_engine.horizon(s.id));
                    execute format('select min(x."position") filter (where millrace_engine.slot(x.key, x."position") between %s and %s - 1
                            and not $3 @> x."position") - 1 as next, max(x."position") as last, count(*) as n
                        from (select m."position", m.key from millrace.%I m where m."position" > $1 and m."position" <= $2
                              order by m."position" limit %s) x', l.slot_low, l.slot_high, s.name, look_ahead)
                        into look using reach, safe, coalesce(l.settled, '{}');
                    reach := greatest(reach, coalesce(look.next, case when look.n < look_ahead then safe else look.last end));
                end if;
                lag := lag + ceil(greatest(h - reach, 0) * (l.slot_high - l.slot_low) / 1024.0)::bigint;
                in_flight := in_flight + greatest(open_count, 0);
                ack_floor := least(ack_floor, coalesce(open_low, reach));
            end loop;
            select count(*), min(d.created_at) into retrying, oldest from millrace_engine.delivery d where d.group_id = g.id;
            select count(*) into dead_letters from millrace_engine.dead_letter d where d.group_id = g.id;
            oldest_age := null;
            if lag + in_flight > 0 then
                execute format('select (select m.created_at from millrace.%I m where m."position" > $1 order by m."position" limit 1)', s.name)
                    into left_ using ack_floor;
                oldest := least(oldest, left_);
                if left_ is null then
                    lag := 0; -- those positions rolled back, and nothing may come for a long time to move the frontier past them
                end if;
            end if;
            oldest_age := greatest(millrace_engine.clock() - oldest, interval '0');
            select coalesce(jsonb_agg(jsonb_build_object('name', m.name, 'expires_at', m.expires_at, 'partitions',
                    (select coalesce(jsonb_agg(p order by p), '[]') from generate_series(0, s.partitions - 1) p
                     where exists (select from millrace_engine.lane x where x.group_id = g.id and x.member = m.name
                         and x.slot_low < (p + 1) * 1024 / s.partitions and x.slot_high > p * 1024 / s.partitions))) order by m.joined), '[]')
                into members from millrace_engine.member m where m.group_id = g.id and m.expires_at > millrace_engine.clock();
            return next;
        end loop;
    end loop;
end $$;
comment on function millrace.stats(text) is 'Lag, messages in flight, retries, dead letters and members of every consumer group.';

-- millrace_engine.stream_repairs(stream id) returns table (summary, statement)
-- What is missing or wrong in the database objects of a stream, and the statement that mends it, in the order to run them. For a
-- new stream that is everything, so creating and repairing are one code. Reads the catalogue only.
create or replace function millrace_engine.stream_repairs(p_stream integer) returns table (summary text, statement text)
language plpgsql stable as $$
declare
    s millrace_engine.stream;
    runtime text;
    parent regclass;
    leaf regclass;
    leaf_name text;
    target text;
    seq record;
    top bigint;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream;
    select v.value into runtime from millrace_engine.setting v where v.name = 'runtime_role';
    parent := to_regclass(format('millrace.%I', s.name));

    select q.* into seq from pg_sequences q
        where q.schemaname = 'millrace_engine' and q.sequencename = 'position_' || p_stream;
    if not found then
        if parent is not null then
            execute format('select coalesce(max(m."position"), 0) from millrace.%I m', s.name) into top;
        end if;
        summary := 'create the position sequence';
        statement := format('create sequence millrace_engine.position_%s as bigint increment 1 cache 1 no cycle start %s', p_stream,
            greatest(s.first_position, top + 1, (select coalesce(max(c.horizon), 0) + 1 from millrace_engine.claim c
                join millrace_engine.lane l on l.id = c.lane_id
                join millrace_engine.consumer_group g on g.id = l.group_id where g.stream_id = p_stream)));
        return next;
    elsif seq.cache_size <> 1 or seq.increment_by <> 1 or seq.cycle then
        summary := 'restore the position sequence to cache 1, increment 1, no cycle';
        statement := format('alter sequence millrace_engine.position_%s increment 1 cache 1 no cycle', p_stream);
        return next;
    end if;

    foreach target in array array['state', 'notified'] loop
        if to_regclass(format('millrace_engine.%s_%s', target, p_stream)) is null then
            summary := format('create the %s sequence', target);
            statement := format('create sequence millrace_engine.%1$s_%2$s as bigint minvalue 0 start 0 cache 1;
                select setval(''millrace_engine.%1$s_%2$s'', 0)', target, p_stream);
            return next;
        end if;
    end loop;

    if parent is null then
        summary := 'create table millrace.' || s.name;
        statement := format($ddl$
            create table millrace.%2$I (
                "position" bigint not null default nextval('millrace_engine.position_%1$s'),
                created_at timestamptz not null default statement_timestamp(),
                segment    smallint not null default (ascii(current_setting('millrace.guard_%1$s')) - 97)::smallint,
                key        text,
                headers    jsonb,
                payload    %3$s not null
            ) partition by list (segment)$ddl$,
            p_stream, s.name, case s.payload_type when 'JSON' then 'jsonb' else 'bytea' end);
        return next;
        summary := 'describe table millrace.' || s.name;
        statement := format('comment on table millrace.%I is %L', s.name,
            'Millrace stream. Insert or COPY key, headers and payload; everything else is filled in. Never update or delete.');
        return next;
    end if;

    if to_regproc('millrace_engine.receive_' || p_stream) is null or to_regproc('millrace_engine.publish_guard_' || p_stream) is null then
        summary := 'create the functions of the stream';
        statement := format('select millrace_engine.install_functions(%s)', p_stream);
        return next;
    end if;

    for k in 0 .. s.segments - 1 loop
        leaf_name := format('segment_%s_%s', p_stream, k);
        leaf := to_regclass('millrace_engine.' || leaf_name);
        if leaf is null then
            summary := format('create segment %s of %s', k + 1, s.segments);
            statement := format('create table millrace_engine.%s partition of millrace.%I for values in (%s)
                with (autovacuum_vacuum_insert_threshold = -1)', leaf_name, s.name, k);
            return next;
            summary := format('default of segment %s', k + 1);
            statement := format('alter table millrace_engine.%s alter column segment set default %s', leaf_name, k);
            return next;
        end if;
        if leaf is null or not exists (select from pg_index i where i.indrelid = leaf and i.indisvalid
                and i.indkey::text = (select a.attnum::text from pg_attribute a where a.attrelid = leaf and a.attname = 'position')) then
            summary := format('index the positions of segment %s', k + 1);
            statement := format('drop index if exists millrace_engine.%1$s_position_idx;
                create index %1$s_position_idx on millrace_engine.%1$s ("position")', leaf_name);
            return next;
        end if;
        if leaf is null or not exists (select from pg_trigger t where t.tgrelid = leaf and t.tgname = 'publish_guard' and t.tgenabled = 'A') then
            summary := format('guard inserts into segment %s', k + 1);
            statement := millrace_engine.guard_statement(p_stream, 'millrace_engine.' || leaf_name);
            return next;
        end if;
    end loop;

    if parent is null or not exists (select from pg_trigger t where t.tgrelid = parent and t.tgname = 'publish_guard' and t.tgenabled = 'A') then
        summary := 'guard inserts into millrace.' || s.name;
        statement := millrace_engine.guard_statement(p_stream, format('millrace.%I', s.name));
        return next;
    end if;

    if runtime is not null and (parent is null or not has_any_column_privilege(runtime, parent, 'insert')
            or not has_table_privilege(runtime, parent, 'select')) then
        target := quote_ident(runtime);
        summary := 'grant publishing and reading to the runtime role';
        statement := format('grant select, insert (key, headers, payload) on millrace.%1$I to %2$s;
            grant usage, select on sequence millrace_engine.position_%3$s to %2$s;
            grant usage, select, update on sequence millrace_engine.state_%3$s, millrace_engine.notified_%3$s to %2$s', s.name, target, p_stream);
        return next;
    end if;

end $$;
comment on function millrace_engine.stream_repairs(integer) is
    'What is missing or wrong in the database objects of a stream, and the statements that mend it.';

-- millrace_engine.guard_statement(stream id, table) returns text
-- The DDL that puts the publish guard on a stream's table or on one of its segments.
create or replace function millrace_engine.guard_statement(p_stream integer, p_table text) returns text
language sql immutable
return format('drop trigger if exists publish_guard on %1$s;
    create trigger publish_guard before insert on %1$s for each statement
        execute function millrace_engine.publish_guard_%2$s();
    alter table %1$s enable always trigger publish_guard', p_table, p_stream);

-- What every publishing transaction must know about its stream is kept in a sequence, state_<stream id>, because reading one costs a tenth of a
-- query, and changing one leaves no dead row behind: the lower four bits are the segment for new messages, the others the time, in seconds
-- since 1970, until which somebody waits for notifications. A value that is a moment old does no harm.

-- millrace_engine.set_state(stream id, segment or null, waiting until or null) returns void
-- Changes what is not null. Takes effect at once, whatever becomes of the transaction.
create or replace function millrace_engine.set_state(p_stream integer, p_segment integer, p_until timestamptz) returns void
language plpgsql volatile as $$
declare
    state constant regclass := 'millrace_engine.state_' || p_stream;
    old bigint;
begin
    perform pg_advisory_xact_lock(1836019571, p_stream);
    old := pg_sequence_last_value(state);
    perform setval(state, (coalesce(ceil(extract(epoch from p_until))::bigint, old >> 4) << 4) | coalesce(p_segment, old & 15));
end $$;

-- millrace_engine.segment(stream id) returns smallint
-- The segment that new messages go to.
create or replace function millrace_engine.segment(p_stream integer) returns smallint
language sql volatile
return pg_sequence_last_value(('millrace_engine.state_' || p_stream)::regclass) & 15;

-- millrace_engine.wait_for(stream ids) returns void
-- Registers interest for ten seconds: publishers notify until then. Renewed when half used up, so a member that waits after every message
-- does not miss those published in between.
create or replace function millrace_engine.wait_for(p_streams integer[]) returns void
language plpgsql volatile as $$
declare
    id integer;
begin
    foreach id in array p_streams loop
        if pg_sequence_last_value(('millrace_engine.state_' || id)::regclass) >> 4 < extract(epoch from clock_timestamp()) + 5 then
            perform millrace_engine.set_state(id, null, clock_timestamp() + interval '10 seconds');
        end if;
    end loop;
end $$;
comment on function millrace_engine.wait_for(integer[]) is 'Asks publishers of these streams to notify for the next ten seconds.';

update millrace_engine.schema_version set functions = '29700b8a9cb1ddf2' where version = 1;
