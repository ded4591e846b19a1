-- millrace_engine.raise_floor(newest claim row, out floor, out stragglers)
-- Moves the floor up as far as claims are settled. Open claims more than 64 behind become stragglers, up to 64 of them, and the floor passes
-- them: otherwise one member that holds a claim for minutes would make every look at the open claims read all that was settled since.
create or replace function millrace_engine.raise_floor(p_last millrace_engine.claim, out floor bigint, out stragglers bigint[])
language plpgsql volatile as $$
begin
    select array_agg(x.claim order by x.claim) filter (where x.n <= 64 and x.claim <= p_last.claim - 64),
           min(x.claim) filter (where not (x.n <= 64 and x.claim <= p_last.claim - 64)) - 1
        into stragglers, floor
        from (select o.claim, row_number() over (order by o.claim) as n
              from millrace_engine.open_claims(p_last.lane_id, p_last.floor, p_last.stragglers) o) x;
    floor := coalesce(floor, p_last.claim);
end $$;
