-- millrace_engine.apply_group(spec jsonb) returns integer
-- Creates the consumer group, or brings its settings to the spec. Idempotent.
-- Keys: stream, name, mode, start {from, position, time}, ack_wait_ms, max_attempts, backoff_initial_ms, backoff_max_ms, failure_policy,
--       queue_policy, paused, filter, lapse_after_seconds, lapse_lag, owner. A missing key keeps the present value, or takes the default; a filter that is null
--       or empty ends filtering. A changed filter holds for what is handed out from the log from then on, also again: what is set aside or dead stays.
-- A group with a filter is a route: what a new filter takes no more, and nobody else does, goes to the groups for unrouted messages (unrouted.sql).
-- A stream with priorities: the group is mirrored to every lane (mirror_group). Its lanes lapse together.
-- Raises: 42501 need_owner; MR002 no such stream; MR004 for what can never be done, with what to do instead; MR007 it has another owner.
create or replace function millrace_engine.apply_group(p_spec jsonb) returns integer
language plpgsql volatile as $$
declare
    stream integer := millrace_engine.stream_id(p_spec ->> 'stream');
    spec constant jsonb := jsonb_strip_nulls(p_spec - 'filter')
        - '{id,stream_id,parent_id,lane_id,parks,recheck_at,first_position,lapsed_at,lapse_reason,created_at}'::text[];
    s millrace_engine.stream;
    g millrace_engine.consumer_group;
    wanted millrace_engine.consumer_group;
    first_ bigint;
begin
    perform millrace_engine.need_owner();
    if p_spec ->> 'name' is null or p_spec ->> 'name' !~ '^[a-z][a-z0-9_]{0,47}$' then
        raise exception 'consumer group name % is not usable', coalesce(quote_literal(p_spec ->> 'name'), 'null') using errcode = 'MR004',
            hint = 'Use a lower case letter, then up to 47 lower case letters, digits or underscores.';
    end if;
    -- The stream's row: retention decides with the same lock what no group needs any more. Not its key, which publishers refer to.
    select * into strict s from millrace_engine.stream x where x.id = stream for no key update;
    perform millrace_engine.refuse_lane(s);
    select * into g from millrace_engine.consumer_group x where x.stream_id = stream and x.name = p_spec ->> 'name' for no key update;
    if found then
        wanted := jsonb_populate_record(g, spec);
        wanted.queue_policy := nullif(wanted.queue_policy, 'Standard');
        if p_spec ? 'filter' then
            wanted.filter := millrace_engine.checked_filter(p_spec -> 'filter');
        end if;
        if g.owner <> (p_spec -> 'owner') or (g.owner is not null and p_spec ->> 'owner' is null and wanted is distinct from g) then
            raise exception 'consumer group "%" belongs to %', g.name, g.owner using errcode = 'MR007', hint = 'Let its owner release it first.';
        end if;
        if wanted.mode <> g.mode then
            raise exception 'consumer group "%" is % and cannot become %', g.name, g.mode, wanted.mode using errcode = 'MR004',
                hint = 'Create another group with that mode, starting at the position this one has reached.';
        end if;
        if wanted.queue_policy is distinct from g.queue_policy or coalesce(wanted.filter ? 'unrouted', false) <> coalesce(g.filter ? 'unrouted', false) then
            raise exception 'the queue policy of consumer group "%", and whether it is for unrouted messages, cannot change', g.name using errcode = 'MR004',
                hint = 'It says how the group keeps what waits. Create another group, starting at the position this one has reached.';
        end if;
        if not millrace_engine.same_place(wanted.start, g.start) then
            raise exception 'consumer group "%" has started at % and cannot start elsewhere', g.name, g.start using errcode = 'MR004',
                hint = 'Move it with millrace.reset_group, or create another group with that start.';
        end if;
        wanted.start := g.start;
        if wanted is distinct from g then
            perform millrace_engine.check_group(wanted);
            if wanted.filter is distinct from g.filter then
                perform millrace_engine.route_all(stream);
            end if;
            update millrace_engine.consumer_group x set ack_wait_ms = wanted.ack_wait_ms, max_attempts = wanted.max_attempts,
                    backoff_initial_ms = wanted.backoff_initial_ms, backoff_max_ms = wanted.backoff_max_ms,
                    failure_policy = wanted.failure_policy, paused = wanted.paused, filter = wanted.filter,
                    lapse_after_seconds = wanted.lapse_after_seconds, lapse_lag = wanted.lapse_lag, owner = wanted.owner
                where x.id = g.id;
            perform millrace_engine.mirror_group(g.id);
            if wanted.filter is distinct from g.filter and wanted.filter is not null then
                perform millrace_engine.hand_over(g.id, g.filter, false);
            end if;
        end if;
        return g.id;
    end if;
    if s.retention_policy = 'WorkQueue' and exists (select from millrace_engine.consumer_group x where x.stream_id = stream) then
        raise exception 'stream "%" has retention WorkQueue, which allows one consumer group, and it has one', s.name using errcode = 'MR004',
            hint = 'Use retention Interest or Limits for several groups.';
    end if;
    wanted := jsonb_populate_record(null::millrace_engine.consumer_group,
        '{"mode": "Shared", "start": {"from": "Earliest"}, "ack_wait_ms": 30000, "max_attempts": 10, "backoff_initial_ms": 1000,
          "backoff_max_ms": 300000, "failure_policy": "Block", "paused": false, "lapse_after_seconds": 0, "lapse_lag": 0}'::jsonb || spec);
    wanted.filter := millrace_engine.checked_filter(p_spec -> 'filter');
    wanted.queue_policy := nullif(wanted.queue_policy, 'Standard');
    perform millrace_engine.check_group(wanted);
    if wanted.queue_policy is not null and s.priorities > 1 then
        raise exception 'a group of stream "%" cannot have queue policy %: the stream has priorities', s.name, wanted.queue_policy using errcode = 'MR004',
            hint = 'Use a stream without priorities: each priority is a line of its own, and the policy would hold in each of them.';
    end if;
    first_ := millrace_engine.place(s, wanted.start);
    if wanted.filter is not null then
        -- After the place was found, so that a message between the two is seen by one of them at least.
        perform millrace_engine.route_all(stream);
    end if;
    insert into millrace_engine.consumer_group (stream_id, name, mode, start, ack_wait_ms, max_attempts, backoff_initial_ms, backoff_max_ms,
            failure_policy, queue_policy, paused, filter, lapse_after_seconds, lapse_lag, owner, first_position)
        values (stream, wanted.name, wanted.mode, wanted.start, wanted.ack_wait_ms, wanted.max_attempts, wanted.backoff_initial_ms,
            wanted.backoff_max_ms, wanted.failure_policy, wanted.queue_policy, wanted.paused, wanted.filter, wanted.lapse_after_seconds,
            wanted.lapse_lag, wanted.owner, s.first_position)
        returning * into g;
    perform millrace_engine.open_lane(g.id, 0, 1024, first_ - 1, null);
    perform millrace_engine.mirror_group(g.id);
    return g.id;
end $$;
comment on function millrace_engine.apply_group(jsonb) is 'Creates a consumer group or brings it to the given settings.';

-- millrace_engine.check_group(group) returns void
-- What a group cannot have, or not together. The table's constraints say much of it too, but not what to do instead.
-- Raises: MR004.
create or replace function millrace_engine.check_group(p_group millrace_engine.consumer_group) returns void
language plpgsql immutable as $$
begin
    if p_group.mode not in ('Ordered', 'Shared') then
        raise exception 'mode % is not known', quote_literal(p_group.mode) using errcode = 'MR004', hint = 'Use Ordered or Shared.';
    end if;
    if not millrace_engine.is_duration(p_group.ack_wait_ms / 1000.0) or p_group.ack_wait_ms = 0 or p_group.max_attempts < 0 or p_group.backoff_initial_ms < 0
            or p_group.backoff_max_ms < p_group.backoff_initial_ms or not millrace_engine.is_duration(p_group.backoff_max_ms / 1000.0) then
        raise exception 'an ack wait of % ms, % attempts and a backoff of % to % ms are not possible', p_group.ack_wait_ms, p_group.max_attempts,
            p_group.backoff_initial_ms, p_group.backoff_max_ms using errcode = 'MR004',
            hint = 'The ack wait is positive, attempts are 0 (no limit) or more, the longest backoff is at least the first, and both times are up to a hundred years.';
    end if;
    if p_group.failure_policy not in ('Block', 'Park', 'Skip') then
        raise exception 'failure policy % is not known', quote_literal(p_group.failure_policy) using errcode = 'MR004', hint = 'Use Block, Park or Skip.';
    end if;
    if p_group.queue_policy not in ('Short', 'Singleton', 'Stately') then
        raise exception 'queue policy % is not known', quote_literal(p_group.queue_policy) using errcode = 'MR004',
            hint = 'Use Standard, Short, Singleton or Stately.';
    end if;
    if p_group.mode = 'Ordered' and (p_group.queue_policy is not null or p_group.filter ? 'unrouted') then
        raise exception 'an Ordered group can neither have a queue policy nor be for unrouted messages' using errcode = 'MR004',
            hint = 'Use mode Shared. An Ordered group gives the messages of a key to one member at a time anyway.';
    end if;
    if p_group.mode = 'Shared' and p_group.failure_policy = 'Park' then
        raise exception 'a Shared group cannot park: it has no order to keep' using errcode = 'MR004',
            hint = 'In a Shared group a failed message waits alone anyway. Leave the policy out, or use mode Ordered.';
    end if;
    if not millrace_engine.is_duration(p_group.lapse_after_seconds) or p_group.lapse_lag < 0 then
        raise exception 'a group cannot lapse after % seconds or % messages', p_group.lapse_after_seconds, p_group.lapse_lag using errcode = 'MR004',
            hint = 'Both are positive, or 0 for never, and the time is up to a hundred years.';
    end if;
end $$;

-- millrace_engine.place(stream, place {from, position, time}) returns bigint
-- The first position to deliver of a group that begins or is reset there. In a priority lane a Position means the lane's earliest message: positions
-- of one lane say nothing about another. The caller holds the stream's row, so that retention cannot remove what begins there.
-- Raises: MR003 isolation level; MR004 no such place.
create or replace function millrace_engine.place(p_stream millrace_engine.stream, p_place jsonb) returns bigint
language plpgsql volatile as $$
declare
    since timestamptz;
    result bigint;
begin
    case p_place ->> 'from'
        when 'Earliest' then
            return p_stream.first_position;
        when 'Latest' then
            return greatest(millrace_engine.horizon(p_stream.id) + 1, p_stream.first_position);
        when 'Position' then
            result := (p_place ->> 'position')::bigint;
            if result is null or result < 1 then
                raise exception 'start position % is not valid', coalesce(result::text, 'null') using errcode = 'MR004', hint = 'Positions begin with 1.';
            end if;
            return case when p_stream.parent_id is null then result else p_stream.first_position end;
        when 'Time' then
            since := (p_place ->> 'time')::timestamptz;
            if since is null then
                raise exception 'a start by time needs a time' using errcode = 'MR004', hint = 'Give the time of the first message to deliver.';
            end if;
            if current_setting('transaction_isolation') <> 'read committed' then
                raise exception 'a group can be placed by time only at isolation level read committed, not %', current_setting('transaction_isolation')
                    using errcode = 'MR003', hint = 'An older snapshot does not see every message since then.';
            end if;
            -- The horizon first: what is committed while we look may have lower positions than what we find.
            result := millrace_engine.horizon(p_stream.id) + 1;
            execute format('select least($2, min("position")) from millrace.%I where created_at >= $1', p_stream.name) into result using since, result;
            return greatest(result, p_stream.first_position);
        else
            raise exception 'a consumer group cannot start at %', coalesce(p_place ->> 'from', 'null') using errcode = 'MR004',
                hint = 'Use Earliest, Latest, Position or Time.';
    end case;
end $$;
comment on function millrace_engine.place(millrace_engine.stream, jsonb) is 'First position of a group that begins or is reset at a place.';

-- millrace_engine.same_place(place, place) returns boolean
-- Whether two places say the same; times are compared as times, however they are written.
create or replace function millrace_engine.same_place(a jsonb, b jsonb) returns boolean
language sql stable
return a ->> 'from' is not distinct from b ->> 'from'
    and (a ->> 'from' is distinct from 'Position' or (a ->> 'position')::bigint is not distinct from (b ->> 'position')::bigint)
    and (a ->> 'from' is distinct from 'Time' or (a ->> 'time')::timestamptz is not distinct from (b ->> 'time')::timestamptz);

-- millrace_engine.drop_group(stream, group) returns void
-- Removes the group with its deliveries and dead letters, in every priority lane. What it had not settled, and no other group's filter takes, goes to the
-- groups for unrouted messages first. Nothing happens when it does not exist. Rows left in the ledgers are
-- unreachable without their lane, and go with the next truncation.
-- Raises: MR004 when the stream is a priority lane.
create or replace function millrace_engine.drop_group(p_stream text, p_group text) returns void
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
    g integer;
    filter_ jsonb;
begin
    select x.* into s from millrace_engine.stream x where x.name = p_stream;
    perform millrace_engine.refuse_lane(s);
    perform from millrace_engine.stream x where x.id = s.id for no key update;
    select x.id, x.filter into g, filter_ from millrace_engine.consumer_group x where x.stream_id = s.id and x.name = p_group;
    if found then
        if filter_ is not null then
            perform millrace_engine.route_all(s.id);
        end if;
        -- Before the group's row, because receive refers to the row while it holds this lock.
        perform millrace_engine.hold_receives(g);
        if filter_ is not null then
            perform millrace_engine.hand_over(g, filter_, true);
        end if;
        delete from millrace_engine.consumer_group x where x.id = g;
    end if;
end $$;
comment on function millrace_engine.drop_group(text, text) is 'Removes a consumer group.';
