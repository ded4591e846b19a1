-- When the first delayed message of a stream is due, and whether a scout runs that will deliver it. $1: stream.
select (select min(d.due_at) from millrace_engine.stream s left join millrace_engine.stream p on p.id = s.parent_id
        join millrace_engine.delayed d on d.stream_id = s.id where coalesce(p.name, s.name) = $1),
    exists (select from millrace_engine.scout x where x.expires_at > millrace_engine.clock())
