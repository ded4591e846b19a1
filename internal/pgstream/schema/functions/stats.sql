-- millrace.stats(stream) returns one row per consumer group of the stream; null: of every stream
-- Progress of every group in one call; its cost does not depend on the backlog: positions are subtracted, not rows counted, so lag is an
-- upper bound where transactions rolled back; it is zero when no message is left.
create or replace function millrace.stats(p_stream text default null)
returns table (stream text, "group" text, mode text, lag bigint, in_flight bigint, retrying bigint, dead_letters bigint,
    oldest_age interval, ack_floor bigint, members jsonb)
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics say of a table that was empty when they were made
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    look_ahead constant integer := 2000;   -- more than a lane reads without noting it
    s record;
    g record;
    l record;
    h bigint;
    open_low bigint;
    open_count bigint;
    safe bigint;
    reach bigint;
    look record;
    oldest timestamptz;
    left_ timestamptz;
begin
    for s in select x.id, x.name, x.partitions, x.first_position from millrace_engine.stream x
             where p_stream is null or x.name = p_stream order by x.name loop
        h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0);
        safe := null;
        for g in select x.id, x.name, x.mode from millrace_engine.consumer_group x where x.stream_id = s.id order by x.name loop
            stream := s.name;
            "group" := g.name;
            mode := g.mode;
            lag := 0;
            in_flight := 0;
            ack_floor := null;
            for l in select x.slot_low, x.slot_high, x.id, f.frontier, f.settled, f.floor, f.stragglers from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f
                     where x.group_id = g.id loop
                select min(o.low), coalesce(sum(o.messages), 0) into open_low, open_count from millrace_engine.open_claims(l.id, l.floor, l.stragglers) o;
                reach := greatest(l.frontier, s.first_position - 1);
                if reach < h and not pg_is_in_recovery() and current_setting('transaction_isolation') = 'read committed' then
                    -- A lane does not note at once that it has read past a hole or other lanes' messages: look where its next message is.
                    safe := coalesce(safe, millrace_engine.horizon(s.id));
                    execute format('select min(x."position") filter (where millrace_engine.slot(x.key, x."position") between %s and %s - 1
                            and not $3 @> x."position") - 1 as next, max(x."position") as last, count(*) as n
                        from (select m."position", m.key from millrace.%I m where m."position" > $1 and m."position" <= $2
                              order by m."position" limit %s) x', l.slot_low, l.slot_high, s.name, look_ahead)
                        into look using reach, safe, coalesce(l.settled, '{}');
                    reach := greatest(reach, coalesce(look.next, case when look.n < look_ahead then safe else look.last end));
                end if;
                lag := lag + ceil(greatest(h - reach, 0) * (l.slot_high - l.slot_low) / 1024.0)::bigint;
                in_flight := in_flight + greatest(open_count, 0);
                ack_floor := least(ack_floor, coalesce(open_low, reach));
            end loop;
            select count(*), min(d.created_at) into retrying, oldest from millrace_engine.delivery d where d.group_id = g.id;
            select count(*) into dead_letters from millrace_engine.dead_letter d where d.group_id = g.id;
            oldest_age := null;
            if lag + in_flight > 0 then
                execute format('select (select m.created_at from millrace.%I m where m."position" > $1 order by m."position" limit 1)', s.name)
                    into left_ using ack_floor;
                oldest := least(oldest, left_);
                if left_ is null then
                    lag := 0; -- those positions rolled back, and nothing may come for a long time to move the frontier past them
                end if;
            end if;
            oldest_age := greatest(millrace_engine.clock() - oldest, interval '0');
            select coalesce(jsonb_agg(jsonb_build_object('name', m.name, 'expires_at', m.expires_at, 'partitions',
                    (select coalesce(jsonb_agg(p order by p), '[]') from generate_series(0, s.partitions - 1) p
                     where exists (select from millrace_engine.lane x where x.group_id = g.id and x.member = m.name
                         and x.slot_low < (p + 1) * 1024 / s.partitions and x.slot_high > p * 1024 / s.partitions))) order by m.joined), '[]')
                into members from millrace_engine.member m where m.group_id = g.id and m.expires_at > millrace_engine.clock();
            return next;
        end loop;
    end loop;
end $$;
comment on function millrace.stats(text) is 'Lag, messages in flight, retries, dead letters and members of every consumer group.';
