-- millrace_engine.receive_template(group, member, max, lease in ms, ack) returns the messages of one claim
-- Copied once per stream with the names filled in (install_functions.sql); millrace.receive and the Go client call the copy.
--
-- In this order, under the group's receive lock: settles the claim `ack`, so that finishing one claim and getting the next is one round trip;
-- hands out due messages of the delivery table (Shared); takes over one expired claim; or claims the next range up to the horizon.
-- Consuming writes one claim row and one settlement row per claim, and nothing per message.
--
-- Order:   by position; Ordered groups get a key's messages strictly in order, and nothing of a lane while a claim of it is open.
-- Repeat:  a second call returns other messages; a lost reply costs one lease, not a message.
-- Locks:   the group's receive lock until the end of the transaction, so the call stands in a transaction of its own.
-- Raises:  MR001 the claim to ack has ended; MR002 no such group; MR003 isolation level; MR004 bad argument; MR006 the transaction has
--          already written.
-- The plan settings keep the one good plan, an ordered index scan, whatever the statistics said when a segment was empty.
create or replace function millrace_engine.receive_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text)
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
    now_    timestamptz;
    ends    timestamptz;
    g       record;
    lanes   bigint[];
    lane    millrace_engine.lane;
    lane_id bigint;
    last    millrace_engine.claim;
    o       millrace_engine.claim;
    again   millrace_engine.claim;
    taken   millrace_engine.claim;
    aside   boolean;
    blocked boolean;
    fresh   boolean;
    next_   timestamptz;
    low_    bigint;
    high_   bigint;
    edge    bigint;
    safe    bigint;
    most    integer;
    n       integer;
    try     integer;
    skip    int8multirange;
    nonce_  bigint;
    token   text;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'receive needs isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot would miss messages for ever. Call receive in a READ COMMITTED transaction of its own.';
    end if;
    if pg_current_xact_id_if_assigned() is not null then
        raise exception 'receive must stand in a transaction of its own' using errcode = 'MR006',
            hint = 'It serialises the group until the commit. Commit first; ack inside the transaction that does the work.';
    end if;
    if p_max is null or p_max not between 1 and 10000 then
        raise exception 'cannot receive % messages', p_max using errcode = 'MR004', hint = 'Ask for 1 to 10000.';
    end if;
    if p_ack is not null then
        perform millrace.ack(p_ack);
    end if;

    now_ := millrace_engine.clock();
    select x.id, x.mode, x.ack_wait_ms, x.max_attempts, x.failure_policy, x.paused, s.partitions, s.first_position, l.id as lane_id, l.recheck_at,
            x.mode = 'Shared' and exists (select from millrace_engine.delivery d where d.group_id = x.id and d.visible_at <= now_) as due
        into g
        from millrace_engine.consumer_group x
        join millrace_engine.stream s on s.id = c_stream
        left join millrace_engine.lane l on l.group_id = x.id and x.mode = 'Shared'
        where x.stream_id = c_stream and x.name = p_group;
    if not found then
        raise exception 'consumer group "%" does not exist', p_group using errcode = 'MR002',
            hint = 'Create it with a ConsumerGroup resource or with millrace.create_group.';
    end if;
    if g.paused then
        return;
    end if;
    if p_member is null or p_member = '' then
        raise exception 'the member has no name' using errcode = 'MR004', hint = 'Pass a name that is unique per process.';
    end if;
    if p_lease_ms <= 0 then
        raise exception 'cannot claim for % milliseconds', p_lease_ms using errcode = 'MR004', hint = 'Pass a positive time, or null for the group''s ack wait.';
    end if;
    ends := now_ + make_interval(secs => coalesce(p_lease_ms, g.ack_wait_ms) / 1000.0);
    nonce_ := floor(random() * 999999999999999)::bigint + 1;
    perform pg_advisory_xact_lock(536870912 + g.id, 0);

    if g.mode = 'Shared' then
        lanes := array[g.lane_id];
        if g.due then
            return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, now_, ends, nonce_);
            if found then
                return;
            end if;
        end if;
    else
        perform millrace_engine.assign(g.id, p_member, g.partitions, now_, coalesce(p_lease_ms, g.ack_wait_ms));
        select array_agg(x.id order by f.frontier) into lanes
            from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and x.member = p_member;
        if lanes is null then
            return;
        end if;
    end if;

    foreach lane_id in array lanes loop
        if g.mode = 'Ordered' then
            select x.* into strict lane from millrace_engine.lane x where x.id = lane_id;
        else
            lane.id := g.lane_id;
            lane.slot_low := 0;
            lane.slot_high := 1024;
            lane.recheck_at := g.recheck_at;
        end if;
        select x.* into last from millrace_engine.claim x where x.lane_id = lane.id order by x.claim desc limit 1;
        if not found then
            raise exception 'broken invariant: lane % has no claim row', lane.id using errcode = 'MR009';
        end if;

        -- Expired claims first: their messages are the oldest.
        next_ := last.next_check;
        taken := null;
        aside := false;
        blocked := false;
        if now_ >= last.next_check or now_ >= lane.recheck_at or (g.mode = 'Ordered' and last.floor < last.claim
                and not (last.floor = last.claim - 1 and millrace_engine.is_settled(lane.id, last.claim))) then
            next_ := 'infinity';
            for o in select * from millrace_engine.open_claims(lane.id, last.floor, last.stragglers) loop
                if o.expires_at > now_ then
                    next_ := least(next_, o.expires_at);
                    blocked := true;
                    continue;
                end if;
                -- Whoever settles this claim just now holds its lock: leave it, rather than make everybody wait for a slow sink.
                if taken.claim is not null or not pg_try_advisory_xact_lock((1073741824 + lane.id)::integer, (o.claim & 2147483647)::integer) then
                    next_ := now_;
                    blocked := true;
                    continue;
                end if;
                select x.* into again from millrace_engine.open_claim(lane.id, o.claim) x;
                if not found then
                    continue;
                elsif again.expires_at > now_ then
                    next_ := least(next_, again.expires_at);
                    blocked := true;
                    continue;
                end if;
                -- The ring is read here, under the lock: one from before it may be emptied while the claim lives on in a newer one.
                insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
                    select lane.id, again.claim, now_, r.ring, 'T' from millrace_engine.ledger r where r.id = 1;
                if g.mode = 'Shared' and (again.attempt >= 2 or again.messages > p_max) then
                    -- A second expiry: some message may be killing its consumers. From here each is handed out alone, and the expiries
                    -- of the claim do not count against the innocent ones.
                    perform millrace_engine.set_aside(again, null, false, case when again.attempt >= 2 then 0 else again.attempt end,
                        interval '0', case when again.attempt >= 2 then 'the claim expired twice' end, again.attempt >= 2);
                    aside := true;
                else
                    taken := again;
                end if;
            end loop;
        end if;
        if aside and taken.claim is null then
            return query select * from millrace_engine.receive_deliveries(g.id, p_member, p_max, millrace_engine.clock(), ends, nonce_);
            if found then
                return;
            end if;
        end if;
        token := g.id || '.' || lane.id || '.' || last.claim + 1 || '.' || nonce_;
        edge := last.frontier;
        safe := last.horizon;
        n := 0;

        if taken.claim is not null then
            low_ := greatest(taken.low, g.first_position - 1);
            high_ := taken.high;
            skip := taken.settled;
            try := taken.attempt + 1;
            most := p_max;
            if g.mode = 'Ordered' and try > 2 then
                -- It keeps expiring: from here one message at a time, to find the one that kills its consumers.
                most := 1;
                last.careful_to := greatest(last.careful_to, taken.high);
            end if;
            if g.mode = 'Ordered' and g.failure_policy = 'Skip' and g.max_attempts > 0 and taken.attempt >= g.max_attempts and taken.messages = 1 then
                perform millrace_engine.set_aside(taken, null, true, taken.attempt, null, 'the claim expired', false);
                edge := taken.high;
            else
                return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                    from millrace.stream_template m
                    where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                      and not skip @> m."position"
                    order by m."position" limit most;
                get diagnostics n = row_count;
                if n = most then
                    select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                        where m."position" > low_ and m."position" <= high_ and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                          and not skip @> m."position"
                        order by m."position" limit most) x;
                end if;
                if g.mode = 'Ordered' then
                    edge := high_;
                end if;
            end if;
        elsif g.mode = 'Ordered' and blocked then
            continue;
        end if;

        if n = 0 then
            try := 1;
            skip := case when g.mode = 'Ordered' then last.settled end;
            if taken.claim is not null and g.mode = 'Ordered' then
                skip := taken.settled;
            end if;
            edge := greatest(edge, g.first_position - 1);
            low_ := edge;
            most := case when g.mode = 'Ordered' and edge < last.careful_to then 1 else p_max end;
            fresh := false;
            loop
                if safe <= edge then
                    exit when fresh;
                    safe := greatest(safe, millrace_engine.horizon(c_stream));
                    fresh := true;
                    continue;
                end if;
                if g.mode = 'Shared' then
                    -- Positions are nearly dense, so a claim of p_max positions needs no reading to be found.
                    high_ := least(edge + p_max, safe);
                    return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                        from millrace.stream_template m
                        where m."position" > edge and m."position" <= high_ order by m."position";
                    get diagnostics n = row_count;
                    low_ := edge;
                    edge := high_;
                    exit when n > 0;
                    -- A hole left by a rollback or a crash: jump over it.
                    select m."position" - 1 into edge from millrace.stream_template m
                        where m."position" > high_ and m."position" <= safe order by m."position" limit 1;
                    edge := coalesce(edge, safe);
                else
                    high_ := safe;
                    if skip is null or isempty(skip) then
                        return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                            from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                            order by m."position" limit most;
                    else
                        return query select token, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, try, ends
                            from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                              and not skip @> m."position"
                            order by m."position" limit most;
                    end if;
                    get diagnostics n = row_count;
                    if n = most then
                        select max(x."position") into high_ from (select m."position" from millrace.stream_template m
                            where m."position" > edge and m."position" <= safe and millrace_engine.slot(m.key, m."position") between lane.slot_low and lane.slot_high - 1
                              and (skip is null or not skip @> m."position")
                            order by m."position" limit most) x;
                    end if;
                    low_ := edge;
                    edge := high_;
                    exit when n > 0;
                end if;
            end loop;
            if n = 0 and (taken.claim is null or g.mode = 'Shared')
                    and not (g.mode = 'Ordered' and edge > last.frontier + 1000) then
                continue;
            end if;
            -- Ordered: the lane has read past other lanes' messages, or past a dead letter. An empty claim keeps that progress.
        end if;

        if g.mode = 'Ordered' then
            last.floor := last.claim + (n = 0)::integer;   -- one open claim at most, and this is it
        elsif (last.claim + 1) % 32 = 0 then
            select f.floor, f.stragglers into last.floor, last.stragglers from millrace_engine.raise_floor(last) f;
        end if;
        insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt,
                ring, member, stragglers, careful_to, settled)
            select lane.id, last.claim + 1, low_, high_,
                case when g.mode = 'Shared' then greatest(last.frontier, edge) else edge end,
                greatest(last.horizon, safe),
                last.floor,
                nonce_, ends, least(next_, ends), n, try, r.ring, p_member, last.stragglers, last.careful_to,
                case when not isempty(skip) then nullif(skip * int8multirange(int8range(low_, null)), '{}') end
            from millrace_engine.stream s, millrace_engine.ledger r where s.id = c_stream and s.first_position <= low_ + 1 and r.id = 1;
        if not found then
            raise exception 'messages were removed by retention while they were read' using errcode = '40001', hint = 'Call receive again.';
        end if;
        if lane.recheck_at <= now_ then
            update millrace_engine.lane x set recheck_at = 'infinity' where x.id = lane.id and x.recheck_at = lane.recheck_at;
        end if;
        if n > 0 then
            return;
        end if;
    end loop;
end $$;
