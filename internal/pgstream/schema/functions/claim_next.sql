-- millrace_engine.claim_next(stream id, its sequence of positions, group, member, max, lease in ms, claim to ack, nonce, out claim, out segment, out low, out high, out expires_at)
-- Written with one ledger ring (install_functions.sql). The hot path of receive: claims the next positions of a Shared group, above low and up to high, for a member
-- that acks its last claim with the call, and settles that one by the row of the new one. It does not read the messages. Rollbacks may have
-- left positions empty: whoever reads them tells note_claimed.
-- All null, with nothing changed, when anything is unusual: another mode, a pause, a filter, a queue policy, retries or expired claims, a claim to ack that has ended,
-- nothing new. Then receive decides. Each 64th claim is left to receive too, because it raises the floor.
-- Locks:   as receive.
-- Raises:  nothing of its own.
-- One function for all streams, because it reads none: copies would cost each session that serves many streams half a megabyte and a millisecond for each of them.
-- Each statement in PL/pgSQL costs about 5 us, each index that it opens 3, each operator tenths; hence one statement, and the lock's keys from the token.
-- The newest claim is asked for from the claim to ack on: an index scan reads all of a page that its conditions allow, also when one row is wanted.
create or replace function millrace_engine.claim_next_rings(p_stream integer, p_positions regclass, p_group text, p_member text, p_max integer, p_lease_ms bigint,
    p_ack text, p_nonce bigint, out claim text, out segment smallint, out low bigint, out high bigint, out expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    now_     timestamptz := millrace_engine.clock();
    group_   bigint;
    acked    bigint[];
    ring_    integer;
    c        record;
begin
    if (current_setting('transaction_isolation') = 'read committed' and p_max between 1 and 10000 and p_member <> '' and (p_lease_ms is null or p_lease_ms > 0)
            and pg_current_xact_id_if_assigned() is null) is not true then
        return;
    end if;
    if p_ack ~ '^\d+\.\d+\.\d+\.\d+$' and p_ack !~ '\d{19}' then
        acked := string_to_array(p_ack, '.');
        group_ := acked[1];
    elsif p_ack is null then
        select x.id into group_ from millrace_engine.consumer_group x where x.stream_id = p_stream and x.name = p_group;
    end if;
    if group_ between 0 and 268435455 and (acked is null or acked[2] between 1 and 536870911
                and pg_advisory_xact_lock((1610612736 + acked[2])::integer, (acked[3] & 2147483647)::integer) is not null
                and pg_advisory_xact_lock_shared((1073741824 + acked[2])::integer, (acked[3] & 2147483647)::integer) is not null)
            and pg_advisory_xact_lock((536870912 + group_)::integer, 0) is not null then
        ring_ := pg_sequence_last_value('millrace_engine.ring');
        /* each ring */
            insert into millrace_engine.claim_ring as n (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages,
                    attempt, ring, member, stragglers, careful_to, segment, settles)
                select g.lane_id, x.claim + 1, x.frontier, least(x.frontier + p_max, x.safe), least(x.frontier + p_max, x.safe), x.safe, x.floor,
                    p_nonce, now_ + coalesce(p_lease_ms, g.ack_wait_ms) * interval '1 millisecond',
                    least(x.next_check, now_ + coalesce(p_lease_ms, g.ack_wait_ms) * interval '1 millisecond'),
                    least(p_max, x.safe - x.frontier), 1, ring_, p_member, x.stragglers, x.careful_to, x.segment, acked[3]
                from millrace_engine.consumer_group g
                cross join lateral (select y.claim, y.frontier, y.floor, y.stragglers, y.careful_to, y.segment, y.next_check, y.settled,
                        case when y.horizon > y.frontier or coalesce(pg_sequence_last_value(p_positions), 0) <= y.frontier then y.horizon
                             else millrace_engine.horizon_from(p_stream, case when y.messages > 0 then y.horizon end) end as safe
                    from millrace_engine.claim_ring y where y.lane_id = g.lane_id and y.claim >= coalesce(acked[3], 0) order by y.claim desc limit 1) x
                where g.id = group_ and g.name = p_group and g.stream_id = p_stream and g.mode = 'Shared' and not g.paused and g.lapsed_at is null
                  and g.filter is null and g.queue_policy is null and g.recheck_at > now_ and x.next_check > now_ and x.settled is null and x.claim % 64 <> 63
                  and x.frontier >= g.first_position - 1 and x.safe > x.frontier
                  and not exists (select from millrace_engine.delivery d where d.group_id = group_ and d.visible_at <= now_)
                  and (acked is null or g.lane_id = acked[2] and x.claim < acked[3] + 64
                      and (select bool_or(y.claim = acked[3] and y.nonce = acked[4]) and bool_and(y.settles is distinct from acked[3])
                          from millrace_engine.claim_ring y where y.lane_id = acked[2] and y.claim >= acked[3])
                      and not exists (select from millrace_engine.settlement_ring y
                          where y.lane_id = acked[2] and y.claim = acked[3] and y.kind in ('A', 'T', 'R')))
                returning n.lane_id, n.claim, n.low, n.high, n.segment, n.expires_at into c;
        /* end */
        if c.claim is not null then
            claim := concat_ws('.', group_, c.lane_id, c.claim, p_nonce);
            segment := c.segment;
            low := c.low;
            high := c.high;
            expires_at := c.expires_at;
        end if;
    end if;
end $$;
comment on function millrace_engine.claim_next_rings(integer, regclass, text, text, integer, bigint, text, bigint) is 'The hot path of receive: claims the next positions of a Shared group.';
