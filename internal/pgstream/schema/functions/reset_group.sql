-- millrace.reset_group(stream, group, from, position, time) returns bigint
-- Moves a consumer group to another place of its stream, back to deliver again or forward to pass over, and returns the number of single deliveries
-- (retries, parked messages) that it removed. from is Earliest, Latest, Position (the first position to deliver) or Time (the first created_at to deliver).
-- From then on the group gets exactly what a new group with that start would get; its dead letters stay. A lapsed group lives again.
--
-- Every claim that is open ends: whoever holds it gets MR001 for whatever it does with it. A settlement that is under way in an open transaction is
-- waited for, and has happened before the reset. Claim numbers go on, so no old token can fit a later claim.
-- In a stream with priorities every lane moves; with a Position the lanes of higher priority begin at their earliest message.
--
-- Locks: the stream's row, then the open claims, exclusively, then the receive locks. In this order because a member holds its claim's lock while it
--        waits for the receive lock, when it acks and receives in one call. Claims that were made meanwhile are tried, and if one of them is being
--        settled everything but the claims' locks is given up for a moment. The stream's row is locked without its key, to which
--        publishers refer, and the group's row only at the end, because whoever gives a claim back changes it under the claim's lock.
-- Raises: 42501 need_owner; MR002 no such stream or group; MR003 isolation level; MR004 no such place; MR008 a position that retention has removed; 55P03 when somebody
--         keeps a claim locked for ten seconds: call it again.
create or replace function millrace.reset_group(p_stream text, p_group text, p_from text, p_position bigint default null, p_time timestamptz default null)
returns bigint
language plpgsql volatile
set lock_timeout = '10s' as $$
declare
    stream integer := millrace_engine.stream_id(p_stream);
    wanted constant jsonb := jsonb_build_object('from', p_from, 'position', p_position, 'time', p_time);
    deadline constant timestamptz := clock_timestamp() + interval '10 seconds';
    s millrace_engine.stream;
    part millrace_engine.stream;
    g millrace_engine.consumer_group;
    c record;
    removed bigint;
begin
    perform millrace_engine.need_owner();
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'a group can be reset only at isolation level read committed, not %', current_setting('transaction_isolation')
            using errcode = 'MR003', hint = 'An older snapshot does not see every open claim.';
    end if;
    select * into strict s from millrace_engine.stream x where x.id = stream for no key update;
    perform millrace_engine.refuse_lane(s);
    perform from millrace_engine.stream x where x.parent_id = stream order by x.priority for no key update;
    select * into g from millrace_engine.consumer_group x where x.stream_id = stream and x.name = p_group;
    if not found then
        perform millrace_engine.no_such_group(p_group);
    end if;
    if p_from = 'Position' and p_position < s.first_position then
        raise exception 'position % is below %, the first that is still there', p_position, s.first_position using errcode = 'MR008',
            hint = 'Use Earliest to begin with what is left.';
    end if;

    loop
        for c in select x.class, x.object from millrace_engine.claim_locks(g.id) x loop
            perform pg_advisory_xact_lock(c.class, c.object);
        end loop;
        begin
            perform millrace_engine.hold_receives(g.id);
            if not exists (select from millrace_engine.consumer_group x where x.id = g.id) then
                raise exception 'consumer group "%" was dropped', p_group using errcode = 'MR002', hint = 'Create it again.';
            end if;
            for c in select x.class, x.object from millrace_engine.claim_locks(g.id) x loop
                if not pg_try_advisory_xact_lock(c.class, c.object) then
                    raise exception 'a new claim is being settled' using errcode = 'MR901';
                end if;
            end loop;
            removed := 0;
            for part in select * from millrace_engine.stream x where x.id = stream or x.parent_id = stream order by x.priority loop
                removed := removed + millrace_engine.move_group(g.id, part, wanted);
            end loop;
            update millrace_engine.consumer_group x set lapsed_at = null, lapse_reason = null
                where (x.id = g.id or x.parent_id = g.id) and x.lapsed_at is not null;
            delete from millrace_engine.group_activity x where x.group_id = g.id;   -- its time begins anew
            perform millrace_engine.announce(stream);
            return removed;
        exception when sqlstate 'MR901' then
            null;   -- this gave the receive locks back
        end;
        if clock_timestamp() > deadline then
            raise exception 'the open claims of consumer group "%" are settled and made anew all the time', p_group using errcode = '55P03',
                hint = 'Call it again, or pause the group first.';
        end if;
    end loop;
end $$;
comment on function millrace.reset_group(text, text, text, bigint, timestamptz) is
    'Moves a consumer group to another place of its stream and ends its open claims.';

-- millrace_engine.claim_locks(group) returns table (class, object)
-- The advisory locks of everything that members of the group and of its mirrors hold: open claims, and claims of single deliveries.
create or replace function millrace_engine.claim_locks(p_group integer) returns table (class integer, object integer)
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
begin
    return query
        select (1073741824 + l.id)::integer, (o.claim & 2147483647)::integer
        from millrace_engine.consumer_group g
        join millrace_engine.lane l on l.group_id = g.id
        cross join lateral (select c.floor, c.stragglers from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) f
        cross join lateral millrace_engine.open_claims(l.id, f.floor, f.stragglers) o
        where g.id = p_group or g.parent_id = p_group
        union
        select 1073741824, (d.nonce & 2147483647)::integer
        from millrace_engine.consumer_group g
        join millrace_engine.delivery d on d.group_id = g.id
        where (g.id = p_group or g.parent_id = p_group) and d.nonce is not null
        order by 1, 2;
end $$;

-- millrace_engine.move_group(group, stream, place) returns bigint
-- Moves the group, or its mirror in a priority lane, to a place of that stream. The caller holds the stream's row, the locks of every open claim and the
-- receive lock. Every lane gets a row that says where it is, as carry_over and open_lane do; nothing up to its own number is open after it. The
-- keys of parked messages are unparked by the trigger on deliveries.
create or replace function millrace_engine.move_group(p_group integer, p_stream millrace_engine.stream, p_place jsonb) returns bigint
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
declare
    target integer;
    first_ bigint;
    l record;
    last millrace_engine.claim;
    removed bigint;
begin
    select x.id into strict target from millrace_engine.consumer_group x
        where x.stream_id = p_stream.id and (x.id = p_group or x.parent_id = p_group);
    first_ := millrace_engine.place(p_stream, p_place);
    for l in select x.id from millrace_engine.lane x where x.group_id = target order by x.id loop
        select c.* into strict last from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1;
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            select l.id, o.claim, millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'T'
            from millrace_engine.open_claims(l.id, last.floor, last.stragglers) o;
        insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring)
            values (l.id, last.claim + 1, first_ - 1, first_ - 1, first_ - 1, 0, last.claim + 1, 0, 'infinity', 'infinity', 0, 0,
                pg_sequence_last_value('millrace_engine.ring'));
    end loop;
    update millrace_engine.consumer_group x set recheck_at = 'infinity' where x.id = target and x.recheck_at <> 'infinity';
    delete from millrace_engine.delivery d where d.group_id = target;
    get diagnostics removed = row_count;
    return removed;
end $$;
