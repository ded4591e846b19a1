-- millrace_engine.claim_ordered_template(group, member, max, lease in ms, claim to ack, nonce, lane, alone, out claim, out low, out high, out slot_low, out slot_high, out messages, out expires_at)
-- Copied once per stream (install_functions.sql). The hot path of receive for Ordered groups: claims the next messages of the member's one lane, those above low and up to high
-- whose slot is in the lane, after acking the lane's last claim, and settles that one by the row of the new one. It counts the messages and leaves
-- them to whoever asked. lane is where the member believes its messages to be; null: the lane of the claim to ack, or the member's.
-- All null, with nothing changed, when anything is unusual: another mode, a pause, a filter, parked keys, retries or expired claims, an assignment that has to
-- change, a claim to ack that has ended, nothing new. Then receive decides.
-- Locks:   the locks of the claim to ack; then, if alone, the group's receive lock, as receive. Otherwise the same lock shared, and the lane's exclusively, so that members
--          do not wait for each other. Whoever takes it shared must end the transaction before it calls receive: two that both want more would wait for each other.
-- Raises:  nothing of its own.
create or replace function millrace_engine.claim_ordered_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text, p_nonce bigint,
    p_lane bigint, p_alone boolean, out claim text, out low bigint, out high bigint, out slot_low integer, out slot_high integer, out messages bigint,
    out expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
    now_     timestamptz;
    acked    bigint[];
    group_   bigint;
    lane_    bigint := p_lane;
    ring_    integer;
    x        record;
    c        record;
begin
    if (current_setting('transaction_isolation') = 'read committed' and p_max between 1 and 10000 and p_member <> '' and (p_lease_ms is null or p_lease_ms > 0)
            and pg_current_xact_id_if_assigned() is null) is not true then
        return;
    end if;
    if p_ack ~ '^\d+\.\d+\.\d+\.\d+$' and p_ack !~ '\d{19}' then
        acked := string_to_array(p_ack, '.');
        group_ := acked[1];
        lane_ := acked[2];
    elsif p_ack is null then
        select g.id, coalesce(lane_, l.id) into group_, lane_
            from millrace_engine.consumer_group g join millrace_engine.lane l on l.group_id = g.id and l.member = p_member
            where g.stream_id = c_stream and g.name = p_group limit 1;
    end if;
    if (group_ between 0 and 268435455 and lane_ between 1 and 536870911 and (acked is null
                or pg_advisory_xact_lock((1610612736 + lane_)::integer, (acked[3] & 2147483647)::integer) is not null
                and pg_advisory_xact_lock_shared((1073741824 + lane_)::integer, (acked[3] & 2147483647)::integer) is not null)
            and case when p_alone then pg_advisory_xact_lock((536870912 + group_)::integer, 0) is not null
                     else pg_advisory_xact_lock_shared((536870912 + group_)::integer, 0) is not null
                         and pg_advisory_xact_lock((536870912 + group_)::integer, lane_::integer) is not null end) is not true then
        return;
    end if;
    now_ := millrace_engine.clock();
    ring_ := pg_sequence_last_value('millrace_engine.ring');
    -- The horizon comes from a statement before the one that looks at messages.
    /* each ring */
        select y.claim, y.frontier, y.stragglers, y.careful_to, y.segment, l.slot_low as slots_from, l.slot_high as slots_to,
                now_ + coalesce(p_lease_ms, g.ack_wait_ms) * interval '1 millisecond' as ends, y.next_check,
                case when y.horizon > y.frontier or coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0) <= y.frontier then y.horizon
                     else millrace_engine.horizon_from(c_stream, case when y.messages > 0 then y.horizon end) end as safe
            into x
            from millrace_engine.lane l
            join millrace_engine.consumer_group g on g.id = l.group_id
            join millrace_engine.stream s on s.id = g.stream_id
            cross join lateral (select n.* from millrace_engine.claim_ring n where n.lane_id = l.id and n.claim >= coalesce(acked[3], 0) order by n.claim desc limit 1) y
            cross join lateral (select count(*) as members, count(*) filter (where m.joined < me.joined) as rank,
                    bool_and(m.expires_at > now_ and me.expires_at >= now_ + coalesce(p_lease_ms, g.ack_wait_ms) * interval '0.5 milliseconds') as alive
                from millrace_engine.member me join millrace_engine.member m on m.group_id = me.group_id
                where me.group_id = l.group_id and me.name = p_member) a
            where l.id = lane_ and l.group_id = group_ and l.member = p_member
              and g.name = p_group and g.stream_id = c_stream and g.mode = 'Ordered' and not g.paused and g.lapsed_at is null and g.filter is null
              and not g.parks and g.failure_policy <> 'Park' and g.recheck_at > now_ and y.next_check > now_ and y.settled is null
              and y.frontier >= g.first_position - 1 and y.frontier >= y.careful_to
              and a.alive and l.slot_low = (a.rank * s.partitions / a.members) * 1024 / s.partitions
              and l.slot_high = ((a.rank + 1) * s.partitions / a.members) * 1024 / s.partitions
              and not exists (select from millrace_engine.lane z where z.group_id = l.group_id and z.member = p_member and z.id <> l.id)
              and case when acked is null then y.floor = y.claim or y.floor = y.claim - 1 and millrace_engine.is_settled(l.id, y.claim)
                       else y.claim = acked[3] and y.nonce = acked[4] and y.floor >= y.claim - 1
                           and not exists (select from millrace_engine.settlement_ring n
                               where n.lane_id = lane_ and n.claim = acked[3] and n.kind in ('A', 'T', 'R')) end;
    /* end */
    if x.safe > x.frontier then
        -- Written so that a message's slot is computed once: "between" would hash its key twice.
        /* each ring */
            insert into millrace_engine.claim_ring as n (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages,
                    attempt, ring, member, stragglers, careful_to, segment, settles)
                select lane_, x.claim + 1, x.frontier, w.high, w.high, x.safe, x.claim, p_nonce, x.ends, least(x.next_check, x.ends), w.n,
                    1, ring_, p_member, x.stragglers, x.careful_to, x.segment, acked[3]
                from (select count(*) as n, case when count(*) = p_max then max(z."position") else x.safe end as high
                      from (select m."position" from millrace.stream_template m
                          where m."position" > x.frontier and m."position" <= x.safe
                            and (millrace_engine.slot(m.key, m."position") - x.slots_from) & 1023 < x.slots_to - x.slots_from
                          order by m."position" limit p_max) z) w
                where w.n > 0
                returning n.claim, n.high, n.messages into c;
        /* end */
        if c.claim is not null then
            claim := concat_ws('.', group_, lane_, c.claim, p_nonce);
            low := x.frontier;
            high := c.high;
            slot_low := x.slots_from;
            slot_high := x.slots_to;
            messages := c.messages;
            expires_at := x.ends;
        end if;
    end if;
end $$;
comment on function millrace_engine.claim_ordered_template(text, text, integer, bigint, text, bigint, bigint, boolean) is
    'The hot path of receive for Ordered groups: claims the next messages of the member''s lane.';
