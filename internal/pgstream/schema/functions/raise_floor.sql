-- millrace_engine.raise_floor(lane, newest claim, floor, stragglers, out new_floor, out new_stragglers)
-- Moves the floor up as far as claims are settled. Open claims more than 64 behind become stragglers, up to 64 of them, and the floor passes
-- them: otherwise one member that holds a claim for minutes would make every look at the open claims read all that was settled since.
create or replace function millrace_engine.raise_floor(p_lane bigint, p_newest bigint, p_floor bigint, p_stragglers bigint[],
    out new_floor bigint, out new_stragglers bigint[])
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    done bigint[];
    open_ bigint[];
begin
    done := array(select s.claim from millrace_engine.settlement s where s.lane_id = p_lane and s.claim > p_floor and s.kind in ('A', 'T'))
         || array(select c.settles from millrace_engine.claim c where c.lane_id = p_lane and c.claim > p_floor and c.settles is not null);
    open_ := array(select c.claim from millrace_engine.claim c where c.lane_id = p_lane and c.claim > p_floor except select unnest(done));
    if p_stragglers is not null then
        open_ := open_ || array(select x from unnest(p_stragglers) x where x <= p_floor and not millrace_engine.is_settled(p_lane, x));
    end if;
    select array_agg(x.claim order by x.claim) filter (where x.n <= 64 and x.claim <= p_newest - 64),
           min(x.claim) filter (where not (x.n <= 64 and x.claim <= p_newest - 64)) - 1
        into new_stragglers, new_floor
        from (select o.claim, row_number() over (order by o.claim) as n from unnest(open_) o(claim)) x;
    new_floor := coalesce(new_floor, p_newest);
end $$;
comment on function millrace_engine.raise_floor(bigint, bigint, bigint, bigint[]) is 'Moves the floor of a lane up as far as claims are settled.';
