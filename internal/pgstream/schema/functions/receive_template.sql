-- millrace_engine.receive_template(group, member, max, lease in ms, ack, auto-ack) returns the messages of one claim
-- Copied once per stream with the names filled in (install_functions.sql). receive_shared_template and receive_ordered_template (receive_hot.sql) call the copy
-- when there is anything unusual to do.
--
-- In this order, under the group's receive lock: hands out due messages of the delivery table (Shared; of a queued group that is all: enqueue.sql); takes over one expired claim; or
-- claims the next range up to the horizon. The claim `ack` is settled first; where it can be, by the new claim's own row, so that finishing one claim and
-- making the next writes one row, whatever the number of messages.
--
-- Order:   by position; Ordered groups get a key's messages strictly in order, and nothing of a lane while a claim of it is open. A Shared claim over
--          positions of two segments may have those of one segment after the other's.
-- Repeat:  a second call returns other messages; a lost reply costs one lease, not a message. With auto-ack it costs the messages.
-- Locks:   the locks of the claim to ack, then the group's receive lock, until the end of the transaction; so the call stands in a
--          transaction of its own.
-- Raises:  MR001 the claim to ack has ended; MR002 no such group; MR003 isolation level; MR004 bad argument; MR006 the transaction has
--          already written; MR010 the group has lapsed.
-- The plan settings keep the one good plan, an ordered index scan, whatever the statistics said when a segment was empty. Static names of single
-- rings (each ring) and conditions instead of PERFORM are there because a query costs ten times as much as an expression.
create or replace function millrace_engine.receive_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text,
    p_auto_ack boolean default false)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    now_     timestamptz;
    ends     timestamptz;
    g        record;
    acked    bigint[];       -- the parts of p_ack while it waits to be settled with the next claim
    acks     bigint;         -- the claim that the new claim's row settles
    ring_    integer;
    partitions_ integer;
    own      bigint;         -- Ordered: the lane of a member with nothing to reassign
    lanes    bigint[];
    lane_    bigint;
    low_slot smallint := 0;
    top_slot smallint := 1023;
    last     record;
    t        record;
    taken    millrace_engine.claim;
    parks    boolean := false;  -- Ordered: messages of the group were parked, or may be (park.sql)
    parking  boolean;        -- keys of this lane are parked
    behind   integer;        -- how many of their messages were moved out of the log
    stopped  boolean;        -- somebody unparks the key of the next message this moment
    dense    boolean;        -- the lane has every position, so the next n messages are the next n positions
    fresh    boolean;
    next_    timestamptz;
    low_     bigint;
    high_    bigint;
    edge     bigint;
    safe     bigint;
    most     integer;
    n        integer;
    try      integer;
    skip     int8multirange;
    careful  bigint;
    nonce_   bigint;
    token    text;
begin
    -- One condition for all that may be wrong, and below one for all that is not plain: an expression costs little, but more than nothing.
    if (current_setting('transaction_isolation') = 'read committed' and p_max between 1 and 10000 and p_member <> ''
            and (p_lease_ms is null or p_lease_ms > 0) and pg_current_xact_id_if_assigned() is null) is not true then
        if current_setting('transaction_isolation') <> 'read committed' then
            raise exception 'receive needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
                hint = 'An older snapshot would miss messages for ever. Call receive in a READ COMMITTED transaction of its own.';
        end if;
        if pg_current_xact_id_if_assigned() is not null   -- but by receive_priorities, which looks into one lane after the other
                and current_setting('millrace.receiving', true) is distinct from pg_current_xact_id_if_assigned()::text then
            raise exception 'receive must stand in a transaction of its own' using errcode = 'MR006',
                hint = 'It serialises the group until the commit. Commit first; ack inside the transaction that does the work.';
        end if;
        if p_max is null or p_max not between 1 and 10000 then
            raise exception 'cannot receive % messages', coalesce(p_max::text, 'null') using errcode = 'MR004', hint = 'Ask for 1 to 10000.';
        end if;
        if p_member is null or p_member = '' then
            raise exception 'the member has no name' using errcode = 'MR004', hint = 'Pass a name that is unique per process.';
        end if;
        if p_lease_ms <= 0 then
            raise exception 'cannot claim for % milliseconds', p_lease_ms using errcode = 'MR004', hint = 'Pass a positive time, or null for the group''s ack wait.';
        end if;
    end if;
    now_ := millrace_engine.clock();
    select x.id, x.mode, x.ack_wait_ms, x.max_attempts, x.failure_policy, x.paused, x.filter, x.lapsed_at, x.lapse_reason, x.lane_id, x.recheck_at,
            x.first_position, x.queue_policy, x.queue_policy is not null or coalesce(x.filter ? 'unrouted', false) as queued,
            x.mode = 'Shared' and exists (select from millrace_engine.delivery d where d.group_id = x.id and d.visible_at <= now_) as due
        into g
        from millrace_engine.consumer_group x where x.stream_id = c_stream and x.name = p_group;
    if not found then
        perform millrace_engine.no_such_group(p_group);
    end if;
    if g.lapsed_at is not null then
        raise exception 'consumer group "%" has lapsed: %', p_group, g.lapse_reason using errcode = 'MR010',
            hint = 'Messages may have been removed meanwhile. Choose where it goes on with millrace.reset_group.';
    end if;
    if p_ack is not null then
        if not g.paused and p_ack ~ '^[0-9]{1,10}\.[1-9][0-9]{0,9}\.[0-9]{1,18}\.[1-9][0-9]{0,17}$' then
            acked := string_to_array(p_ack, '.')::bigint[];
            if pg_advisory_xact_lock((1610612736 + acked[2])::integer, (acked[3] & 2147483647)::integer) is null
                    or pg_advisory_xact_lock_shared((1073741824 + acked[2])::integer, (acked[3] & 2147483647)::integer) is null then
                return;   -- cannot be: a void is not null
            end if;
        else
            perform millrace.ack(p_ack);
        end if;
    end if;
    if g.paused then
        return;
    end if;
    ends := now_ + make_interval(secs => coalesce(p_lease_ms, g.ack_wait_ms) / 1000.0);
    nonce_ := floor(random() * 999999999999999)::bigint + 1;
    if pg_advisory_xact_lock(536870912 + g.id, 0) is null then
        return;   -- cannot be
    end if;

    if g.mode = 'Shared' then
        lanes := array[g.lane_id];
        if g.queued or g.due then
            if acked is not null then
                perform millrace.ack(p_ack);
                acked := null;
            end if;
            if g.queued then
                perform millrace_engine.enqueue(g.id, nonce_);
                now_ := millrace_engine.clock();
            end if;
            if g.queue_policy in ('Singleton', 'Stately') then
                return query select * from millrace_engine.receive_singletons(g.id, p_member, p_max, now_, ends, nonce_);
            else
                return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, now_, ends, nonce_);
            end if;
            if found then
                perform millrace_engine.note_redelivery(g.id);
                if p_auto_ack then
                    perform millrace.ack(g.id || '.0.0.' || nonce_);
                end if;
                return;
            end if;
            if g.queued then
                return;
            end if;
        end if;
    else
        select x.lane, x.low_slot, x.top_slot, x.parks into own, low_slot, top_slot, parks
            from millrace_engine.settled_assignment(g.id, p_member, now_, coalesce(p_lease_ms, g.ack_wait_ms)) x;
        if own is not null then
            lanes := array[own];
        else
            if acked is not null then
                perform millrace.ack(p_ack);
                acked := null;
            end if;
            select s.partitions into strict partitions_ from millrace_engine.stream s where s.id = c_stream;
            perform millrace_engine.assign(g.id, p_member, partitions_, now_, coalesce(p_lease_ms, g.ack_wait_ms));
            select array_agg(x.id order by f.frontier) into lanes
                from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and x.member = p_member;
        end if;
    end if;
    if acked is not null and (lanes[1] is distinct from acked[2] or cardinality(lanes) > 1) then
        perform millrace.ack(p_ack);
        acked := null;
    end if;
    if lanes is null then
        return;
    end if;

    foreach lane_ in array lanes loop
        -- parks is read under the lock: once a parked message has been handed out, every later receive must know of its key.
        if g.mode = 'Ordered' and own is null then
            select x.slot_low, x.slot_high - 1, y.parks or y.failure_policy = 'Park' into strict low_slot, top_slot, parks
                from millrace_engine.lane x join millrace_engine.consumer_group y on y.id = x.group_id where x.id = lane_;
        end if;

        -- The lane's newest row is in the current ring, or else in an older one (rotate_ledger.sql). The same query says whether the claim to ack is open.
        ring_ := pg_sequence_last_value('millrace_engine.ring');
        /* each ring */
            select x.claim, x.frontier, x.horizon, x.floor, x.next_check, x.stragglers, x.careful_to, x.settled, x.segment, x.messages,
                    acked is not null
                    and exists (select from millrace_engine.claim_ring y where y.lane_id = lane_ and y.claim = acked[3] and y.nonce = acked[4])
                    and not exists (select from millrace_engine.settlement_ring y where y.lane_id = lane_ and y.claim = acked[3] and y.kind in ('A', 'T', 'R'))
                    and not exists (select from millrace_engine.claim_ring y
                        where y.lane_id = lane_ and y.claim > acked[3] and y.claim <= acked[3] + 64 and y.settles = acked[3]) as acks_ok
                into last
                from millrace_engine.claim_ring x where x.lane_id = lane_ order by x.claim desc limit 1;
        /* end */
        if last.claim is null then
            select x.claim, x.frontier, x.horizon, x.floor, x.next_check, x.stragglers, x.careful_to, x.settled, x.segment, x.messages, false as acks_ok
                into last
                from millrace_engine.claim x where x.lane_id = lane_ order by x.claim desc limit 1;
            if not found then
                raise exception 'broken invariant: lane % has no claim row', lane_ using errcode = 'MR009';
            end if;
        end if;
        acks := null;
        if last.acks_ok and last.claim < acked[3] + 64 then
            acks := acked[3];
        elsif acked is not null then
            perform millrace.ack(p_ack);
        end if;
        acked := null;

        -- Expired claims first: their messages are the oldest.
        next_ := last.next_check;
        taken := null;
        if now_ >= last.next_check or now_ >= g.recheck_at or (g.mode = 'Ordered' and last.floor < last.claim
                and not (last.floor = last.claim - 1 and (acks is not distinct from last.claim or millrace_engine.is_settled(lane_, last.claim)))) then
            if acks is not null then
                insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                    values (lane_, acks, now_, pg_sequence_last_value('millrace_engine.ring'), 'A');
                acks := null;
            end if;
            select * into t from millrace_engine.take_over(lane_, g.mode, g.first_position, last.floor, last.stragglers, p_max, now_);
            next_ := t.next_check;
            taken := t.taken;
            if t.aside and taken.claim is null then
                return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, millrace_engine.clock(), ends, nonce_);
                if found then
                    perform millrace_engine.note_redelivery(g.id);
                    if p_auto_ack then
                        perform millrace.ack(g.id || '.0.0.' || nonce_);
                    end if;
                    return;
                end if;
            end if;
            continue when g.mode = 'Ordered' and t.blocked and taken.claim is null;
        end if;
        if parks and taken.claim is null and exists (select from millrace_engine.delivery d where d.group_id = g.id and d.visible_at <= millrace_engine.clock()) then
            if acks is not null then
                insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                    values (lane_, acks, now_, pg_sequence_last_value('millrace_engine.ring'), 'A');
                acks := null;
            end if;
            return query select * from millrace_engine.receive_parked(g.id, low_slot, top_slot, last.frontier, p_member, p_max, millrace_engine.clock(), ends, nonce_);
            if found then
                perform millrace_engine.note_redelivery(g.id);
                if p_auto_ack then
                    perform millrace.ack(g.id || '.0.0.' || nonce_);
                end if;
                return;
            end if;
        end if;
        token := g.id || '.' || lane_ || '.' || last.claim + 1 || '.' || nonce_;
        edge := last.frontier;
        safe := last.horizon;
        careful := last.careful_to;
        n := 0;

        if taken.claim is not null then
            low_ := greatest(taken.low, g.first_position - 1);
            high_ := taken.high;
            skip := coalesce(taken.settled, '{}');
            try := taken.attempt + 1;
            most := p_max;
            if g.mode = 'Ordered' and try > 2 then
                -- It keeps expiring: from here one message at a time, to find the one that kills its consumers.
                most := 1;
                careful := greatest(careful, taken.high);
            end if;
            if g.mode = 'Ordered' and g.failure_policy <> 'Block' and g.max_attempts > 0 and taken.attempt >= g.max_attempts and taken.messages = 1 then
                perform millrace_engine.set_aside(taken, null, true, taken.attempt, null, 'the claim expired', false);
                edge := taken.high;
            else
                return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                    from millrace.stream_template m
                    where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between low_slot and top_slot
                      and not skip @> m."position" and millrace_engine.matches(g.filter, m.key, m.headers)
                    order by m."position" limit most;
                get diagnostics n = row_count;
                if n = most then
                    select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                        where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between low_slot and top_slot
                          and not skip @> m."position" and millrace_engine.matches(g.filter, m.key, m.headers)
                        order by m."position" limit most) x;
                end if;
                if g.mode = 'Ordered' then
                    edge := high_;
                end if;
            end if;
        end if;

        if n = 0 then
            try := 1;
            skip := case when g.mode = 'Ordered' then coalesce(taken.settled, last.settled) end;
            skip := nullif(skip, '{}');
            edge := greatest(edge, g.first_position - 1);
            low_ := edge;
            most := case when g.mode = 'Ordered' and edge < careful then 1 else p_max end;
            -- A later statement than the one that saw the lane''s last claim settled: keys that were parked with it are seen.
            parking := parks and exists (select from millrace_engine.parked_key k where k.group_id = g.id and k.slot >= low_slot and k.slot <= top_slot);
            behind := 0;
            stopped := false;
            dense := low_slot = 0 and top_slot = 1023 and g.filter is null and skip is null and not parking;
            fresh := false;
            loop
                if safe <= edge then
                    exit when fresh or coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0) <= edge;
                    safe := greatest(safe, millrace_engine.horizon_from(c_stream, case when last.messages > 0 then last.horizon end));
                    fresh := true;
                    continue;
                end if;
                low_ := edge;
                if dense then
                    -- Positions are nearly dense, so a claim of so many positions needs no reading to be found.
                    high_ := least(edge + most, safe);
                    return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                        from millrace.stream_template m
                        where m."position" > edge and m."position" <= high_ order by m."position";
                    get diagnostics n = row_count;
                    edge := high_;
                    exit when n > 0;
                    -- A hole left by a rollback or a crash: jump over it.
                    select m."position" - 1 into edge from millrace.stream_template m
                        where m."position" > high_ and m."position" <= safe order by m."position" limit 1;
                    edge := coalesce(edge, safe);
                else
                    -- A window that holds fewer than the messages asked for, if slots are spread evenly: then its end is the claim's end, and nothing is read twice.
                    high_ := case when most < 50 or g.filter is not null then safe
                                  else least(safe, edge + most * 900 / (top_slot - low_slot + 1)) end;
                    if parking then
                        select x.high, nullif(coalesce(skip, '{}') + x.diverted, '{}'), behind + x.n, x.stopped into high_, skip, behind, stopped
                            from millrace_engine.divert_template(g.id, low_slot, top_slot, edge, high_, skip, most, g.filter) x;
                    end if;
                    return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                        from millrace.stream_template m
                        where m."position" > edge and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between low_slot and top_slot
                          and (skip is null or not skip @> m."position") and millrace_engine.matches(g.filter, m.key, m.headers)
                        order by m."position" limit most;
                    get diagnostics n = row_count;
                    if n = most then
                        select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                            where m."position" > edge and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between low_slot and top_slot
                              and (skip is null or not skip @> m."position") and millrace_engine.matches(g.filter, m.key, m.headers)
                            order by m."position" limit most) x;
                    end if;
                    edge := high_;
                    exit when n > 0 or stopped or behind > 10000;
                end if;
            end loop;
            if n = 0 and (taken.claim is null or g.mode = 'Shared') and not (parks and skip is not null and edge > last.frontier)
                    and edge <= last.frontier + (case when dense then 100000 else 1000 end) then
                if acks is not null then
                    insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                        values (lane_, acks, now_, pg_sequence_last_value('millrace_engine.ring'), 'A');
                end if;
                continue;
            end if;
            -- The lane has read past other lanes' messages, past what its filter hides, past a dead letter, or past messages of parked keys: those
            -- that were moved must not come from the log again, and parked ones are handed out up to here only. An empty claim keeps that progress.
        end if;

        if g.mode = 'Ordered' then
            last.floor := last.claim + (n = 0)::integer;   -- one open claim at most, and this is it
        elsif (last.claim + 1) % 32 = 0 then
            select f.new_floor, f.new_stragglers into last.floor, last.stragglers
                from millrace_engine.raise_floor(lane_, last.claim, last.floor, last.stragglers) f;
        end if;
        if not isempty(skip) then
            skip := nullif(skip * int8multirange(int8range(low_, null)), '{}');
        else
            skip := null;
        end if;
        edge := case when g.mode = 'Shared' then greatest(last.frontier, edge) else edge end;
        safe := greatest(last.horizon, safe);
        next_ := least(next_, case when n > 0 then ends else 'infinity' end);
        /* each ring */
            insert into millrace_engine.claim_ring (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt,
                    ring, member, stragglers, careful_to, settled, segment, settles)
                values (lane_, last.claim + 1, low_, high_, edge, safe, last.floor, nonce_, ends, next_, n, try,
                    ring_, p_member, last.stragglers, careful, skip, last.segment, acks);
        /* end */
        if n = 0 and g.mode = 'Shared' or n > 0 and p_auto_ack then
            insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                values (lane_, last.claim + 1, now_, ring_, 'A');
        end if;
        if g.recheck_at <= now_ then
            update millrace_engine.consumer_group x set recheck_at = 'infinity' where x.id = g.id and x.recheck_at = g.recheck_at;
        end if;
        if n > 0 then
            return;
        end if;
    end loop;
end $$;
