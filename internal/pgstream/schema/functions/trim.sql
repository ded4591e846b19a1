-- millrace.trim(stream, before, max_messages, max_age_seconds, exact) returns bigint
-- Removes messages from the old end of a stream, whatever its retention policy and its groups: those before a position, all but the newest
-- max_messages, those older than an age, or what any of them says when several are given. Returns the first position that is left.
-- exact:       the mark moves at once to where it was asked for, and every reader honours it; the disk is freed by whole segments, at once
--              where nobody is reading them, otherwise by maintenance.
-- approximate: the mark moves only as far as whole segments can be freed, so more may be left than was asked for, and never less.
-- Never beyond the horizon: what an open transaction has published stays. Messages that were handed out already can still be settled, and
-- retries and dead letters keep their copies.
-- A stream with priorities is trimmed by number and age in each priority; a position is one of the stream itself.
-- Locks:  the stream's row, its groups' rows; each segment that is freed, until the end of the transaction, so the call stands in one of its own.
-- Cost:   by number, a scan of the index over the messages that stay.
-- Raises: 42501 need_owner; MR002 no such stream; MR003 isolation level, or a standby; MR004 bad argument; 55P03 when a transaction keeps a group's row locked for ten
--         seconds: call it again.
create or replace function millrace.trim(p_stream text, p_before bigint default null, p_max_messages bigint default null,
    p_max_age_seconds double precision default null, p_exact boolean default true) returns bigint
language plpgsql volatile
set lock_timeout = '10s'
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    stream constant integer := millrace_engine.stream_id(p_stream);
    child record;
    top bigint;
    mark bigint;
    by_number bigint;
    by_age bigint;
begin
    perform millrace_engine.need_owner();
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'trim needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that it would remove.';
    end if;
    if coalesce(p_before, p_max_messages) is null and p_max_age_seconds is null then
        raise exception 'nothing says what to trim' using errcode = 'MR004', hint = 'Pass p_before, p_max_messages or p_max_age_seconds.';
    end if;
    if p_before < 1 or p_max_messages < 0 or p_max_age_seconds < 0 or p_max_age_seconds > 1e10 or p_max_age_seconds = 'NaN' then
        raise exception 'a limit for the trim is out of range' using errcode = 'MR004',
            hint = 'Positions begin with 1; a number of messages and an age in seconds are not negative.';
    end if;
    if (select x.has_tenants from millrace_engine.stream x where x.id = stream) then
        raise exception 'stream "%" has tenants, and is not trimmed as a whole', p_stream using errcode = 'MR004', hint = 'millrace.drop_tenant removes one with all its messages.';
    end if;
    perform 1 from millrace_engine.stream x where x.id = stream and x.priorities > 1 for no key update;   -- the parent before its priorities, as everybody does
    for child in select x.name from millrace_engine.stream x where x.parent_id = stream and coalesce(p_max_messages, p_max_age_seconds) is not null loop
        perform millrace.trim(child.name, null, p_max_messages, p_max_age_seconds, p_exact);
    end loop;
    top := millrace_engine.horizon(stream);
    if p_max_messages = 0 then
        by_number := top + 1;
    elsif p_max_messages is not null then
        execute format('select m."position" from millrace.%I m where m."position" <= $1 order by m."position" desc offset $2 limit 1', p_stream)
            into by_number using top, p_max_messages - 1;
    end if;
    if p_max_age_seconds is not null then
        by_age := millrace.position_at(p_stream, clock_timestamp() - make_interval(secs => p_max_age_seconds));
    end if;
    mark := greatest(p_before, by_number, by_age, 1);   -- null is left out
    mark := least(mark, top + 1);
    perform 1 from millrace_engine.stream x where x.id = stream for no key update;   -- also where no mark moves: segments are freed
    if not coalesce(p_exact, true) then
        select max(g.high) + 1 into mark from millrace_engine.segments(stream) g where g.high < mark and g.number <> millrace_engine.segment(stream);
    end if;
    update millrace_engine.stream x set first_position = mark where x.id = stream and x.first_position < mark;
    update millrace_engine.consumer_group x set first_position = mark where x.stream_id = stream and x.first_position < mark;   -- where receive looks
    perform millrace_engine.free_segments(stream);
    select x.first_position into strict mark from millrace_engine.stream x where x.id = stream;
    return mark;
end $$;
comment on function millrace.trim(text, bigint, bigint, double precision, boolean) is 'Removes the oldest messages of a stream.';

-- millrace_engine.segments(stream id) returns table (number, low, high)
-- The segments that have messages, with the positions between which they are: two index probes each. By way of the stream's table, which the runtime role may
-- read, too: nobody grants it the segments of a stream that is made after it.
create or replace function millrace_engine.segments(p_stream integer) returns table (number integer, low bigint, high bigint)
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    log text;
begin
    for log, number in select s.name, generate_series(0, s.segments - 1) from millrace_engine.stream s where s.id = p_stream loop
        execute format('select (select m."position" from millrace.%1$I m where m.segment = %2$s order by m."position" limit 1),
            (select m."position" from millrace.%1$I m where m.segment = %2$s order by m."position" desc limit 1)', log, number) into low, high;
        if high is not null then
            return next;
        end if;
    end loop;
end $$;

-- millrace_engine.free_segments(stream id) returns integer
-- Truncates the segments that are wholly below the trim mark, but for those that somebody is reading: they are left to maintenance. The
-- one that is being written is left once the ring has moved on. Returns how many were truncated. The caller holds the stream's row.
create or replace function millrace_engine.free_segments(p_stream integer) returns integer
language plpgsql volatile
set lock_timeout = '50ms'
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    s millrace_engine.stream;
    current_ integer := millrace_engine.segment(p_stream);
    freed integer := 0;
    seg record;
    below boolean;
begin
    select * into strict s from millrace_engine.stream x where x.id = p_stream;
    -- The current one last: by then another may be free to be written to.
    for seg in select g.number from millrace_engine.segments(p_stream) g where g.high < s.first_position order by g.number = current_, g.number loop
        if seg.number = current_ and not millrace_engine.next_segment(s, current_) then
            continue;
        end if;
        begin
            execute format('lock table millrace_engine.segment_%s_%s in access exclusive mode', p_stream, seg.number);
            -- Looked at again in a new statement: a publisher may have come between.
            execute format('select not exists (select from millrace_engine.segment_%s_%s m where m."position" >= $1)', p_stream, seg.number)
                into below using s.first_position;
            if below then
                execute format('truncate millrace_engine.segment_%s_%s', p_stream, seg.number);
                freed := freed + 1;
            end if;
        exception when lock_not_available or deadlock_detected then
            null;   -- maintenance will have it
        end;
    end loop;
    return freed;
end $$;

-- millrace_engine.next_segment(stream, current segment) returns boolean
-- Moves the ring on when its next segment is empty. True when it moved. The caller holds the stream's row.
create or replace function millrace_engine.next_segment(s millrace_engine.stream, p_current integer) returns boolean
language plpgsql volatile as $$
declare
    next_ integer := (p_current + 1) % s.segments;
    used boolean;
begin
    execute format('select exists (select from millrace_engine.segment_%s_%s)', s.id, next_) into used;
    if used then
        return false;
    end if;
    perform millrace_engine.set_state(s.id, next_, null);
    update millrace_engine.stream x set segment_started_at = clock_timestamp() where x.id = s.id;
    return true;
end $$;
