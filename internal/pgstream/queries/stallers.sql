-- The open transactions that hold the horizon of a stream or of its priorities back. $1: stream. What the caller may not see of others' sessions is empty.
select s.priority, h.holder, h.since, coalesce(a.usename, x.owner, ''), coalesce(a.application_name, ''), coalesce(host(a.client_addr), ''), coalesce(a.state, '')
from millrace_engine.horizon_holders() h
join millrace_engine.stream s on s.id = h.stream_id
left join millrace_engine.stream p on p.id = s.parent_id
left join pg_stat_activity a on h.holder = 'pid ' || a.pid
left join pg_prepared_xacts x on h.holder = 'prepared transaction ' || x.gid and x.database = current_database()
where coalesce(p.name, s.name) = $1
order by s.priority desc, h.since
