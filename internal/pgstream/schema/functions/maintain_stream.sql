-- millrace_engine.maintain_stream(stream id) returns text[]
-- One round of rotation, lapsing and retention for a stream; returns what it did. Publishing and consuming never wait for it and never need it.
-- What is below the trim mark goes whatever the policy; under Interest and WorkQueue a group that has lapsed keeps nothing (lapse.sql).
-- Locks:  the stream's row, so that no group begins at what is removed meanwhile; share on a segment that it looks at, which only those who publish to an
-- old segment notice, and access exclusive for a moment when it is removed.
-- A segment that somebody is busy with is left to a later round.
-- Raises: MR003 isolation level; 55P03 when the stream's row is busy: call it again later.
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
    freed integer;
    used boolean;
    top record;
    newest bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'maintenance needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot does not see all that a TRUNCATE would remove.';
    end if;
    -- Also taken by whoever creates or resets a group, so that a group cannot begin at what is removed meanwhile.
    select * into s from millrace_engine.stream x where x.id = p_stream for no key update;
    if not found then
        return did;
    end if;
    current_ := millrace_engine.segment(p_stream);

    -- Rotation. A segment covers a share of what the limits keep, so that removing one is a small step.
    bytes := pg_relation_size(format('millrace_engine.segment_%s_%s', p_stream, current_)::regclass);
    if bytes > 0 and (bytes > coalesce(nullif(s.max_bytes, 0) / s.segments, 1073741824)
            or (s.max_age_seconds > 0 and clock_timestamp() > s.segment_started_at + make_interval(secs => s.max_age_seconds / (s.segments - 1.0)))
            or (s.max_messages > 0 and millrace_engine.segment_span(p_stream, current_) > s.max_messages / s.segments)
            or (s.retention_policy <> 'Limits' and bytes > 67108864)) then
        if millrace_engine.next_segment(s, current_) then
            current_ := millrace_engine.segment(p_stream);
            did := did || format('rotated to segment %s', current_ + 1);
        end if;
    end if;

    did := did || millrace_engine.lapse_groups(p_stream);

    freed := millrace_engine.free_segments(p_stream);
    if freed > 0 then
        current_ := millrace_engine.segment(p_stream);
        did := did || format('truncated %s segments below the trim mark', freed);
    end if;

    -- What every group has settled. Groups hold messages back under Interest and WorkQueue only, until they lapse.
    if s.retention_policy <> 'Limits' then
        select min(t.ack_floor) into keep_from from millrace_engine.progress(array[p_stream]) t
            join millrace_engine.consumer_group g on g.id = t.group_id where g.lapsed_at is null;
        if s.retention_policy = 'WorkQueue' and not exists (select from millrace_engine.consumer_group g where g.stream_id = p_stream) then
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
        top := millrace_engine.newest(p_stream, next_, false);
        if not millrace_engine.removable(s, top."position", top.created_at, keep_from, newest, bytes) then
            exit;   -- segments after it are younger
        end if;
        begin
            -- Nobody publishes there from here on. Finding the youngest message may take long, and readers do not notice.
            execute format('lock table millrace_engine.segment_%s_%s in share mode', p_stream, next_);
            top := millrace_engine.newest(p_stream, next_, s.max_age_seconds > 0);
            if not millrace_engine.removable(s, top."position", top.created_at, keep_from, newest, bytes) then
                exit;
            end if;
            execute format('lock table millrace_engine.segment_%s_%s in access exclusive mode', p_stream, next_);
        exception when lock_not_available or deadlock_detected then
            exit;   -- somebody publishes or reads there: a later round has it, and what this one did before stays
        end;
        execute format('truncate millrace_engine.segment_%s_%s', p_stream, next_);
        update millrace_engine.stream x set first_position = greatest(x.first_position, top."position" + 1) where x.id = p_stream;
        -- Receive looks at the group's row. One that a transaction holds is passed over: what is truncated is out of its reach anyway.
        update millrace_engine.consumer_group x set first_position = top."position" + 1
            where x.id in (select y.id from millrace_engine.consumer_group y where y.stream_id = p_stream and y.first_position <= top."position"
                for no key update skip locked);
        did := did || format('truncated segment %s up to position %s', next_ + 1, top."position");
        exit;   -- one segment per round: locks stay short
    end loop;
    return did;
end $$;
comment on function millrace_engine.maintain_stream(integer) is 'One round of segment rotation and retention.';

-- millrace_engine.newest(stream id, segment, youngest) returns record
-- The highest position in a segment, and when that message was created; or the youngest one, which may be another and is only found by reading all.
create or replace function millrace_engine.newest(p_stream integer, p_segment integer, p_youngest boolean,
    out "position" bigint, out created_at timestamptz)
language plpgsql volatile as $$
begin
    execute format('select m."position", m.created_at from millrace_engine.segment_%s_%s m order by m."position" desc limit 1', p_stream, p_segment)
        into "position", created_at;
    if p_youngest then
        execute format('select max(m.created_at) from millrace_engine.segment_%s_%s m', p_stream, p_segment) into created_at;
    end if;
end $$;

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
