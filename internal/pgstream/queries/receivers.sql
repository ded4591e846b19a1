-- The open transactions that have received from a group, or hold its receive lock otherwise, and keep others from receiving, or do nothing. $1: stream, $2: group. Those that are just
-- receiving are left out, as far as the caller may see that. What the caller may not see of others' sessions is empty.
select s.priority, coalesce('pid ' || k.pid, 'a prepared transaction'), a.xact_start, coalesce(a.usename, ''), coalesce(a.application_name, ''),
    coalesce(host(a.client_addr), ''), coalesce(a.state, ''), w.n
from millrace_engine.groups_of($1, $2) g
join millrace_engine.stream s on s.id = g.stream_id
join pg_locks k on k.locktype = 'advisory' and k.objsubid = 2 and k.granted and k.classid::bigint = 536870912 + g.id and k.objid = 0
    and k.database = (select d.oid from pg_database d where d.datname = current_database())
left join pg_stat_activity a on a.pid = k.pid
cross join lateral (select count(*) from pg_locks x where x.locktype = 'advisory' and x.objsubid = 2 and not x.granted and x.classid = k.classid and x.objid = 0
    and x.database = k.database) w(n)
where a.state like 'idle in transaction%' or w.n > 0 and (a.xact_start < clock_timestamp() - interval '1 second') is not false
order by s.priority desc, a.xact_start
