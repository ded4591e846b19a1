-- millrace.stream_stats(stream) returns one row per stream; null: of every stream
-- What a stream holds and how it fares; the cost does not depend on how much that is. The priorities of a stream are counted together; positions
-- and horizon are those of the lowest.
-- messages:             last - first + 1, so an upper bound: positions that rolled back, and messages of open transactions, count.
-- stalled_for, _by:     the open transaction that holds the horizon back, 'pid 123' or 'prepared transaction <gid>', and how long that
--                       may have lasted: since it began, or since the newest message that it lets through, whichever is later. Null when there is none.
--                       Where the caller may not see when it began (another role's session, without pg_read_all_stats), it is how long the oldest message that
--                       others committed behind it has been kept back: 0 while there is none. A stream that was quiet for hours would look stalled for hours otherwise.
-- published_per_second: positions from the first of the last minute on (millrace.position_at), divided by sixty.
-- delayed:              messages that wait for their time to be delivered.
-- segments_used:        when it equals segments, nothing can be rotated: retention keeps the ring full.
-- Under another isolation level than READ COMMITTED, and on a standby, published_per_second is null, and on a standby the horizon is, too.
create or replace function millrace.stream_stats(p_stream text default null)
returns table (stream text, messages bigint, first_position bigint, last_position bigint, horizon bigint, bytes bigint, stalled_for interval,
    stalled_by text, published_per_second double precision, delayed bigint, segments integer, segments_used integer)
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    can_look constant boolean := not pg_is_in_recovery() and current_setting('transaction_isolation') = 'read committed';
    now_ constant timestamptz := clock_timestamp();
    s record;
    newest timestamptz;
    edge timestamptz;
    held interval;
    from_ bigint;
begin
    for s in select coalesce(x.parent_id, x.id) as whole, x.*, h.last, h.horizon, l.holder, l.since, z.bytes, z.used,
                    row_number() over w as n, count(*) over (partition by coalesce(x.parent_id, x.id)) as parts
             from millrace_engine.horizons(array(select y.id from millrace_engine.stream y left join millrace_engine.stream p on p.id = y.parent_id
                 where p_stream is null or y.name = p_stream or p.name = p_stream)) h
             join millrace_engine.stream x on x.id = h.stream_id
             left join millrace_engine.horizon_holders() l on l.stream_id = x.id
             cross join lateral (select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint as bytes,
                     (count(c.number) filter (where pg_relation_size(c.oid) > 0))::integer as used
                 from (select k as number, to_regclass(format('millrace_engine.segment_%s_%s', x.id, k)) as oid from generate_series(0, x.segments - 1) k
                       union all select null, to_regclass(format('millrace.%I', x.name || '.' || t.name)) from millrace_engine.tenant t where t.stream_id = x.id) c
                 where c.oid is not null) z
             where p_stream is null or p_stream not like '%.%'
             window w as (partition by coalesce(x.parent_id, x.id) order by x.priority)
             order by coalesce((select p.name from millrace_engine.stream p where p.id = x.parent_id), x.name), x.priority loop
        if s.n = 1 then
            stream := s.name;
            first_position := s.first_position;
            last_position := s.last;
            horizon := s.horizon;
            segments := s.segments;
            segments_used := s.used;
            messages := 0;
            bytes := 0;
            delayed := 0;
            published_per_second := case when can_look then 0 end;
            stalled_for := null;
            stalled_by := null;
        end if;
        messages := messages + greatest(s.last - s.first_position + 1, 0);
        bytes := bytes + s.bytes;
        delayed := delayed + (select count(*) from millrace_engine.delayed d where d.stream_id = s.id);
        newest := null;
        edge := null;
        if s.last >= s.first_position and (can_look or s.holder is not null) then
            execute format('select (select m.created_at from millrace.%1$I m order by m."position" desc limit 1),
                case when $2 then (select m.created_at from millrace.%1$I m where m."position" <= $1 order by m."position" desc limit 1)
                     when not $2 then (select m.created_at from millrace.%1$I m where m."position" > $1 order by m."position" limit 1) end', s.name)
                into newest, edge using s.horizon, case when s.holder is not null then s.since is not null end;
        end if;
        if can_look and newest > now_ - interval '1 minute' then
            execute format('select millrace_engine.position_at_%s($1)', s.id) into from_ using now_ - interval '1 minute';
            published_per_second := published_per_second + greatest(s.last - from_ + 1, 0) / 60.0;
        end if;
        if s.holder is not null then
            held := coalesce(greatest(now_ - greatest(s.since, edge), interval '0'), interval '0');
            if stalled_by is null or held > stalled_for then
                stalled_by := s.holder;
                stalled_for := held;
            end if;
        end if;
        if s.n = s.parts then
            return next;
        end if;
    end loop;
end $$;
comment on function millrace.stream_stats(text) is 'Size, positions, publishing rate and what holds the horizon back, of every stream.';
