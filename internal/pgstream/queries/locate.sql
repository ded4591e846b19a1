-- Where each consumer group is with a message. $1: stream, or priority as "<stream>.p1"; $2: position; $3: key; $4: headers; $5: whether the message is still in
-- the log, so that its key is known.
select g.name, x.dead_at, coalesce(x.attempts, d.attempt, o.attempt, 0), coalesce(x.reason, d.errors -> -1 ->> 'error', ''),
    d.id is not null, coalesce(d.parked, false), coalesce(d.nonce is not null, false), nullif(d.visible_at, 'infinity'),
    coalesce(o.nonce <> 0, false), coalesce(d.member, o.member, ''), o.expires_at,
    coalesce($2 > f.frontier and not coalesce(f.settled @> $2::bigint, false), false) or coalesce(o.nonce = 0, false),
    l.id is not null, not $5 or coalesce(millrace_engine.matches(g.filter, $3, $4), true)
from millrace_engine.stream s
join millrace_engine.consumer_group g on g.stream_id = s.id
left join millrace_engine.dead_letter x on x.group_id = g.id and x."position" = $2
left join millrace_engine.delivery d on d.group_id = g.id and d."position" = $2
left join millrace_engine.lane l on l.group_id = g.id
    and (g.mode = 'Shared' or $5 and millrace_engine.slot($3, $2) between l.slot_low and l.slot_high - 1)
left join lateral (select c.* from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) f on true
left join lateral (select y.* from millrace_engine.open_claims(l.id, f.floor, f.stragglers) y
    where y.low < $2 and y.high >= $2 and not coalesce(y.settled @> $2::bigint, false) limit 1) o on true
where s.name = $1
order by g.name
