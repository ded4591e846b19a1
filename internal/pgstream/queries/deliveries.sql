-- Messages of a group that wait for another delivery or are having one, those that are due first. $1: stream, $2: group, $3: how many.
select s.priority, d."position", d.key, d.attempt, case when d.nonce is not null then coalesce(d.member, '') else '' end, d.nonce is not null,
    d.parked, nullif(d.visible_at, 'infinity'), coalesce(d.errors -> -1 ->> 'error', '')
from millrace_engine.groups_of($1, $2) g
join millrace_engine.stream s on s.id = g.stream_id
join millrace_engine.delivery d on d.group_id = g.id
order by d.visible_at, s.priority desc, d."position" limit $3
