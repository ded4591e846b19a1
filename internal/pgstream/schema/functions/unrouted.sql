-- Unrouted messages. A group with the filter {"unrouted": true} takes what no other group's filter of the same stream takes: what RabbitMQ sends to an alternate
-- exchange. Groups without a filter take everything and are no routes.
-- Each message is judged once, when it is enqueued (enqueue.sql): at the next receive or round of maintenance, by the filters that there are then. Then it is a row
-- of the delivery table, and stays one until somebody settles it, whatever becomes of filters and of the log. So that nothing falls between:
--   * before a route is made, changed or dropped, everything that can be read is judged by those that there were (route_all);
--   * what a dropped route, or one with a new filter, has not settled, and nobody takes any more, is handed over (hand_over).
-- A new route that begins at Earliest gets old messages besides, also those that were found unrouted before it was there.

-- millrace_engine.routes(stream id, group to leave out) returns jsonb[]
-- The filters of the stream's groups.
create or replace function millrace_engine.routes(p_stream integer, p_but integer) returns jsonb[]
language plpgsql stable as $$
begin
    return array(select x.filter from millrace_engine.consumer_group x
        where x.stream_id = p_stream and x.filter is not null and not x.filter ? 'unrouted' and x.id is distinct from p_but);
end $$;

-- millrace_engine.route_all(stream id) returns void
-- Judges every message that can be read, in every priority lane, for the groups that are for unrouted ones.
-- Locks: their receive locks.
create or replace function millrace_engine.route_all(p_stream integer) returns void
language plpgsql volatile as $$
declare
    u record;
begin
    for u in select x.id from millrace_engine.consumer_group x join millrace_engine.stream s on s.id = x.stream_id
             where (s.id = p_stream or s.parent_id = p_stream) and x.filter ? 'unrouted' order by x.name, s.priority desc loop
        perform pg_advisory_xact_lock(536870912 + u.id, 0);
        while millrace_engine.enqueue(u.id, 0) loop
        end loop;
    end loop;
end $$;

-- millrace_engine.hand_over(group, its former filter, dropped) returns void
-- Gives the groups for unrouted messages what the group took by its former filter and has not settled, and what no filter takes any more: all that it has not been
-- given, and what members hold, for nobody knows what becomes of that. Nothing from below the trim mark, though it may still be there. What they have as a dead
-- letter, from before there was the route, stays one. Retries go along when the group is dropped, and stay with it otherwise.
-- After route_all, in the same transaction; the group's row has its new filter.
create or replace function millrace_engine.hand_over(p_group integer, p_filter jsonb, p_dropped boolean) returns void
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
declare
    part record;
    u record;
    routes jsonb[];
    lows bigint[];
    highs bigint[];
    slots_from integer[];
    slots_to integer[];
    settled_ int8multirange[];
begin
    if p_filter is null or p_filter ? 'unrouted' then
        return;
    end if;
    for part in select g.id, g.stream_id, s.name, s.first_position, case s.payload_type when 'JSON' then 'm.payload, null::bytea' else 'null::jsonb, m.payload' end as payload
                from millrace_engine.consumer_group g join millrace_engine.stream s on s.id = g.stream_id where g.id = p_group or g.parent_id = p_group loop
        routes := millrace_engine.routes(part.stream_id, case when p_dropped then part.id end);
        for u in select g.id, g.filter, c.frontier from millrace_engine.consumer_group g
                 cross join lateral (select x.frontier from millrace_engine.claim x where x.lane_id = g.lane_id order by x.claim desc limit 1) c
                 where g.stream_id = part.stream_id and g.filter ? 'unrouted' loop
            with lane as materialized (
                select l.id, l.slot_low, l.slot_high, c.frontier, c.floor, c.stragglers, coalesce(c.settled, '{}') as settled
                from millrace_engine.lane l
                cross join lateral (select x.* from millrace_engine.claim x where x.lane_id = l.id order by x.claim desc limit 1) c
                where l.group_id = part.id
            ), unsettled as (
                select l.slot_low, l.slot_high, l.frontier as low, u.frontier as high, l.settled from lane l
                union all
                select l.slot_low, l.slot_high, o.low, least(o.high, u.frontier), coalesce(o.settled, '{}')
                from lane l cross join lateral millrace_engine.open_claims(l.id, l.floor, l.stragglers) o
            )
            select array_agg(z.slot_low), array_agg(z.slot_high), array_agg(z.low), array_agg(z.high), array_agg(z.settled)
                into slots_from, slots_to, lows, highs, settled_
                from unsettled z where z.low < z.high;
            execute format('insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, queue_key)
                select $1, m."position", m.key, m.headers, %s, m.created_at, 0, millrace_engine.clock(), millrace_engine.queue_key(m.key)
                from millrace.%I m
                where m."position" > (select min(x) from unnest($2) x) and m."position" <= (select max(x) from unnest($3) x)
                  and m."position" >= $10
                  and millrace_engine.matches($7, m.key, m.headers) and millrace_engine.matches($8, m.key, m.headers)
                  and not exists (select from unnest($9) r(filter) where millrace_engine.matches(r.filter, m.key, m.headers))
                  and exists (select from unnest($2, $3, $4, $5, $6) z(low, high, slot_low, slot_high, settled)
                      where m."position" > z.low and m."position" <= z.high and not z.settled @> m."position"
                        and millrace_engine.slot(m.key, m."position") between z.slot_low and z.slot_high - 1)
                  and not exists (select from millrace_engine.dead_letter d where d.group_id = $1 and d."position" = m."position")
                order by m."position"
                on conflict on constraint delivery_position_unique do nothing', part.payload, part.name)
                using u.id, lows, highs, slots_from, slots_to, settled_, p_filter, u.filter, routes, part.first_position;
            if p_dropped then
                insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, errors, queue_key)
                    select u.id, m."position", m.key, m.headers, m.payload, m.payload_bytes, m.created_at, 0, millrace_engine.clock(), m.errors, millrace_engine.queue_key(m.key)
                    from millrace_engine.delivery m
                    where m.group_id = part.id and millrace_engine.matches(u.filter, m.key, m.headers)
                      and not exists (select from unnest(routes) r(filter) where millrace_engine.matches(r.filter, m.key, m.headers))
                      and not exists (select from millrace_engine.dead_letter d where d.group_id = u.id and d."position" = m."position")
                    order by m."position"
                    on conflict on constraint delivery_position_unique do nothing;
            end if;
        end loop;
    end loop;
end $$;
