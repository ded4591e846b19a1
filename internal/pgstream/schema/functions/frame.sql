-- Frames: what an agent or a job says while it works, in small pieces, under a key (an execution and its attempt, say). A stream with frames gives each
-- an id within its key, `<ms>-<number>`. Readers read a range of a key's frames, or tail it, by id (frame_read.sql).
--
-- The newest frame of a key carries what the next one must know: the id, the count, and the rate of best-effort frames. So no row is updated for a frame, and nothing
-- has to be counted. An id is kept as one number, ms << 20 | number: more than a million frames in a millisecond run on into the next.

-- millrace.append_frame(stream, key, payload, mode, frame_type, correlation_id, fields) returns (id, frame_count, summary_version, position)
-- Appends one frame to a key inside the caller's transaction.
--   mode   Durable         a message of the stream: consumer groups get it, retention bounds it.
--          DurableSummary  the same, and its payload is a merge patch to the key's rolling document (merge_patch.sql, millrace.read_summary).
--          BestEffortLive  for whoever looks now: not in the log, and gone after a crash. Of a key the newest K are kept, K = 2 * ceil(rate * ttl) between
--                          min_length and max_length of the stream's frames; the rate is an exponential moving average (live_frame.sql).
--   fields are stored beside the type and the correlation id in the message's headers: frame_id, frame_type, frame_mode, correlation_id.
-- frame_count is how many frames the key has had, of any mode, since retention last left nothing of it. position is null for BestEffortLive.
-- Order:  of one key, ids, positions and commits are in one order, whatever the mode: each id is greater than those before it, also when the clock steps
--         back. The lock comes before the clock.
-- Locks:  the key's advisory lock until the end of the transaction, before the position is allocated, so that who waits holds no reader back. It is that
--         of publish with p_serialize. Transactions that append to several keys should do it in the order of the keys, or two that cross end in a deadlock error for one.
-- Raises: MR002 no such stream; MR003 isolation level; MR004 a stream without frames, or a value that cannot be.
create or replace function millrace.append_frame(p_stream text, p_key text, p_payload jsonb, p_mode text default 'Durable', p_frame_type text default 'event',
    p_correlation_id text default null, p_fields jsonb default null,
    out id text, out frame_count bigint, out summary_version bigint, out "position" bigint)
language plpgsql volatile as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_frame(p_stream, 'JSON', pg_column_size(p_payload), p_key, p_mode, p_frame_type, p_fields);
    r text[];
begin
    execute 'select millrace_engine.append_frame_' || s.id || '($1, $2, $3, $4, $5, $6, $7, $8, $9)' into r
        using p_key, p_payload, p_payload, p_mode, p_frame_type, p_correlation_id, p_fields, s.frames, s.max_message_bytes;
    id := r[1]; frame_count := r[2]; summary_version := r[3]; "position" := r[4];
end $$;
comment on function millrace.append_frame(text, text, jsonb, text, text, text, jsonb) is 'Appends one frame to a key of a stream with frames.';

-- millrace.append_frame_bytes(stream, key, payload, mode, frame_type, correlation_id, fields) returns (id, frame_count, summary_version, position)
-- The same for streams with payload type Bytes. The payload of a DurableSummary is a patch in JSON, in UTF-8.
create or replace function millrace.append_frame_bytes(p_stream text, p_key text, p_payload bytea, p_mode text default 'Durable', p_frame_type text default 'event',
    p_correlation_id text default null, p_fields jsonb default null,
    out id text, out frame_count bigint, out summary_version bigint, out "position" bigint)
language plpgsql volatile as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_frame(p_stream, 'Bytes', octet_length(p_payload), p_key, p_mode, p_frame_type, p_fields);
    patch constant jsonb := case p_mode when 'DurableSummary' then millrace_engine.frame_patch(p_payload) end;
    r text[];
begin
    execute 'select millrace_engine.append_frame_' || s.id || '($1, $2, $3, $4, $5, $6, $7, $8, $9)' into r
        using p_key, p_payload, patch, p_mode, p_frame_type, p_correlation_id, p_fields, s.frames, s.max_message_bytes;
    id := r[1]; frame_count := r[2]; summary_version := r[3]; "position" := r[4];
end $$;
comment on function millrace.append_frame_bytes(text, text, bytea, text, text, text, jsonb) is 'Appends one frame of bytes to a key of a stream with frames.';

-- millrace_engine.check_frame(stream, payload type, size in bytes or null, key, mode, frame type, fields) returns the stream
create or replace function millrace_engine.check_frame(p_stream text, p_type text, p_size integer, p_key text, p_mode text, p_frame_type text, p_fields jsonb)
returns millrace_engine.stream
language plpgsql stable as $$
declare
    s constant millrace_engine.stream := millrace_engine.check_publish(p_stream, null, p_size, p_fields);
begin
    if s.frames is null then
        raise exception 'stream "%" has no frames', p_stream using errcode = 'MR004',
            hint = 'Declare them (frames: {} in the Stream, or millrace.create_stream with p_frames => ''{}''), or publish.';
    end if;
    if s.payload_type <> p_type then
        raise exception 'stream "%" has payloads of type %', p_stream, s.payload_type using errcode = 'MR004',
            hint = case s.payload_type when 'JSON' then 'Use millrace.append_frame.' else 'Use millrace.append_frame_bytes.' end;
    end if;
    if p_key is null or p_key = '' or octet_length(p_key) > 1024 then
        raise exception 'a frame needs a key of 1 to 1024 bytes' using errcode = 'MR004',
            hint = 'Pass what the frames belong to, such as the id of an execution and the number of its attempt: "run-7/1".';
    end if;
    if p_mode is null or p_mode not in ('Durable', 'DurableSummary', 'BestEffortLive') then
        raise exception 'mode % of a frame is not known', coalesce(quote_literal(p_mode), 'null') using errcode = 'MR004',
            hint = 'Use Durable, DurableSummary or BestEffortLive.';
    end if;
    if p_frame_type is null or p_frame_type = '' then
        raise exception 'a frame needs a type' using errcode = 'MR004', hint = 'Leave it out for event, or name one, such as stdout, token or progress.';
    end if;
    if p_fields ?| array['frame_id', 'frame_type', 'frame_mode', 'correlation_id'] then
        raise exception 'the fields of a frame cannot be named frame_id, frame_type, frame_mode or correlation_id' using errcode = 'MR004',
            hint = 'Pass type, mode and correlation id as arguments; the id is given.';
    end if;
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'a frame needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see the key''s newest frame. Append in a READ COMMITTED transaction.';
    end if;
    return s;
end $$;

-- millrace_engine.frame_patch(bytes) returns jsonb
-- Raises: MR004 they are no JSON in UTF-8.
create or replace function millrace_engine.frame_patch(p_payload bytea) returns jsonb
language plpgsql immutable as $$
begin
    return convert_from(p_payload, 'UTF8')::jsonb;
exception when others then
    raise exception 'the patch of a DurableSummary frame is not valid JSON: %', sqlerrm using errcode = 'MR004',
        hint = 'Pass a JSON Merge Patch (RFC 7396) in UTF-8, such as {"progress": 40}.';
end $$;

-- millrace_engine.append_frame_template(key, payload, patch, mode, frame type, correlation id, fields, settings, greatest size of a document)
-- returns text[]
-- Copied once per stream with frames (install_functions.sql). Returns id, frame_count, summary_version and position; as one value, because EXECUTE of a function that returns
-- columns is planned for twice as long.
-- The sequence high_<stream id> has the second of the highest id that was given. It is asked when nothing is left of a key: an id lower than one that retention has
-- removed could only be given if the clock stepped back, and then the second after it is used. (Within that second the clock is believed.)
create or replace function millrace_engine.append_frame_template(p_key text, p_payload anyelement, p_patch jsonb, p_mode text, p_frame_type text,
    p_correlation_id text, p_fields jsonb, p_frames jsonb, p_document_max integer)
returns text[]
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    now_     timestamptz;
    now_ms   bigint;
    high     bigint;
    newest   record;   -- what the key's newest frames say
    last     bigint;
    frame_   bigint;
    count_   bigint;
    id       text;
    headers_ jsonb;
    version_ bigint;
    position_ bigint;
    document jsonb;
    rate_    double precision := 0;
    burst_   integer := 1;
    elapsed  bigint;
begin
    if pg_advisory_xact_lock(-c_stream, hashtext(p_key)) is null then
        return null;   -- cannot be: a void is not null
    end if;
    -- Only now, under the lock, what others have committed, and the clock.
    select d.frame as durable, l.frame as live, l.live_count, l.rate, l.burst, greatest(d.frame_count, l.frame_count) as frame_count,
            exists (select from millrace_engine.frame_waiter w where w.stream_id = c_stream and w.key = p_key and w.until > clock_timestamp()) as waited
        into newest
        from (select) one
        left join lateral (select m.frame, m.frame_count from millrace.stream_template m
            where m.key = p_key and m.frame is not null order by m.frame desc limit 1) d on true
        left join lateral (select f.frame, f.frame_count, f.live_count, f.rate, f.burst from millrace_engine.live_frame f
            where f.stream_id = c_stream and f.key = p_key order by f.frame desc limit 1) l on true;
    now_ := millrace_engine.clock();
    now_ms := extract(epoch from now_) * 1000 - 0.5;   -- an assignment rounds
    last := greatest(newest.durable, newest.live);
    high := pg_sequence_last_value('millrace_engine.high_template');
    frame_ := greatest(case when last is null and now_ms / 1000 < high then (high + 1) * 1000 else now_ms end << 20, last + 1);
    if (frame_ >> 20) / 1000 > high then
        high := setval('millrace_engine.high_template', (frame_ >> 20) / 1000);
    end if;
    count_ := coalesce(newest.frame_count, 0) + 1;
    id := (frame_ >> 20) || '-' || (frame_ & 1048575);
    headers_ := coalesce(p_fields, '{}') || jsonb_strip_nulls(jsonb_build_object('frame_id', id, 'frame_type', p_frame_type, 'frame_mode', p_mode,
        'correlation_id', p_correlation_id));

    if p_mode = 'BestEffortLive' then
        if newest.live is not null then
            elapsed := (frame_ >> 20) - (newest.live >> 20);
            rate_ := millrace_engine.frame_rate(newest.rate, newest.burst, elapsed, (p_frames ->> 'alpha')::double precision);
            burst_ := case when elapsed > 0 then 1 else newest.burst + 1 end;
        end if;
        insert into millrace_engine.live_frame (stream_id, ring, bound, burst, frame, frame_count, live_count, rate, created_at, key, headers, payload, payload_bytes)
            select c_stream, pg_sequence_last_value('millrace_engine.live_frame_ring'), millrace_engine.frame_bound(rate_, p_frames), burst_, frame_, count_,
                coalesce(newest.live_count, 0) + 1, rate_, now_, p_key, headers_, /* json, bytes */ m.payload, null::bytea
            from (select p_payload as payload) m;
    else
        insert into millrace.stream_template (key, headers, payload, frame, frame_count) values (p_key, headers_, p_payload, frame_, count_)
            returning "position" into position_;
    end if;

    if p_mode = 'DurableSummary' then
        -- Locked, so that nobody removes it for its age meanwhile.
        select x.document, x.version + 1 into document, version_ from millrace_engine.frame_summary x
            where x.stream_id = c_stream and x.key = p_key for update;
        document := millrace.merge_patch(coalesce(document, '{}'), p_patch);
        if pg_column_size(document) > p_document_max then
            raise exception 'the summary of key "%" would have % bytes, more than the % allowed', p_key, pg_column_size(document), p_document_max
                using errcode = 'MR004', hint = 'Remove members by null, keep large things elsewhere, or raise maxMessageBytes.';
        end if;
        version_ := coalesce(version_, 1);
        insert into millrace_engine.frame_summary (stream_id, hour, version, first_at, last_at, key, document)
            values (c_stream, (frame_ >> 20) / 3600000, version_, to_timestamp((frame_ >> 20) / 1000.0), to_timestamp((frame_ >> 20) / 1000.0), p_key, document)
            on conflict on constraint frame_summary_pkey do update
                set hour = excluded.hour, version = excluded.version, last_at = excluded.last_at, document = excluded.document;
    end if;

    -- As the publish guard does it for consumers: once in a millisecond, and whoever was woken looks again after one, two, four.
    if newest.waited and last >> 20 is distinct from now_ms and current_setting('millrace.notify', true) is distinct from 'off' then
        perform pg_notify('millrace', millrace_engine.frame_topic(c_stream, p_key));
    end if;
    return array[id, count_::text, version_::text, position_::text];
end $$;
comment on function millrace_engine.append_frame_template(text, anyelement, jsonb, text, text, text, jsonb, jsonb, integer) is
    'Appends one frame to one stream. Called by millrace.append_frame.';

-- millrace_engine.frame_topic(stream id, key) returns text
-- The payload of the notifications for frames of a key, on the channel millrace.
create or replace function millrace_engine.frame_topic(p_stream integer, p_key text) returns text
language sql immutable
return p_stream || '/' || hashtextextended(p_key, 0);

-- millrace_engine.frame_settings(given) returns jsonb
-- The settings of a stream's frames with what was left out. They are FlowFabric's defaults, but that it names no ttl.
-- Raises: MR004.
create or replace function millrace_engine.frame_settings(p_frames jsonb) returns jsonb
language plpgsql immutable strict as $$
declare
    defaults constant jsonb := '{"ttl_seconds": 10, "min_length": 64, "max_length": 16384, "alpha": 0.2, "summary_ttl_seconds": 604800}';
    result jsonb;
    wrong text;
begin
    if jsonb_typeof(p_frames) <> 'object' then
        raise exception 'frames must be a JSON object, not %', jsonb_typeof(p_frames) using errcode = 'MR004', hint = 'Pass ''{}'' for the defaults: ' || defaults::text;
    end if;
    result := defaults || p_frames;
    select coalesce(min(m.key) filter (where not defaults ? m.key), min(m.key) filter (where jsonb_typeof(m.value) <> 'number')) into wrong from jsonb_each(result) m;
    if not defaults ? wrong then
        raise exception 'frames have no setting "%"', wrong using errcode = 'MR004', hint = 'The settings and their defaults are ' || defaults::text;
    elsif wrong is not null then
        raise exception 'the setting "%" of frames is a number, not %', wrong, result -> wrong using errcode = 'MR004',
            hint = 'The settings and their defaults are ' || defaults::text;
    end if;
    if (result ->> 'ttl_seconds')::numeric not between 0.001 and 86400 or (result ->> 'alpha')::numeric not between 0.001 and 1
            or (result ->> 'min_length')::numeric not between 1 and (result ->> 'max_length')::numeric or (result ->> 'max_length')::numeric > 1000000
            or (result ->> 'summary_ttl_seconds')::numeric not between 0 and 3153600000
            or trunc((result ->> 'min_length')::numeric) <> (result ->> 'min_length')::numeric
            or trunc((result ->> 'max_length')::numeric) <> (result ->> 'max_length')::numeric then
        raise exception 'frames cannot have the settings %', result using errcode = 'MR004',
            hint = 'ttl_seconds is 0.001 to 86400, alpha 0.001 to 1, min_length at least 1 and at most max_length, which is at most 1000000, and summary_ttl_seconds 0 (for ever) or more.';
    end if;
    return result;
end $$;
