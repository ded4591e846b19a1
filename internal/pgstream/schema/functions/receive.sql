-- millrace.receive(stream, group, member, max, lease_seconds, ack, auto_ack) returns the messages of one claim
-- Gives the member up to max messages that nobody else in the group holds, for lease_seconds (null: the group's ack wait). Returns no row
-- when there is nothing now. Every row carries the same claim; settle it with ack, ack_messages, nack, dead_letter or release before
-- expires_at, or extend it. ack, when not null, settles the previous claim first, in the same round trip.
-- With auto_ack the messages are settled by the call itself: at most once, for what may be lost but must be fast.
-- payload is set in JSON streams, payload_bytes in Bytes streams. attempt is 1 on the first delivery.
-- In a stream with priorities the claim is of the highest priority that has anything for the member.
-- Raises: as receive_template.
create or replace function millrace.receive(p_stream text, p_group text, p_member text, p_max integer default 100,
    p_lease_seconds double precision default null, p_ack text default null, p_auto_ack boolean default false)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile as $$
declare
    stream_     integer;
    priorities_ integer;
    hot         text;
begin
    if not millrace_engine.is_duration(p_lease_seconds) then
        raise exception 'cannot claim for % seconds', p_lease_seconds using errcode = 'MR004',
            hint = 'Pass a positive number of seconds, up to a hundred years, or null for the group''s ack wait.';
    end if;
    -- Groups with a filter or a policy have nothing to gain from the functions for plain ones.
    select x.id, x.priorities, (select lower(g.mode) from millrace_engine.consumer_group g
                where g.stream_id = x.id and g.name = p_group and g.filter is null and g.queue_policy is null)
        into stream_, priorities_, hot from millrace_engine.stream x where x.name = p_stream;
    if priorities_ = 1 and hot is not null and not p_auto_ack then
        return query execute 'select * from millrace_engine.receive_' || hot || '_' || stream_ || '($1, $2, $3, $4, $5)'
            using p_group, p_member, p_max, (p_lease_seconds * 1000)::bigint, p_ack;
    elsif priorities_ > 1 then
        return query select * from millrace_engine.receive_priorities(stream_, p_group, p_member, p_max, (p_lease_seconds * 1000)::bigint, p_ack, p_auto_ack);
    else
        return query execute format('select * from millrace_engine.receive_%s($1, $2, $3, $4, $5, $6)', coalesce(stream_, millrace_engine.stream_id(p_stream)))
            using p_group, p_member, p_max, (p_lease_seconds * 1000)::bigint, p_ack, p_auto_ack;
    end if;
end $$;
comment on function millrace.receive(text, text, text, integer, double precision, text, boolean) is
    'Claims messages for a member of a consumer group, after settling its previous claim.';

-- millrace_engine.stream_id(name) returns integer
-- Raises: MR002 no such stream.
create or replace function millrace_engine.stream_id(p_stream text) returns integer
language plpgsql stable as $$
declare
    result integer;
begin
    select s.id into result from millrace_engine.stream s where s.name = p_stream;
    if not found then
        raise exception 'stream % does not exist', coalesce('"' || p_stream || '"', 'null') using errcode = 'MR002',
            hint = 'Create it with a Stream resource or with millrace.create_stream.';
    end if;
    return result;
end $$;
