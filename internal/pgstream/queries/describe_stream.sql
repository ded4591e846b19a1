-- One stream as the database has it. $1: name; $2: with positions and sizes, which cost more than the rest, or with zeros for them.
select s.id, s.partitions, s.payload_type, s.segments, s.retention_policy, s.max_age_seconds, s.max_bytes, s.max_messages,
    s.max_message_bytes, s.dedupe_window_seconds, s.priorities, coalesce((to_jsonb(s) ->> 'versions')::boolean, false),
    coalesce(nullif(to_jsonb(s) -> 'frames', 'null'), '{}'), s.owner, s.first_position,
    case when seq.oid is null or not $2 then 0 else coalesce(pg_sequence_last_value(seq.oid), 0) end,
    case when seq.oid is null or not $2 then 0 else millrace_engine.horizon(s.id) end,
    case when $2 then coalesce(millrace_engine.horizon_holder(s.id), 0) else 0 end,
    case when $2 then (select coalesce(sum(pg_total_relation_size(to_regclass(format('millrace_engine.segment_%s_%s', l.id, k)))), 0)::bigint
        from millrace_engine.stream l cross join generate_series(0, l.segments - 1) k where l.id = s.id or l.parent_id = s.id) else 0 end
from millrace_engine.stream s
left join pg_class seq on seq.relname = 'position_' || s.id and seq.relkind = 'S' and seq.relnamespace = 'millrace_engine'::regnamespace
where s.name = $1
