-- millrace_engine.due(delay in seconds, deliver at, serialize) returns timestamptz
-- When a message is due, null: at once.
-- Raises: MR004 both are given, they make no sense, or the message is to be serialized.
create or replace function millrace_engine.due(p_delay_seconds double precision, p_deliver_at timestamptz, p_serialize boolean) returns timestamptz
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    result timestamptz := p_deliver_at;
begin
    if p_delay_seconds is not null then
        if p_deliver_at is not null then
            raise exception 'a message has both a delay and a time' using errcode = 'MR004', hint = 'Pass p_delay_seconds or p_deliver_at.';
        end if;
        if not millrace_engine.is_duration(p_delay_seconds) then
            raise exception 'a message cannot be delayed by % seconds', p_delay_seconds using errcode = 'MR004',
                hint = 'Pass 0 or more, up to a hundred years, or null to publish at once.';
        end if;
        result := now_ + make_interval(secs => p_delay_seconds);
    elsif p_deliver_at = 'infinity' then
        raise exception 'a message for infinity would never be delivered' using errcode = 'MR004', hint = 'Pass a time, or null to publish at once.';
    end if;
    if p_serialize then
        raise exception 'a delayed message cannot be serialized: it gets its position when it is due' using errcode = 'MR004',
            hint = 'Publish it without p_serialize, or without a delay.';
    end if;
    return case when result > now_ then result end;
end $$;

-- millrace_engine.move_due(max) returns integer[]
-- Appends up to max delayed messages that are due to their streams, and returns the ids of the streams that got some; for a message with a priority the
-- id of the stream that was published to. Called often, by anybody: with nothing due it is one look into an index.
-- Order:  by due time, and among equals as they were published. One call at a time moves a stream's messages, so that their positions are in that order.
--         A message whose transaction commits after it was due comes after those that were moved meanwhile.
-- Repeat: taking a message out of the table and appending it are one transaction: it is moved exactly once, however many callers there are
--         and whenever one of them dies.
-- Locks:  per stream an advisory lock, by try, until the end of the transaction; rows that somebody else has locked are left for the next call.
-- Raises: what appending raised, when nothing could be moved. A stream that cannot be appended to keeps its messages, and never keeps those
--         of other streams waiting.
create or replace function millrace_engine.move_due(p_max integer) returns integer[]
language plpgsql volatile
set lock_timeout = '200ms'
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    passed integer[] := '{}';      -- streams that are busy or broken; others go on
    again boolean := true;
    moved integer[] := '{}';
    left_ integer := p_max;
    next_ record;
    s record;
    n integer;
    message text;
    code text;
begin
    while again and left_ > 0 loop
        again := false;
        for next_ in select d.stream_id, array_agg(d.id) as ids
                from (select x.id, x.stream_id, x.due_at from millrace_engine.delayed x where x.due_at <= now_ and x.stream_id <> all (passed)
                      order by x.due_at, x.id limit left_) d
                group by d.stream_id order by min(d.due_at), min(d.id) loop
            n := null;
            if pg_try_advisory_xact_lock(1836019572, next_.stream_id) then
                begin
                    select x.name, x.payload_type, coalesce(x.parent_id, x.id) as announced into s from millrace_engine.stream x where x.id = next_.stream_id;
                    continue when not found;   -- dropped a moment ago
                    execute format('with due as materialized (select d.id from millrace_engine.delayed d where d.id = any ($1) for update skip locked),
                            gone as (delete from millrace_engine.delayed d where d.id = any (array(select due.id from due)) returning d.*)
                        insert into millrace.%I (key, headers, payload) select gone.key, gone.headers, gone.%I from gone order by gone.due_at, gone.id',
                        s.name, case s.payload_type when 'JSON' then 'payload' else 'payload_bytes' end) using next_.ids;
                    get diagnostics n = row_count;
                exception when others then
                    get stacked diagnostics message = message_text, code = returned_sqlstate;
                end;
            end if;
            if n is null then
                -- Its messages took places among the oldest: look again without them.
                passed := passed || next_.stream_id;
                again := true;
            elsif n > 0 then
                left_ := left_ - n;
                if s.announced <> all (moved) then
                    moved := moved || s.announced;
                end if;
            end if;
        end loop;
    end loop;
    if code is not null and cardinality(moved) = 0 then
        raise exception '%', message using errcode = code;
    end if;
    return moved;
end $$;
comment on function millrace_engine.move_due(integer) is 'Appends delayed messages that are due to their streams.';
