-- millrace.create_group(stream, group, mode, start, filter, failure_policy, max_attempts, ack_wait_seconds, position, time, queue_policy, paused, backoff_initial_seconds,
--                       backoff_max_seconds, lapse_after_seconds, lapse_lag) returns integer
-- For users without Kubernetes. Creates the group, or changes what is given of the settings that can change; null leaves a setting as it is, or takes its
-- default: those of apply_group. mode is Shared or Ordered; queue_policy is Standard, Short, Singleton or Stately (enqueue.sql); start is Earliest, Latest, Position (with
-- position) or Time (with time). An empty filter, '{}', ends filtering.
-- Raises: as apply_group.
create or replace function millrace.create_group(p_stream text, p_group text, p_mode text default null, p_start text default null,
    p_filter jsonb default null, p_failure_policy text default null, p_max_attempts integer default null, p_ack_wait_seconds double precision default null,
    p_position bigint default null, p_time timestamptz default null, p_queue_policy text default null, p_paused boolean default null,
    p_backoff_initial_seconds double precision default null, p_backoff_max_seconds double precision default null, p_lapse_after_seconds bigint default null,
    p_lapse_lag bigint default null)
returns integer
language sql volatile
return millrace_engine.apply_group(jsonb_build_object('stream', p_stream, 'name', p_group, 'mode', p_mode,
    'start', case when num_nonnulls(p_start, p_position, p_time) > 0 then jsonb_build_object('from', p_start, 'position', p_position,
        'time', to_char(p_time at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) end,
    'failure_policy', p_failure_policy, 'max_attempts', p_max_attempts, 'ack_wait_ms', millrace_engine.milliseconds(p_ack_wait_seconds),
    'queue_policy', p_queue_policy, 'paused', p_paused, 'backoff_initial_ms', millrace_engine.milliseconds(p_backoff_initial_seconds),
    'backoff_max_ms', millrace_engine.milliseconds(p_backoff_max_seconds), 'lapse_after_seconds', p_lapse_after_seconds, 'lapse_lag', p_lapse_lag)
    || case when p_filter is null then '{}' else jsonb_build_object('filter', p_filter) end);
comment on function millrace.create_group(text, text, text, text, jsonb, text, integer, double precision, bigint, timestamptz, text, boolean, double precision,
    double precision, bigint, bigint) is 'Creates a consumer group of a stream, or changes its settings. Repeating it is harmless.';
