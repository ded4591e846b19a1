-- millrace_engine.group_report() returns one row per consumer group
-- What the manager shows of every group, in one call: the columns of millrace.stats (stats.sql); last_position, the sum of the last positions of
-- the stream and its priority lanes; and, of groups that have something to do, group_holders and group_error below. A group at rest costs what it costs in stats.
create or replace function millrace_engine.group_report()
returns table (stream text, "group" text, mode text, lag bigint, in_flight bigint, retrying bigint, dead_letters bigint, oldest_age interval,
    ack_floor bigint, members jsonb, paused boolean, lapsed text, last_position bigint, holders jsonb, deliveries integer, error text, error_at timestamptz,
    queued bigint, active bigint)
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
begin
    return query
        select s.stream, s."group", s.mode, s.lag, s.in_flight, s.retrying, s.dead_letters, s.oldest_age, s.ack_floor, s.members, s.paused, s.lapsed,
               -- Two probes and no OR, which would look at every stream for every group.
               (coalesce(pg_sequence_last_value(to_regclass('millrace_engine.position_' || t.id)), 0)
                + (select coalesce(sum(pg_sequence_last_value(to_regclass('millrace_engine.position_' || x.id))), 0)
                   from millrace_engine.stream x where x.parent_id = t.id))::bigint,
               coalesce(h.holders, '[]'), h.deliveries, e.error, e.at, s.queued, s.active
        from millrace.stats() s
        join millrace_engine.stream t on t.name = s.stream
        join millrace_engine.consumer_group g on g.stream_id = t.id and g.name = s."group"
        left join lateral (select * from millrace_engine.group_holders(g.id) where s.lag + s.in_flight + s.retrying > 0) h on true
        left join lateral (select * from millrace_engine.group_error(g.id) where s.retrying + s.dead_letters > 0) e on true;
end $$;
comment on function millrace_engine.group_report() is 'What the manager shows of every consumer group, in one call.';

-- millrace_engine.group_holders(group, out holders, out deliveries)
-- holders: the ten members that hold the most messages, as [{name, messages}], the greediest first; null when nobody holds any. deliveries: how often the
-- unsettled message that was handed out most often has been, among those that somebody holds, that were given back, or that wait for another delivery.
-- Cost: as open_claims, for each lane, and the group's waiting deliveries.
create or replace function millrace_engine.group_holders(p_group integer, out holders jsonb, out deliveries integer)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
begin
    with part as (
        select x.id from millrace_engine.consumer_group x where x.id = p_group or x.parent_id = p_group
    ), open as materialized (
        -- nonce 0: given back, and nobody's until it is claimed again
        select case when o.nonce <> 0 then o.member end as member, o.messages::bigint as messages, o.attempt
        from part
        join millrace_engine.lane l on l.group_id = part.id
        cross join lateral (select c.floor, c.stragglers from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) f
        cross join lateral millrace_engine.open_claims(l.id, f.floor, f.stragglers) o
        where o.messages > 0
        union all
        select d.member, count(*), max(d.attempt) from part join millrace_engine.delivery d on d.group_id = part.id group by d.member
    ), held as (
        select o.member, sum(o.messages) as messages from open o where o.member is not null group by o.member order by 2 desc, 1 limit 10
    )
    select (select jsonb_agg(jsonb_build_object('name', h.member, 'messages', h.messages) order by h.messages desc, h.member) from held h),
           (select max(o.attempt) from open o)
        into holders, deliveries;
end $$;
comment on function millrace_engine.group_holders(integer) is 'Which members of a consumer group hold how many messages.';

-- millrace_engine.group_error(group, out error, out at)
-- The newest error of a group that is still there to be read: of the message that was set aside last, or of the one that will be delivered again last. Null when
-- neither has one; a Block group that gives its messages back keeps no error.
create or replace function millrace_engine.group_error(p_group integer, out error text, out at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
begin
    select n.error, n.at into error, at
        from millrace_engine.consumer_group x
        cross join lateral (
            (select d.reason as error, d.dead_at as at from millrace_engine.dead_letter d where d.group_id = x.id order by d.id desc limit 1)
            union all
            (select d.errors -> -1 ->> 'error', (d.errors -> -1 ->> 'at')::timestamptz
             from millrace_engine.delivery d where d.group_id = x.id and d.errors <> '[]' order by d.visible_at desc limit 1)) n
        where x.id = p_group or x.parent_id = p_group
        order by n.at desc nulls last limit 1;
end $$;
comment on function millrace_engine.group_error(integer) is 'The newest error of a consumer group.';
