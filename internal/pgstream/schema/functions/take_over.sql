-- The signature of an earlier version.
drop function if exists millrace_engine.take_over(bigint, text, bigint, bigint[], integer, timestamptz);

-- millrace_engine.take_over(lane, mode, first position, floor, stragglers, max, now, out taken, out aside, out blocked, out next_check)
-- Looks at the lane's open claims, under the group's receive lock, and takes over one whose lease has ended: `taken` is that claim, to be handed
-- out again. In a Shared group a claim that expired twice, or is larger than max, is set aside as single deliveries instead (`aside`). `blocked` says
-- that a claim is still held by somebody; `next_check` is when the next one ends. A claim that was trimmed as a whole ends, and is nobody's.
-- Whoever settles a claim just now holds its lock: it is left alone, rather than make everybody wait for a slow sink.
create or replace function millrace_engine.take_over(p_lane bigint, p_mode text, p_first bigint, p_floor bigint, p_stragglers bigint[], p_max integer,
    p_now timestamptz, out taken millrace_engine.claim, out aside boolean, out blocked boolean, out next_check timestamptz)
language plpgsql volatile as $$
declare
    o millrace_engine.claim;
    again millrace_engine.claim;
begin
    next_check := 'infinity';
    aside := false;
    blocked := false;
    for o in select * from millrace_engine.open_claims(p_lane, p_floor, p_stragglers) loop
        if o.expires_at > p_now then
            next_check := least(next_check, o.expires_at);
            blocked := true;
            continue;
        end if;
        if taken.claim is not null or not pg_try_advisory_xact_lock((1073741824 + p_lane)::integer, (o.claim & 2147483647)::integer) then
            next_check := p_now;
            blocked := true;
            continue;
        end if;
        -- Again, in a new statement after the lock: it may have been settled or extended a moment ago.
        select x.* into again from millrace_engine.open_claim(p_lane, o.claim) x;
        if not found then
            continue;
        elsif again.expires_at > p_now then
            next_check := least(next_check, again.expires_at);
            blocked := true;
            continue;
        end if;
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            values (p_lane, again.claim, p_now, pg_sequence_last_value('millrace_engine.ring'), 'T');
        continue when again.high < p_first;   -- or the caller would have nothing, and not look at the next
        if p_mode = 'Shared' and (again.attempt >= 2 or again.messages > p_max) then
            -- A second expiry: some message may be killing its consumers. From here each is handed out alone, and the expiries
            -- of the claim do not count against the innocent ones.
            perform millrace_engine.set_aside(again, null, false, case when again.attempt >= 2 then 0 else again.attempt end,
                interval '0', case when again.attempt >= 2 then 'the claim expired twice' end, again.attempt >= 2);
            aside := true;
        else
            taken := again;
        end if;
    end loop;
end $$;
comment on function millrace_engine.take_over(bigint, text, bigint, bigint, bigint[], integer, timestamptz) is
    'Takes over one expired claim of a lane, or sets it aside as single deliveries.';
