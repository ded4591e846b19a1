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
