-- millrace.create_stream(name, partitions, payload_type, segments) returns integer
-- For users without Kubernetes: creates a stream, or changes nothing when it exists like that.
-- Raises: MR004 bad name or value, or a change that can never be done.
create or replace function millrace.create_stream(
    p_name text, p_partitions integer default 8, p_payload_type text default 'JSON', p_segments integer default 4) returns integer
language sql volatile
return millrace_engine.apply_stream(jsonb_build_object('name', p_name, 'partitions', p_partitions, 'payload_type', p_payload_type,
    'segments', p_segments));
comment on function millrace.create_stream(text, integer, text, integer) is
    'Creates a stream: its table millrace.<name>, segments, sequence and functions. Repeating it is harmless.';
