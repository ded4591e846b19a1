-- What retention would remove under other settings and does not under the present ones, in every priority. $1: stream, $2: the settings, as apply_stream
-- has them.
select count(*), coalesce(sum(w.messages), 0)::bigint, coalesce(sum(w.bytes), 0)::bigint, max(w.newest)
from millrace_engine.stream s
left join millrace_engine.stream p on p.id = s.parent_id
cross join lateral millrace_engine.removable_segments(jsonb_populate_record(s, $2)) w
where coalesce(p.name, s.name) = $1
    and not exists (select from millrace_engine.removable_segments(s) h where h.segment = w.segment)
