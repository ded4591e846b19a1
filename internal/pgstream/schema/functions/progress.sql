-- millrace_engine.progress(stream ids) returns one row per consumer group of these streams
-- How far each group is in its log; statistics, retention and lapsing begin here. Its cost does not depend on the backlog: positions are
-- subtracted, not rows counted, so lag is an upper bound where transactions rolled back; it is zero when no message is left, and while the group
-- waits for a position ahead of the log.
-- lag: what waits to be claimed, for the first time or because its claim was given back. in_flight: what is claimed and not settled.
-- queued: of a group with a filter, how many of these messages it takes: counted in the first 2,000 positions, and beyond them estimated by the share that was
-- found there. Of another group, the lag.
-- A group for unrouted messages has neither: what it has not judged is not its own yet.
-- ack_floor: every position up to it is settled, or was removed. oldest: created_at of the first message above it.
-- Under another isolation level than READ COMMITTED, and on a standby, lag and ack_floor are a little behind: no message is looked for then.
create or replace function millrace_engine.progress(p_streams integer[])
returns table (group_id integer, stream_id integer, lag bigint, queued bigint, in_flight bigint, ack_floor bigint, oldest timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off   -- whatever the statistics say of a table that was empty when they were made
set jit = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    look_ahead constant integer := 2000;   -- more than a lane reads without noting it
    can_look constant boolean := not pg_is_in_recovery() and current_setting('transaction_isolation') = 'read committed';
    g record;
    l record;
    lows integer[];
    highs integer[];
    reaches bigint[];
    settled_ int8multirange[];
    open_low bigint;
    open_count bigint;
    back_count bigint;   -- of claims that were given back
    back bigint;         -- the same of all lanes
    behind bigint;     -- the lane that is furthest behind
    look record;
    looked boolean;
    last_looked bigint;
begin
    for g in select x.id, x.stream_id, x.filter, s.name, s.first_position - 1 as trimmed, h.last, case when can_look then h.horizon end as safe
             from millrace_engine.horizons(p_streams) h
             join millrace_engine.stream s on s.id = h.stream_id
             join millrace_engine.consumer_group x on x.stream_id = s.id loop
        group_id := g.id;
        stream_id := g.stream_id;
        queued := null;
        in_flight := 0;
        back := 0;
        ack_floor := null;
        oldest := null;
        looked := false;
        lows := '{}';
        highs := '{}';
        reaches := '{}';
        settled_ := '{}';
        for l in select x.id, x.slot_low, x.slot_high, c.claim, c.floor, c.stragglers, greatest(c.frontier, g.trimmed) as reach,
                        nullif(c.settled * int8multirange(int8range(c.frontier, null, '()')), '{}') as settled
                 from millrace_engine.lane x
                 cross join lateral (select d.* from millrace_engine.claim d where d.lane_id = x.id order by d.claim desc limit 1) c
                 where x.group_id = g.id loop
            -- The newest claim is often the only one that may be open, and looking for its settlement is far cheaper than listing the open claims.
            if l.stragglers is not null or l.floor < l.claim - 1 or l.floor = l.claim - 1 and not millrace_engine.is_settled(l.id, l.claim) then
                -- nonce 0: given back, and nobody's until it is claimed again
                select min(o.low), coalesce(sum(o.messages) filter (where o.nonce <> 0), 0), coalesce(sum(o.messages) filter (where o.nonce = 0), 0)
                    into open_low, open_count, back_count
                    from millrace_engine.open_claims(l.id, l.floor, l.stragglers) o;
                if open_low is not null then
                    in_flight := in_flight + greatest(open_count, 0);
                    back := back + greatest(back_count, 0);
                    ack_floor := least(ack_floor, greatest(open_low, g.trimmed));
                end if;
            end if;
            lows := lows || l.slot_low::integer;
            highs := highs || l.slot_high::integer;
            reaches := reaches || l.reach;
            settled_ := settled_ || coalesce(l.settled, '{}');
        end loop;
        select min(r) into behind from unnest(reaches) r;

        -- A lane does not note at once that it has read past a hole, other lanes' messages, or those that its group does not want: look where its next
        -- message is. Of a group with one lane that is the oldest message, too; while claims of it are open, holes above them count as lag, and
        -- one look is saved.
        if g.safe > behind then
            if cardinality(lows) > 1 or not isempty(settled_[1]) or g.filter is not null then
                execute format($look$
                    with next as materialized (select m."position", millrace_engine.slot(m.key, m."position") as slot,
                            millrace_engine.matches(%L, m.key, m.headers) as wanted from millrace.%I m
                        where m."position" > $1 and m."position" <= $2 order by m."position" limit $3)
                    select array_agg(greatest(l.reach, coalesce(
                               (select min(n."position") - 1 from next n where n.wanted and n.slot between l.low and l.high - 1 and n."position" > l.reach and not l.settled @> n."position"),
                               (select case when count(*) < $3 then $2 else max(n."position") end from next n))) order by l.n),
                        (select count(*) from next n where n.wanted and exists (select from unnest($4, $5, $6, $7) l(low, high, reach, settled)
                            where n.slot between l.low and l.high - 1 and n."position" > l.reach and not l.settled @> n."position")),
                        (select case when count(*) < $3 then $2 else max(n."position") end from next n)
                    from unnest($4, $5, $6, $7) with ordinality l(low, high, reach, settled, n)$look$, g.filter, g.name)
                    into reaches, queued, last_looked using behind, g.safe, look_ahead, lows, highs, reaches, settled_;
                queued := queued + (greatest(g.safe - last_looked, 0) * queued / look_ahead);
            elsif ack_floor is null then
                execute format('select m."position", m.created_at from millrace.%I m where m."position" > $1 order by m."position" limit 1', g.name)
                    into look using behind;
                reaches[1] := greatest(behind, least(look."position" - 1, g.safe));
                oldest := look.created_at;
                looked := true;
            end if;
        end if;
        lag := back;
        for i in 1 .. cardinality(lows) loop
            lag := lag + ceil(greatest(g.last - reaches[i], 0) * (highs[i] - lows[i]) / 1024.0)::bigint;
            ack_floor := least(ack_floor, reaches[i]);
        end loop;
        if lag + in_flight > 0 and not looked then
            execute format('select m.created_at from millrace.%I m where m."position" > $1 order by m."position" limit 1', g.name)
                into oldest using ack_floor;
        end if;
        if g.filter ? 'unrouted' then
            oldest := null;
        end if;
        if oldest is null then
            lag := 0; -- those positions rolled back, and nothing may come for a long time to move the frontier past them
        end if;
        queued := case when g.filter is null then lag else least(coalesce(queued, 0) + back, lag) end;
        return next;
    end loop;
end $$;
comment on function millrace_engine.progress(integer[]) is 'How far each consumer group of some streams is in its log.';
