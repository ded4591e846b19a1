-- The segments of a stream and of its priorities. $1: stream.
select s.priority, k, g.low, g.high, coalesce(pg_total_relation_size(c.oid), 0)::bigint, k = millrace_engine.segment(s.id)
from millrace_engine.stream s
left join millrace_engine.stream p on p.id = s.parent_id
cross join generate_series(0, s.segments - 1) k
left join lateral (select * from millrace_engine.segments(s.id)) g on g.number = k
cross join lateral (select to_regclass(format('millrace_engine.segment_%s_%s', s.id, k)) as oid) c
where coalesce(p.name, s.name) = $1
order by s.priority desc, k
