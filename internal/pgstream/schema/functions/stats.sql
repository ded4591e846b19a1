-- millrace.stats(stream) returns one row per consumer group of the stream; null: of every stream
-- Progress of every group in one call; its cost does not depend on the backlog (progress.sql). The priorities of a stream are counted
-- together; ack_floor and members are those of the lowest.
-- Of a group that hands out from the delivery table (enqueue.sql) lag, in_flight and retrying say in which state its messages are there.
-- queued: how many messages wait, for their first delivery (progress.sql) or another one; active: how many members hold. Their sum is all that the group has to do.
-- lapsed: why the group does not receive any more, null while it does (lapse.sql).
create or replace function millrace.stats(p_stream text default null)
returns table (stream text, "group" text, mode text, lag bigint, in_flight bigint, retrying bigint, dead_letters bigint,
    oldest_age interval, ack_floor bigint, members jsonb, paused boolean, lapsed text, queued bigint, active bigint)
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    now_ constant timestamptz := millrace_engine.clock();
    streams constant integer[] := array(select s.id from millrace_engine.stream s left join millrace_engine.stream p on p.id = s.parent_id
        where p_stream is null or s.name = p_stream or p.name = p_stream);
begin
    return query
        with one as materialized (
            select p.*, coalesce(g.parent_id, g.id) as whole, d.fresh, d.handed, d.n - d.fresh - d.handed as retrying, d.held, d.n, d.oldest as retried
            from millrace_engine.progress(streams) p
            join millrace_engine.consumer_group g on g.id = p.group_id
            cross join lateral (
                select count(*) as n, count(x.nonce) as held, count(x.nonce) filter (where x.queue_key is not null) as handed,
                       count(*) filter (where x.queue_key is not null and x.nonce is null and x.attempt = 0) as fresh, min(x.created_at) as oldest
                from millrace_engine.delivery x where x.group_id = p.group_id) d
        )
        select s.name, g.name, g.mode, sum(o.lag + o.fresh)::bigint, sum(o.in_flight + o.handed)::bigint, sum(o.retrying)::bigint,
               sum((select count(*) from millrace_engine.dead_letter x where x.group_id = o.group_id))::bigint,
               greatest(now_ - least(min(o.oldest), min(o.retried)), interval '0'),
               min(o.ack_floor) filter (where o.group_id = g.id),
               case when g.mode = 'Ordered' then (
                   select coalesce(jsonb_agg(jsonb_build_object('name', m.name, 'expires_at', m.expires_at, 'partitions',
                       (select coalesce(jsonb_agg(p order by p), '[]') from generate_series(0, s.partitions - 1) p
                        where exists (select from millrace_engine.lane x where x.group_id = g.id and x.member = m.name
                            and x.slot_low < (p + 1) * 1024 / s.partitions and x.slot_high > p * 1024 / s.partitions))) order by m.joined), '[]')
                   from millrace_engine.member m where m.group_id = g.id and m.expires_at > now_) else '[]' end,
               g.paused, case when g.lapsed_at is not null then coalesce(g.lapse_reason, 'lapsed') end,
               sum(o.queued + o.n - o.held)::bigint, sum(o.in_flight + o.held)::bigint
        from one o
        join millrace_engine.consumer_group g on g.id = o.whole
        join millrace_engine.stream s on s.id = g.stream_id
        where p_stream is null or s.name = p_stream
        group by g.id, s.id
        order by s.name, g.name;
end $$;
comment on function millrace.stats(text) is 'Lag, messages in flight, retries, dead letters and members of every consumer group.';
