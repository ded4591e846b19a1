-- millrace_engine.open_claims(lane, floor, stragglers) returns setof millrace_engine.claim
-- The claims above floor, and the stragglers below it, that nothing has settled, as they stand now: expires_at after every extension, settled with everything settled
-- since, messages as the number of those left, attempt as the number that the next delivery would have less one. A claim that was carried over to a newer ring appears once.
-- Cost: claims between the floor and now: about a hundred, however long a slow member takes.
create or replace function millrace_engine.open_claims(p_lane bigint, p_floor bigint, p_stragglers bigint[]) returns setof millrace_engine.claim
language plpgsql volatile
set plan_cache_mode = force_generic_plan   -- a plan made while a ring was empty would compare every row with every other
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
as $$
declare
    acked bigint[] := array(select d.settles from millrace_engine.claim d where d.lane_id = p_lane and d.claim > p_floor and d.settles is not null);
begin
    -- Not in language sql, which would plan again at every call.
    return query select c.lane_id, c.claim, c.low, c.high, c.frontier, c.horizon, c.floor,
           case when last_end.kind = 'R' then 0 else c.nonce end,   -- given back: the old token must not fit a copy
           coalesce(last_end.expires_at, c.expires_at), c.next_check,
           c.messages - (select coalesce(sum(upper(r) - lower(r)), 0)::integer from unnest(progress.settled - coalesce(c.settled, '{}')) r),
           coalesce(last_end.next_attempt - 1, c.attempt), c.ring, c.copy, c.member, c.stragglers, c.careful_to,
           coalesce(c.settled, '{}'::int8multirange) + coalesce(progress.settled, '{}'::int8multirange), c.settles, c.segment
    from (select distinct on (d.claim) d.* from (
              select x.* from millrace_engine.claim x where x.lane_id = p_lane and x.claim > p_floor
              union all
              select x.* from millrace_engine.claim x where x.lane_id = p_lane and x.claim = any (p_stragglers) and x.claim <= p_floor) d
          order by d.claim, d.copy desc) c
    left join lateral (select e.expires_at, e.next_attempt, e.kind from millrace_engine.settlement e
          where e.lane_id = c.lane_id and e.claim = c.claim and e.kind in ('E', 'R')
          order by e.kind desc, e.at desc limit 1) last_end on true
    left join lateral (select range_agg(p.settled) as settled from millrace_engine.settlement p
          where p.lane_id = c.lane_id and p.claim = c.claim and p.kind = 'P') progress on true
    where not exists (select from millrace_engine.settlement s
          where s.lane_id = c.lane_id and s.claim = c.claim and s.kind in ('A', 'T'))
      and c.claim <> all (acked)
      and not (c.claim <= p_floor and exists (select from millrace_engine.claim s
          where s.lane_id = c.lane_id and s.claim > c.claim and s.claim <= c.claim + 64 and s.settles = c.claim))
    order by c.claim;
end $$;
comment on function millrace_engine.open_claims(bigint, bigint, bigint[]) is 'Claims of a lane that are neither acked nor taken over, with their present end.';

-- millrace_engine.is_settled(lane, claim) returns boolean
-- Whether the claim was acked or taken over: by a settlement, or by the claim that its member made next.
create or replace function millrace_engine.is_settled(p_lane bigint, p_claim bigint) returns boolean
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
begin
    return exists (select from millrace_engine.settlement s where s.lane_id = p_lane and s.claim = p_claim and s.kind in ('A', 'T'))
        or exists (select from millrace_engine.claim c
            where c.lane_id = p_lane and c.claim > p_claim and c.claim <= p_claim + 64 and c.settles = p_claim);
end $$;

-- millrace_engine.open_claim(lane, claim) returns setof millrace_engine.claim
-- One claim, if it is open.
create or replace function millrace_engine.open_claim(p_lane bigint, p_claim bigint) returns setof millrace_engine.claim
language sql volatile
begin atomic
    select * from millrace_engine.open_claims(p_lane, 9223372036854775807, array[p_claim]);
end;
