-- millrace_engine.position_at_template(time) returns bigint
-- Copied once per stream with the names filled in (install_functions.sql); see millrace.position_at.
-- Cost: a binary search over positions, two index probes per segment for each halving, and a look at the 1,000 messages before its result.
create or replace function millrace_engine.position_at_template(p_time timestamptz) returns bigint
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    c_stream constant integer := /* stream id */ 0;
    look_back constant integer := 1000;
    first_ bigint;
    low_   bigint;   -- messages below it were created before the time
    high_  bigint;   -- the result is at most what was found from here on
    mid    bigint;
    at_    record;
    result bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'position_at needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot would pass over messages. Call it in a READ COMMITTED transaction.';
    end if;
    if p_time is null then
        raise exception 'the time is missing' using errcode = 'MR004', hint = 'Pass a time; messages have that of their statement.';
    end if;
    select s.first_position into strict first_ from millrace_engine.stream s where s.id = c_stream;
    result := greatest(millrace_engine.horizon(c_stream) + 1, first_);
    low_ := first_;
    high_ := result;
    while low_ < high_ loop
        mid := low_ + (high_ - low_) / 2;
        select m."position", m.created_at into at_ from millrace.stream_template m
            where m."position" >= mid and m."position" < high_ order by m."position" limit 1;
        if not found then
            high_ := mid;
        elsif at_.created_at >= p_time then
            result := at_."position";
            high_ := mid;
        else
            low_ := at_."position" + 1;
        end if;
    end loop;
    -- Statements that run side by side are a little out of order: their positions and their times interleave.
    select coalesce(min(x."position") filter (where x.created_at >= p_time), result) into result
        from (select m."position", m.created_at from millrace.stream_template m
              where m."position" >= first_ and m."position" < result order by m."position" desc limit look_back) x;
    -- What was removed meanwhile cannot be read any more.
    select greatest(result, s.first_position) into strict result from millrace_engine.stream s where s.id = c_stream;
    return result;
end $$;

-- millrace.position_at(stream, time) returns bigint
-- The first position whose created_at is at or after the time; when there is none, the next one to be read. Reading by time is
-- millrace.read from there.
--
-- created_at is the time at which the publishing statement began, so it does not always grow with the position: a COPY of an hour gives
-- all its messages the time of its start. What holds whatever the order: the message at the result was created at or after the time, and
-- so was none of the 1,000 messages before the result. With D the longest that a publishing statement took, a message that was
-- created at time + D or later is never before the result. So whoever may miss nothing passes a time that is earlier by D.
-- Raises: MR002 no such stream; MR003 isolation level, or a standby; MR004 no time.
create or replace function millrace.position_at(p_stream text, p_time timestamptz) returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    execute format('select millrace_engine.position_at_%s($1)', millrace_engine.stream_id(p_stream)) into result using p_time;
    return result;
end $$;
comment on function millrace.position_at(text, timestamptz) is 'First position of a stream that was created at or after a time.';
