-- millrace_engine.groups_of(stream, group) returns setof millrace_engine.consumer_group
-- The group, and its mirrors in the priority lanes of the stream, the highest priority first. Nothing when it does not exist.
-- Raises: MR002 no such stream.
create or replace function millrace_engine.groups_of(p_stream text, p_group text) returns setof millrace_engine.consumer_group
language plpgsql stable as $$
begin
    return query select x.* from millrace_engine.consumer_group g
        join millrace_engine.consumer_group x on x.id = g.id or x.parent_id = g.id
        join millrace_engine.stream s on s.id = x.stream_id
        where g.stream_id = millrace_engine.stream_id(p_stream) and g.name = p_group order by s.priority desc;
end $$;
comment on function millrace_engine.groups_of(text, text) is 'A consumer group and its mirrors in the priority lanes.';

-- millrace_engine.need_group(stream, group) returns void
-- Raises: MR002 no such stream or group.
create or replace function millrace_engine.need_group(p_stream text, p_group text) returns void
language plpgsql stable as $$
begin
    if not exists (select from millrace_engine.groups_of(p_stream, p_group)) then
        perform millrace_engine.no_such_group(p_group);
    end if;
end $$;
comment on function millrace_engine.need_group(text, text) is 'Raises when there is no such consumer group.';

-- millrace_engine.no_such_group(group) returns void
-- Raises: MR002, always.
create or replace function millrace_engine.no_such_group(p_group text) returns void
language plpgsql immutable as $$
begin
    raise exception 'consumer group % does not exist', coalesce('"' || p_group || '"', 'null') using errcode = 'MR002',
        hint = 'Create it with a ConsumerGroup resource or with millrace.create_group.';
end $$;
comment on function millrace_engine.no_such_group(text) is 'Raises that there is no such consumer group.';
