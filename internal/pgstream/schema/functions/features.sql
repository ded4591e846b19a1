-- millrace.features(stream) returns the limits and features: name, value, meaning
-- What this database can do, and how much at once, for programs that would rather ask than be refused. With a stream: what holds for it. New names may come with a new
-- version; a name keeps its meaning.
-- Raises: MR002 no such stream.
create or replace function millrace.features(p_stream text default null) returns table (name text, value jsonb, meaning text)
language plpgsql stable as $$
#variable_conflict use_column
declare
    s millrace_engine.stream;
begin
    if p_stream is not null then
        select x.* into strict s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream);
    end if;
    return query select x.name, x.value, x.meaning from (values
        ('schema_version', (select to_jsonb(max(v.version)) from millrace_engine.schema_version v), 'version of the schema'),
        ('batching', to_jsonb(true), 'many messages in one publish, receive or ack'),
        ('dead_letters', to_jsonb(true), 'what a group gives up on is kept, and can be redriven'),
        ('delays', to_jsonb(true), 'messages for later'),
        ('dedupe', to_jsonb(s.dedupe_window_seconds is distinct from 0), 'dedupe keys'),
        ('frames', to_jsonb(p_stream is null or s.frames is not null), 'append_frame, and tails of a key'),
        ('notifications', to_jsonb(true), 'who waits is notified'),
        ('ordering', to_jsonb(true), 'order of each key, in Ordered groups'),
        ('priorities', to_jsonb(coalesce(s.priorities, 8) > 1), 'messages that go before others'),
        ('retry', to_jsonb(true), 'another delivery after a delay, a backoff, an expired lease or millrace.retry'),
        ('transactions', to_jsonb(true), 'publishing and settling in the caller''s own transaction'),
        ('trimming', to_jsonb(true), 'retention, and millrace.trim'),
        ('versions', to_jsonb(coalesce(s.versions, true)), 'append with an expected version'),
        ('max_message_bytes', to_jsonb(coalesce(s.max_message_bytes, 1048576)), 'payload of a message; of a stream that sets no other limit'),
        ('max_batch_size', to_jsonb(100000), 'messages in one publish_batch'),
        ('max_append_size', to_jsonb(10000), 'messages in one append'),
        ('max_receive_size', to_jsonb(10000), 'messages in one claim'),
        ('max_dedupe_key_bytes', to_jsonb(1024), 'bytes of a dedupe key'),
        ('max_serialized_keys', to_jsonb(1000), 'different keys in a batch with serialize'),
        ('max_priorities', to_jsonb(coalesce(s.priorities, 8)), 'priorities of a stream; of this one, how many it has'),
        ('max_partitions', to_jsonb(coalesce(s.partitions, 1024)), 'partitions of a stream; of this one, how many it has')
    ) x(name, value, meaning);
end $$;
comment on function millrace.features(text) is 'Limits and features of this database, or of one stream.';
