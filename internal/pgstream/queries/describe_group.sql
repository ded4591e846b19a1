-- One consumer group as the database has it, with the keys of apply_group. $1: stream, $2: group.
select s.id is not null, g.id is not null,
    jsonb_build_object('stream', s.name, 'name', g.name, 'mode', g.mode, 'start', g.start, 'ack_wait_ms', g.ack_wait_ms,
        'max_attempts', g.max_attempts, 'backoff_initial_ms', g.backoff_initial_ms, 'backoff_max_ms', g.backoff_max_ms,
        'failure_policy', g.failure_policy, 'queue_policy', coalesce(g.queue_policy, 'Standard'), 'paused', g.paused,
        'filter', millrace_engine.written_filter(g.filter), 'lapse_after_seconds', g.lapse_after_seconds,
        'lapse_lag', g.lapse_lag),
    g.owner, g.lapsed_at, g.lapse_reason
from (select) one
left join millrace_engine.stream s on s.name = $1
left join millrace_engine.consumer_group g on g.stream_id = s.id and g.name = $2
