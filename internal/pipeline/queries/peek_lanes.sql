-- What:  the streams of a group, one for each priority, highest first, and where reading would go on in each: behind what is settled
--        without a gap, or at the first message where there is no group.
-- Takes: the stream and the group. The previous release has no priorities and no filters, hence the detour by jsonb.
-- Locks: none. Writes nothing.
-- Used:  peek.go.
select s.name,
       coalesce((to_jsonb(s) ->> 'priority')::integer, 0) as priority,
       greatest(s.first_position, case when $3 then 0 else p.ack_floor + 1 end) as next,
       to_jsonb(g) -> 'filter' as filter
from millrace_engine.stream main
join millrace_engine.stream s on s.id = main.id or (to_jsonb(s) ->> 'parent_id')::integer = main.id
left join millrace_engine.consumer_group g on g.stream_id = s.id and g.name = $2
left join lateral (select x.ack_floor from millrace_engine.progress(array[s.id]) x where x.group_id = g.id) p on true
where main.name = $1
order by priority desc
