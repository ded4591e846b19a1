-- millrace.create_stream(name, partitions, payload_type, segments, priorities, dedupe_window_seconds, max_age_seconds, max_bytes, max_messages,
--                        retention, versions, frames, max_message_bytes) returns integer
-- For users without Kubernetes: creates a stream, or changes what is given of the settings that can change. Null leaves a setting as it is, or takes its
-- default: 8 partitions, JSON, 4 segments, 1 priority, a dedupe window of 120 seconds, retention Limits without limits, no versions, no frames, messages of 1 MiB. frames is an object, '{}' for
-- its defaults (frame_settings in frame.sql).
-- Raises: MR004 bad name or value, or a change that can never be done; MR007 a Kubernetes resource owns it and something would change.
create or replace function millrace.create_stream(
    p_name text, p_partitions integer default null, p_payload_type text default null, p_segments integer default null,
    p_priorities integer default null, p_dedupe_window_seconds bigint default null, p_max_age_seconds bigint default null,
    p_max_bytes bigint default null, p_max_messages bigint default null, p_retention text default null, p_versions boolean default null,
    p_frames jsonb default null, p_max_message_bytes integer default null) returns integer
language sql volatile
return millrace_engine.apply_stream(jsonb_build_object('name', p_name, 'partitions', p_partitions, 'payload_type', p_payload_type,
    'segments', case when p_segments not between -32768 and 32767 then 32767 else p_segments end,
    'priorities', case when p_priorities not between -32768 and 32767 then 32767 else p_priorities end, 'dedupe_window_seconds', p_dedupe_window_seconds,
    'max_age_seconds', p_max_age_seconds, 'max_bytes', p_max_bytes, 'max_messages', p_max_messages, 'max_message_bytes', p_max_message_bytes,
    'retention_policy', p_retention, 'versions', p_versions, 'frames', p_frames));
comment on function millrace.create_stream(text, integer, text, integer, integer, bigint, bigint, bigint, bigint, text, boolean, jsonb, integer) is
    'Creates a stream: its table millrace.<name>, segments, sequence and functions. Repeating it is harmless.';
