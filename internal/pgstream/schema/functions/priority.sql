-- Priorities. A stream with n priorities has n - 1 child streams, the lanes <name>.p1 to <name>.p<n-1>, with tables, sequences and functions like any
-- other; the stream itself is the lane of priority 0. Every group of the stream has a mirror in each lane, under its own name. Users see one stream:
-- lanes are made, changed, repaired and dropped with their parent.

-- millrace_engine.refuse_lane(stream) returns void
-- Raises: MR004 when the stream is a priority lane of another.
create or replace function millrace_engine.refuse_lane(p_stream millrace_engine.stream) returns void
language plpgsql stable as $$
begin
    if p_stream.parent_id is not null then
        raise exception '"%" is a priority lane and changes with its stream only', p_stream.name using errcode = 'MR004',
            hint = format('Use the stream "%s".', split_part(p_stream.name, '.', 1));
    end if;
end $$;

-- millrace_engine.apply_lanes(stream id) returns void
-- Makes the priority lanes of a stream that are missing, brings all of them to the stream's settings, and mirrors its groups. The caller holds the
-- stream's row and the lock for changes of structure. Limits of size and number hold for each lane.
create or replace function millrace_engine.apply_lanes(p_stream integer) returns void
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    lane integer;
    step record;
    g record;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream for no key update;
    for n in 1 .. s.priorities - 1 loop
        insert into millrace_engine.stream as x (name, parent_id, priority, partitions, payload_type, segments, retention_policy, max_age_seconds,
                max_bytes, max_messages, max_message_bytes, dedupe_window_seconds)
            values (s.name || '.p' || n, s.id, n, s.partitions, s.payload_type, s.segments, s.retention_policy, s.max_age_seconds,
                s.max_bytes, s.max_messages, s.max_message_bytes, s.dedupe_window_seconds)
            on conflict on constraint stream_parent_priority_unique do update set partitions = s.partitions, segments = s.segments,
                retention_policy = s.retention_policy, max_age_seconds = s.max_age_seconds, max_bytes = s.max_bytes, max_messages = s.max_messages,
                max_message_bytes = s.max_message_bytes, dedupe_window_seconds = s.dedupe_window_seconds
            returning x.id into lane;
        for step in select r.statement from millrace_engine.stream_repairs(lane) r loop
            execute step.statement;
        end loop;
    end loop;
    for g in select x.id from millrace_engine.consumer_group x where x.stream_id = s.id order by x.id loop
        perform millrace_engine.mirror_group(g.id);
    end loop;
end $$;
comment on function millrace_engine.apply_lanes(integer) is 'Makes and repairs the priority lanes of a stream.';

-- millrace_engine.mirror_group(group) returns void
-- Gives every priority lane of the group's stream a group with the same name and settings. A new mirror begins where the group was told to begin: at the
-- lane's own earliest or latest message or at the time; with a Position at the lane's earliest. The caller holds the stream's row.
create or replace function millrace_engine.mirror_group(p_group integer) returns void
language plpgsql volatile as $$
declare
    g millrace_engine.consumer_group;
    lane millrace_engine.stream;
    mirror integer;
begin
    select * into strict g from millrace_engine.consumer_group x where x.id = p_group;
    if g.queue_policy is not null and exists (select from millrace_engine.stream x where x.parent_id = g.stream_id) then
        raise exception 'the stream cannot have priorities: consumer group "%" has queue policy %', g.name, g.queue_policy using errcode = 'MR004',
            hint = 'Drop the group first: each priority is a line of its own, and the policy would hold in each of them.';
    end if;
    for lane in select * from millrace_engine.stream x where x.parent_id = g.stream_id order by x.priority for no key update loop
        update millrace_engine.consumer_group x set ack_wait_ms = g.ack_wait_ms, max_attempts = g.max_attempts,
                backoff_initial_ms = g.backoff_initial_ms, backoff_max_ms = g.backoff_max_ms, failure_policy = g.failure_policy, paused = g.paused,
                filter = g.filter, lapse_after_seconds = g.lapse_after_seconds, lapse_lag = g.lapse_lag
            where x.parent_id = g.id and x.stream_id = lane.id;
        continue when found;
        insert into millrace_engine.consumer_group (stream_id, parent_id, name, mode, start, ack_wait_ms, max_attempts, backoff_initial_ms,
                backoff_max_ms, failure_policy, paused, filter, lapse_after_seconds, lapse_lag, lapsed_at, lapse_reason, first_position)
            values (lane.id, g.id, g.name, g.mode, g.start, g.ack_wait_ms, g.max_attempts, g.backoff_initial_ms, g.backoff_max_ms,
                g.failure_policy, g.paused, g.filter, g.lapse_after_seconds, g.lapse_lag, g.lapsed_at, g.lapse_reason,
                lane.first_position)
            returning id into mirror;
        perform millrace_engine.open_lane(mirror, 0, 1024, millrace_engine.place(lane, g.start) - 1, null);
    end loop;
end $$;
comment on function millrace_engine.mirror_group(integer) is 'Brings the mirrors of a group in the priority lanes to its settings.';

-- millrace_engine.hold_receives(group) returns void
-- Takes the receive locks of a group and of its mirrors until the end of the transaction, in the order in which receive_priorities takes them: the
-- highest priority first.
create or replace function millrace_engine.hold_receives(p_group integer) returns void
language plpgsql volatile as $$
declare
    g record;
begin
    for g in select x.id from millrace_engine.consumer_group x join millrace_engine.stream s on s.id = x.stream_id
             where x.id = p_group or x.parent_id = p_group order by s.priority desc loop
        perform pg_advisory_xact_lock(536870912 + g.id, 0);
    end loop;
end $$;

-- millrace_engine.receive_priorities(stream id, group, member, max, lease in ms, ack, auto-ack) returns the messages of one claim
-- Receive for a stream with priorities: settles the claim `ack`, then looks into the lanes from the highest priority to the lowest and returns
-- the first claim it gets. A lower lane is delivered only while every higher one has nothing to deliver to this member.
-- Locks, raises: as receive_template.
create or replace function millrace_engine.receive_priorities(p_stream integer, p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text,
    p_auto_ack boolean default false)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile as $$
declare
    lane record;
    ack text := p_ack;
begin
    for lane in select x.id, g.mode from millrace_engine.stream x left join millrace_engine.consumer_group g on g.stream_id = x.id and g.name = p_group
                where x.id = p_stream or x.parent_id = p_stream order by x.priority desc loop
        if p_auto_ack or lane.mode is null then
            return query execute format('select * from millrace_engine.receive_%s($1, $2, $3, $4, $5, $6)', lane.id)
                using p_group, p_member, p_max, p_lease_ms, ack, p_auto_ack;
        else
            return query execute format('select * from millrace_engine.receive_%s_%s($1, $2, $3, $4, $5)', lower(lane.mode), lane.id)
                using p_group, p_member, p_max, p_lease_ms, ack;
        end if;
        if found then
            return;
        end if;
        ack := null;
        -- What this receive has written so far is receive's own: the next lane may be looked at in the same transaction.
        if pg_current_xact_id_if_assigned() is not null then
            perform set_config('millrace.receiving', pg_current_xact_id_if_assigned()::text, true);
        end if;
    end loop;
end $$;
comment on function millrace_engine.receive_priorities(integer, text, text, integer, bigint, text, boolean) is
    'Claims messages of the highest priority lane that has any for the member.';
