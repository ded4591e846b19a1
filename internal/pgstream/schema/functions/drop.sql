-- millrace.drop_stream(stream, only_if_empty) returns boolean
-- For users without Kubernetes: removes a stream with its messages, its groups and its priority lanes. True when there was one.
-- Raises: 42501 need_owner; MR004 when it is a priority lane; MR005 when it has messages and only_if_empty is set; MR007 a Kubernetes resource owns it.
create or replace function millrace.drop_stream(p_stream text, p_only_if_empty boolean default false) returns boolean
language plpgsql volatile as $$
declare
    s millrace_engine.stream;
begin
    perform millrace_engine.need_owner();
    select x.* into s from millrace_engine.stream x where x.name = p_stream;
    if not found then
        return false;
    end if;
    if s.owner is not null then
        raise exception 'stream "%" belongs to %', s.name, s.owner using errcode = 'MR007', hint = 'Delete the resource that owns it.';
    end if;
    perform millrace_engine.drop_stream(p_stream, p_only_if_empty);
    return true;
end $$;
comment on function millrace.drop_stream(text, boolean) is 'Removes a stream with its messages and groups; false when there is none.';

-- millrace.drop_group(stream, group) returns boolean
-- For users without Kubernetes: removes a consumer group with its progress, its deliveries and its dead letters. True when there was one.
-- Its claims are good for nothing more.
-- Raises: 42501 need_owner; MR002 no such stream; MR004 when the stream is a priority lane; MR007 a Kubernetes resource owns the group.
create or replace function millrace.drop_group(p_stream text, p_group text) returns boolean
language plpgsql volatile as $$
declare
    g millrace_engine.consumer_group;
begin
    perform millrace_engine.need_owner();
    select x.* into g from millrace_engine.consumer_group x where x.stream_id = millrace_engine.stream_id(p_stream) and x.name = p_group;
    if not found then
        return false;
    end if;
    if g.owner is not null then
        raise exception 'consumer group "%" belongs to %', g.name, g.owner using errcode = 'MR007', hint = 'Delete the resource that owns it.';
    end if;
    perform millrace_engine.drop_group(p_stream, p_group);
    return true;
end $$;
comment on function millrace.drop_group(text, text) is 'Removes a consumer group; false when there is none.';
