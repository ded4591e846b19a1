-- Readers of frames name places within a key's frames by cursors: '-' before the first, '+' behind the last, '<ms>-<number>' an id, '<ms>' a millisecond.
-- A frame is seen when its transaction has committed, and of one key ids and commits are in one order: a reader that goes on behind the last id it saw
-- misses none. Whoever wants to know of frames that were removed in between compares frame_count.

-- millrace_engine.frame_cursor(cursor, upper) returns bigint
-- The id that a cursor stands for, as a bound of a range that includes it. A millisecond is, as an upper bound, the whole of it.
-- Raises: MR004 it is no cursor.
create or replace function millrace_engine.frame_cursor(p_cursor text, p_upper boolean) returns bigint
language plpgsql immutable as $$
declare
    part constant text[] := regexp_match(p_cursor, '^([0-9]{1,16})(?:-([0-9]{1,16}))?$');
begin
    if p_cursor = '-' then
        return 0;
    elsif p_cursor = '+' then
        return 9223372036854775807;
    elsif part is null or part[1]::bigint > 8796093022207 or part[2]::bigint > 1048575 then
        raise exception '% is no cursor of frames', coalesce(quote_literal(p_cursor), 'null') using errcode = 'MR004',
            hint = 'Use ''-'' for the start, ''+'' for the end, the id of a frame such as 1767225600000-0, or milliseconds such as 1767225600000.';
    end if;
    return (part[1]::bigint << 20) + coalesce(part[2]::bigint, case when p_upper then 1048575 else 0 end);
end $$;

-- millrace.read_frames(stream, key, from, to, max, best_effort) returns frames
-- The frames of a key from one cursor to another, both included, at most max of them, the oldest first. It sees what any query of the transaction sees, its own
-- appends too. best_effort => false leaves the best-effort frames out, and is what a standby can answer.
-- Order:  by id.
-- Cost:   an index scan per segment and ring.
-- Raises: MR002 no such stream; MR004 a stream without frames, or a bad argument.
create or replace function millrace.read_frames(p_stream text, p_key text, p_from text default '-', p_to text default '+', p_max integer default 1000,
    p_best_effort boolean default true)
returns table (id text, mode text, frame_type text, correlation_id text, fields jsonb, payload jsonb, payload_bytes bytea, frame_count bigint,
    "position" bigint, created_at timestamptz)
language plpgsql volatile as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_frame_read(p_stream, p_key, p_max);
begin
    return query execute 'select * from millrace_engine.read_frames_' || s.id || '($1, $2, $3, $4, $5, $6)'
        using p_key, millrace_engine.frame_cursor(p_from, false), millrace_engine.frame_cursor(p_to, true), p_max, p_best_effort, s.first_position;
end $$;
comment on function millrace.read_frames(text, text, text, text, integer, boolean) is 'Reads a range of the frames of a key.';

-- millrace.tail_frames(stream, key, after, max, best_effort) returns frames
-- The next frames of a key behind a cursor, at most max of them, the oldest first; none when there are none yet. after is the id of the last frame that was seen, or
-- '0' for all. To wait for more: LISTEN millrace; then millrace.wait_for_frames; then this function; then wait for a notification. There is one in a millisecond at most,
-- so look again one, two and four milliseconds after it; and once in a while without any, as whoever appended before you asked announces nothing.
-- Order, cost, raises: as read_frames; '-' and '+' are no places to go on from.
create or replace function millrace.tail_frames(p_stream text, p_key text, p_after text, p_max integer default 1000, p_best_effort boolean default true)
returns table (id text, mode text, frame_type text, correlation_id text, fields jsonb, payload jsonb, payload_bytes bytea, frame_count bigint,
    "position" bigint, created_at timestamptz)
language plpgsql volatile as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_frame_read(p_stream, p_key, p_max);
begin
    if p_after in ('-', '+') then
        raise exception 'a tail begins behind a frame, not at %', quote_literal(p_after) using errcode = 'MR004',
            hint = 'Pass the id of the last frame that was seen, such as 1767225600000-0, or ''0'' for all there are.';
    end if;
    return query execute 'select * from millrace_engine.read_frames_' || s.id || '($1, $2, $3, $4, $5, $6)'
        using p_key, millrace_engine.frame_cursor(p_after, false) + 1, 9223372036854775807, p_max, p_best_effort, s.first_position;
end $$;
comment on function millrace.tail_frames(text, text, text, integer, boolean) is 'Reads the frames of a key behind a cursor.';

-- millrace_engine.check_frame_read(stream, key, max) returns the stream
create or replace function millrace_engine.check_frame_read(p_stream text, p_key text, p_max integer) returns millrace_engine.stream
language plpgsql stable as $$
declare
    s millrace_engine.stream;
begin
    select x.* into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    if s.frames is null then
        raise exception 'stream "%" has no frames', p_stream using errcode = 'MR004', hint = 'Read it by position: millrace.read.';
    end if;
    if p_key is null then
        raise exception 'frames are read by key' using errcode = 'MR004', hint = 'Pass the key that they were appended to.';
    end if;
    if p_max is null or p_max not between 1 and 10000 then
        raise exception 'cannot read % frames', coalesce(p_max::text, 'null') using errcode = 'MR004', hint = 'Ask for 1 to 10000, and go on behind the last.';
    end if;
    return s;
end $$;

-- millrace_engine.read_frames_template(key, from, to, max, best effort, first position) returns frames
-- Copied once per stream with frames (install_functions.sql). Sorting is forbidden, and each half has a limit of its own, or all frames
-- of the key were read and sorted for each read, after a plan made when there were few. What is left to sort are the halves.
create or replace function millrace_engine.read_frames_template(p_key text, p_from bigint, p_to bigint, p_max integer, p_best_effort boolean, p_first bigint)
returns table (id text, mode text, frame_type text, correlation_id text, fields jsonb, payload jsonb, payload_bytes bytea, frame_count bigint,
    "position" bigint, created_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    beyond   bigint;   -- best-effort frames up to this one are beyond the bound
begin
    if p_best_effort then
        select f.live_count - f.bound into beyond from millrace_engine.live_frame f where f.stream_id = c_stream and f.key = p_key order by f.frame desc limit 1;
    end if;
    if beyond is null then
        return query
            select (m.frame >> 20) || '-' || (m.frame & 1048575), m.headers ->> 'frame_mode', m.headers ->> 'frame_type', m.headers ->> 'correlation_id',
                m.headers - '{frame_id,frame_type,frame_mode,correlation_id}'::text[], /* json, bytes */ m.payload, null::bytea, m.frame_count, m."position",
                m.created_at
            from millrace.stream_template m
            where m.key = p_key and m.frame >= p_from and m.frame <= p_to and m."position" >= p_first order by m.frame limit p_max;
        return;
    end if;
    return query
        select (x.frame >> 20) || '-' || (x.frame & 1048575), x.headers ->> 'frame_mode', x.headers ->> 'frame_type', x.headers ->> 'correlation_id',
            x.headers - '{frame_id,frame_type,frame_mode,correlation_id}'::text[], x.payload, x.payload_bytes, x.frame_count, x."position", x.created_at
        from (
            (select m.frame, m.headers, /* json, bytes */ m.payload, null::bytea, m.frame_count, m."position", m.created_at
                from millrace.stream_template m
                where m.key = p_key and m.frame >= p_from and m.frame <= p_to and m."position" >= p_first order by m.frame limit p_max)
            union all
            (select f.frame, f.headers, f.payload, f.payload_bytes, f.frame_count, null::bigint, f.created_at
                from millrace_engine.live_frame f
                where f.stream_id = c_stream and f.key = p_key and f.frame >= p_from and f.frame <= p_to and f.live_count > beyond order by f.frame limit p_max)) x (frame, headers, payload, payload_bytes, frame_count, "position", created_at)
        order by x.frame limit p_max;
end $$;
comment on function millrace_engine.read_frames_template(text, bigint, bigint, integer, boolean, bigint) is 'Reads frames of one stream. Called by millrace.read_frames.';

-- millrace.wait_for_frames(stream, key) returns text
-- Asks whoever appends frames to the key to notify for the next ten seconds, and returns the payload that these notifications have, on the channel millrace.
-- Call it again before the time is over, and look for frames after it: those that were appended before it has committed are not announced.
-- Cost:   a look at one row; it is written at most every five seconds.
-- Raises: MR002 no such stream; MR004 no key, or one that is too long for frames.
create or replace function millrace.wait_for_frames(p_stream text, p_key text) returns text
language plpgsql volatile as $$
declare
    stream constant integer := millrace_engine.stream_id(p_stream);
begin
    if (octet_length(p_key) between 1 and 1024) is not true then
        raise exception 'frames have a key of 1 to 1024 bytes' using errcode = 'MR004', hint = 'Pass the key that they are appended to.';
    end if;
    if not exists (select from millrace_engine.frame_waiter w where w.stream_id = stream and w.key = p_key and w.until > clock_timestamp() + interval '5 seconds') then
        insert into millrace_engine.frame_waiter as w (stream_id, key, until) values (stream, p_key, clock_timestamp() + interval '10 seconds')
            on conflict on constraint frame_waiter_pkey do update set until = excluded.until where w.until < excluded.until;
    end if;
    return millrace_engine.frame_topic(stream, p_key);
end $$;
comment on function millrace.wait_for_frames(text, text) is 'Asks for notifications of a key''s frames for ten seconds, and returns their payload.';

-- millrace.read_summary(stream, key) returns (document, version, patch_kind, first_at, last_at)
-- The rolling document of a key, how many patches have made it, and when the first and the last of them came. No row when there is none.
-- Raises: MR002 no such stream; MR004 a stream without frames.
create or replace function millrace.read_summary(p_stream text, p_key text)
returns table (document jsonb, version bigint, patch_kind text, first_at timestamptz, last_at timestamptz)
language plpgsql stable as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_frame_read(p_stream, p_key, 1);
begin
    return query select x.document, x.version, 'json-merge-patch', x.first_at, x.last_at
        from millrace_engine.frame_summary x where x.stream_id = s.id and x.key = p_key;
end $$;
comment on function millrace.read_summary(text, text) is 'Reads the rolling document of a key of a stream with frames.';
