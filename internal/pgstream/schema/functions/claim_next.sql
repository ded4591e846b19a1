-- millrace_engine.claim_next(stream id, its sequence of positions, group, member, max, lease in ms, claim to ack, nonce, out claim, out segment, out low, out high, out expires_at)
-- Written with one ledger ring (install_functions.sql). The hot path of receive: claims the next positions of a Shared group, above low and up to high, for a member
-- that acks its last claim with the call, and settles that one by the row of the new one. It does not read the messages. Rollbacks may have
-- left positions empty: whoever reads them tells note_claimed.
-- Only low is not null when nothing is there: then the claim to ack is settled, and there is nothing else to do.
-- All null, with nothing settled, when anything is unusual: another mode, a pause, a filter, a queue policy, retries or expired claims, a claim to ack that has ended. Then
-- receive decides. Each 64th claim is left to receive too, because it raises the floor.
-- Locks:   as receive.
-- Raises:  nothing of its own.
-- One function for all streams, because it reads none: copies would cost each session that serves many streams half a megabyte and a millisecond for each of them.
-- What it costs is starting its plan and its expressions, so it has few of both: one statement that reads each table once and joins none, one condition, and the
-- parts of the token as plain variables, so that the locks' keys need no look. The newest claim is asked for from the claim to ack on: an index scan
-- reads all of a page that its conditions allow, also when one row is wanted. That all is as usual, but nothing there, is told by a setting, because a statement that inserts nothing
-- returns nothing, and another one would cost as much again; a CASE guarantees that it is told after all else was looked at.
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
    lane_    bigint;
    acked    bigint;    -- the claim to ack
    nonce_   bigint;    -- and its nonce
    ring_    bigint;
    ripe     boolean;   -- next_check has come
    checked  boolean;   -- and was renewed
begin
    -- Of the token no part has more digits than fit. A pattern that counts is dear, and few tokens are so long that they need it.
    if current_setting('transaction_isolation') = 'read committed' and p_max between 1 and 10000 and p_member <> '' and (p_lease_ms is null or p_lease_ms > 0)
            and pg_current_xact_id_if_assigned() is null
            and (p_ack is null or p_ack ~ '^[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+$' and (length(p_ack) < 25 or p_ack !~ '[0-9]{19}')) then
        if p_ack is null then
            select x.id, x.lane_id into group_, lane_ from millrace_engine.consumer_group x where x.stream_id = p_stream and x.name = p_group and not x.paused;
        else
            group_ := split_part(p_ack, '.', 1);
            lane_ := split_part(p_ack, '.', 2);
            acked := split_part(p_ack, '.', 3);
            nonce_ := split_part(p_ack, '.', 4);
        end if;
    end if;
    if group_ < 268435456 and lane_ > 0 and lane_ < 536870912 and (acked is null
                or pg_advisory_xact_lock((1610612736 + lane_)::integer, (acked & 2147483647)::integer) is not null
                and pg_advisory_xact_lock_shared((1073741824 + lane_)::integer, (acked & 2147483647)::integer) is not null)
            and pg_advisory_xact_lock((536870912 + group_)::integer, 0) is not null then
        ring_ := pg_sequence_last_value('millrace_engine.ring');
        loop
            /* each ring */
                insert into millrace_engine.claim_ring as n (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages,
                        attempt, ring, member, stragglers, careful_to, segment, settles)
                    select lane_, x.claim + 1, x.frontier, least(x.frontier + p_max, x.safe), least(x.frontier + p_max, x.safe), x.safe, x.floor,
                        p_nonce, x.ends, least(x.next_check, x.ends), least(p_max, x.safe - x.frontier), 1, ring_, p_member, x.stragglers, x.careful_to, x.segment, acked
                    from (select y.claim, y.frontier, y.floor, y.stragglers, y.careful_to, y.segment, y.next_check, y.settled,
                            case when y.horizon > y.frontier or coalesce(pg_sequence_last_value(p_positions), 0) <= y.frontier then y.horizon
                                 else millrace_engine.horizon_from(p_stream, case when y.messages > 0 then y.horizon end) end as safe,
                            (select now_ + coalesce(p_lease_ms, g.ack_wait_ms) * interval '1 millisecond' from millrace_engine.consumer_group g
                                where g.id = group_ and g.lane_id = lane_ and g.name = p_group and g.stream_id = p_stream and g.mode = 'Shared' and not g.paused
                                  and g.lapsed_at is null and g.filter is null and g.queue_policy is null and g.recheck_at > now_
                                  and g.first_position - 1 <= y.frontier) as ends,
                            exists (select from millrace_engine.delivery d where d.group_id = group_ and d.visible_at <= now_) as due
                        from millrace_engine.claim_ring y where y.lane_id = lane_ and y.claim >= coalesce(acked, 0) order by y.claim desc limit 1) x
                    where case
                        when x.ends is not null and not x.due and x.next_check > now_ and x.settled is null
                            and (acked is null or x.claim < acked + 64
                                and (select bool_or(y.claim = acked and y.nonce = nonce_) and bool_and(y.settles is distinct from acked)
                                    from millrace_engine.claim_ring y where y.lane_id = lane_ and y.claim >= acked)
                                and not exists (select from millrace_engine.settlement_ring y
                                    where y.lane_id = lane_ and y.claim = acked and y.kind in ('A', 'T', 'R')))
                        then case when x.safe > x.frontier then x.claim % 64 <> 63 else set_config('millrace.nothing', 'yes', true) is null end
                        end
                    returning concat_ws('.', group_, lane_, n.claim, n.nonce), n.low, n.high, n.segment, n.expires_at
                    into claim, low, high, segment, expires_at;
            /* end */
            exit when claim is not null;
            if current_setting('millrace.nothing', true) = 'yes' then
                low := length(set_config('millrace.nothing', '', true));
                if acked is not null then
                    /* each ring */
                        insert into millrace_engine.settlement_ring (lane_id, claim, at, ring, kind) values (lane_, acked, now_, ring_, 'A');
                    /* end */
                end if;
                exit;
            end if;
            /* each ring */
                select y.next_check <= now_ into ripe from millrace_engine.claim_ring y where y.lane_id = lane_ order by y.claim desc limit 1;
            /* end */
            exit when checked or ripe is not true or not millrace_engine.note_checked(group_, lane_, now_);
            checked := true;
        end loop;
    end if;
end $$;
comment on function millrace_engine.claim_next_rings(integer, regclass, text, text, integer, bigint, text, bigint) is 'The hot path of receive: claims the next positions of a Shared group.';
