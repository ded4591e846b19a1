-- millrace_engine.note_checked(group, its lane, now) returns boolean
-- Under the receive lock of a Shared group. When the newest claim's next_check has come and no claim has expired, it notes when the next one may, and returns true: by an empty
-- claim, because rows of the ledger are never updated. So an idle group's open claims are not looked for again at each poll. False, with nothing changed, when
-- next_check has not come, a claim has expired, or the group is not as usual (claim_next.sql).
-- The call stays the receive that it is a part of (millrace.receiving), although it has written.
create or replace function millrace_engine.note_checked(p_group bigint, p_lane bigint, p_now timestamptz) returns boolean
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    last  record;
    next_ timestamptz;
    ring_ integer;
begin
    select c.claim, c.frontier, c.horizon, c.floor, c.stragglers, c.careful_to, c.segment into last
        from millrace_engine.consumer_group g
        cross join lateral (select x.* from millrace_engine.claim x where x.lane_id = g.lane_id order by x.claim desc limit 1) c
        where g.id = p_group and g.lane_id = p_lane and g.mode = 'Shared' and not g.paused and g.lapsed_at is null and g.filter is null and g.queue_policy is null
          and g.recheck_at > p_now and c.next_check <= p_now and c.settled is null;
    if not found then
        return false;
    end if;
    next_ := coalesce((select min(o.expires_at) from millrace_engine.open_claims(p_lane, last.floor, last.stragglers) o), 'infinity');
    if next_ <= p_now then
        return false;
    end if;
    ring_ := pg_sequence_last_value('millrace_engine.ring');
    insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring,
            stragglers, careful_to, segment)
        select p_lane, last.claim + 1, last.frontier, last.frontier, last.frontier, last.horizon, f.new_floor, 0, 'infinity', next_, 0, 0, ring_,
            f.new_stragglers, last.careful_to, last.segment
        from millrace_engine.raise_floor(p_lane, last.claim, last.floor, last.stragglers) f;
    insert into millrace_engine.settlement (lane_id, claim, at, ring, kind) values (p_lane, last.claim + 1, p_now, ring_, 'A');
    perform set_config('millrace.receiving', pg_current_xact_id_if_assigned()::text, true);
    return true;
end $$;
comment on function millrace_engine.note_checked(bigint, bigint, timestamptz) is 'Notes when a claim of a Shared group may expire next, unless one has expired.';
