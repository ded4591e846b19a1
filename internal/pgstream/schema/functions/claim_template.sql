-- millrace_engine.claim_template(group, member, max, lease in ms, claim to ack, nonce, out claim, out segment, out low, out high, out expires_at)
-- Copied once per stream (install_functions.sql). The hot path of receive: claims the next positions of a Shared group, above low and up to high, for a member
-- that acks its last claim with the call, and settles that one by the row of the new one. It does not read the messages. Rollbacks may have
-- left positions empty: whoever reads them tells note_claimed.
-- All null, with nothing changed, when anything is unusual: another mode, a pause, a filter, a queue policy, retries or expired claims, a claim to ack that has ended,
-- nothing new. Then receive decides. Each 64th claim is left to receive too, because it raises the floor.
-- Locks:   as receive.
-- Raises:  nothing of its own.
-- Each statement in PL/pgSQL costs about 5 us, each index that it opens 3, each operator tenths; hence one statement, and the lock's keys from the token.
-- The newest claim is asked for from the claim to ack on: an index scan reads all of a page that its conditions allow, also when one row is wanted.
create or replace function millrace_engine.claim_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text, p_nonce bigint,
    out claim text, out segment smallint, out low bigint, out high bigint, out expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c_stream constant integer := /* stream id */ 0;
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
        select x.id into group_ from millrace_engine.consumer_group x where x.stream_id = c_stream and x.name = p_group;
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
                        case when y.horizon > y.frontier or coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0) <= y.frontier then y.horizon
                             else millrace_engine.horizon_from(c_stream, case when y.messages > 0 then y.horizon end) end as safe
                    from millrace_engine.claim_ring y where y.lane_id = g.lane_id and y.claim >= coalesce(acked[3], 0) order by y.claim desc limit 1) x
                where g.id = group_ and g.name = p_group and g.stream_id = c_stream and g.mode = 'Shared' and not g.paused and g.lapsed_at is null
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
comment on function millrace_engine.claim_template(text, text, integer, bigint, text, bigint) is 'The hot path of receive: claims the next positions of a Shared group.';

-- millrace_engine.note_claimed_template(claim, low, high, n) returns void
-- Corrects what claim_template supposed when only n messages were found: positions that rollbacks left empty are noted as settled; a claim without
-- any message is settled.
create or replace function millrace_engine.note_claimed_template(p_claim text, p_low bigint, p_high bigint, p_n bigint) returns void
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
begin
    if p_n = 0 then
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            values (t[2], t[3], millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'A');
    elsif p_n < p_high - p_low then
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind, settled)
            select t[2], t[3], millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'P',
                int8multirange(int8range(p_low, p_high, '(]')) - range_agg(int8range(m."position", m."position", '[]'))
            from millrace.stream_template m where m."position" > p_low and m."position" <= p_high;
    end if;
end $$;
comment on function millrace_engine.note_claimed_template(text, bigint, bigint, bigint) is 'Notes which positions of a new claim have no message. Called by receive.';

-- millrace_engine.note_segment_template(claim, high) returns void
-- Notes, under the group's receive lock and for the lane's newest claim, that another segment than before has its messages: by an empty claim that has
-- the new hint, once per segment, because rows of the ledger are never updated.
create or replace function millrace_engine.note_segment_template(p_claim text, p_high bigint) returns void
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    ring_ integer := pg_sequence_last_value('millrace_engine.ring');
begin
    insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring,
            stragglers, careful_to, segment)
        select c.lane_id, c.claim + 1, c.frontier, c.frontier, c.frontier, c.horizon, c.floor, 0, 'infinity', c.next_check, 0, 0, ring_, c.stragglers, c.careful_to,
            (select m.segment from millrace.stream_template m where m."position" <= p_high order by m."position" desc limit 1)
        from millrace_engine.claim c where c.lane_id = t[2] and c.claim = t[3] and c.nonce = t[4];
    insert into millrace_engine.settlement (lane_id, claim, at, ring, kind) values (t[2], t[3] + 1, millrace_engine.clock(), ring_, 'A');
end $$;
comment on function millrace_engine.note_segment_template(text, bigint) is 'Notes which segment has the messages of the newest claim. Called by receive.';
