-- millrace_engine.set_aside(claim, positions, dead, attempt, delay, reason, suspect) returns void
-- Copies messages of a held range claim, payload included, to the delivery table or to the dead letters, so that they never keep the
-- claim or a segment from being finished with. positions null: everything in the claim that is not settled and was not trimmed. The caller settles
-- them in the claim.
create or replace function millrace_engine.set_aside(p_claim millrace_engine.claim, p_positions bigint[], p_dead boolean, p_attempt integer,
    p_delay interval, p_reason text, p_suspect boolean) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    source record;
    low_ bigint := p_claim.low;
    wanted text;
begin
    select st.name, st.first_position, l.slot_low, l.slot_high, l.group_id, g.filter,
           case st.payload_type when 'JSON' then 'm.payload, null::bytea' else 'null::jsonb, m.payload' end as payload
        into strict source
        from millrace_engine.lane l
        join millrace_engine.consumer_group g on g.id = l.group_id
        join millrace_engine.stream st on st.id = g.stream_id
        where l.id = p_claim.lane_id;
    if p_positions is null then
        low_ := greatest(low_, source.first_position - 1);
    end if;
    -- The filter may have changed since the claim: what is named was handed out and is kept.
    wanted := format('from millrace.%I m where m."position" > $1 and m."position" <= $2 and millrace_engine.slot(m.key, m."position") between %s and %s - 1
        and not $3 @> m."position" and case when $4 is null then millrace_engine.matches(%L, m.key, m.headers) else m."position" = any ($4) end', source.name, source.slot_low, source.slot_high, source.filter);
    if p_dead then
        execute format('insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at,
                attempts, reason, errors, dead_at)
            select %s, m."position", m.key, m.headers, %s, m.created_at, $5, $6, millrace_engine.add_error(''[]'', $5, $6), millrace_engine.clock() %s
            on conflict on constraint dead_letter_position_unique do nothing', source.group_id, source.payload, wanted)
            using low_, p_claim.high, coalesce(p_claim.settled, '{}'), p_positions, p_attempt, p_reason;
    else
        execute format('insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at,
                attempt, visible_at, suspect, errors)
            select %s, m."position", m.key, m.headers, %s, m.created_at, $5, millrace_engine.clock() + $7, $8,
                millrace_engine.add_error(''[]'', $5, $6) %s
            on conflict on constraint delivery_position_unique do nothing', source.group_id, source.payload, wanted)
            using low_, p_claim.high, coalesce(p_claim.settled, '{}'), p_positions, p_attempt, p_reason, p_delay, p_suspect;
    end if;
end $$;

-- millrace_engine.give_back(claim, stream, delay, next attempt) returns void
-- Ends a held claim so that its unsettled messages are claimed again, in order, after the delay.
create or replace function millrace_engine.give_back(p_claim millrace_engine.claim, p_stream integer, p_delay interval, p_next_attempt integer)
returns void
language plpgsql volatile as $$
declare
    due timestamptz := millrace_engine.clock() + p_delay;
begin
    insert into millrace_engine.settlement (lane_id, claim, at, expires_at, next_attempt, ring, kind)
        values (p_claim.lane_id, p_claim.claim, millrace_engine.clock(), due, p_next_attempt, pg_sequence_last_value('millrace_engine.ring'), 'R');
    -- Ordered groups look at their one open claim anyway, and would wait here for a caller whose transaction stays open.
    update millrace_engine.consumer_group g set recheck_at = least(g.recheck_at, due) from millrace_engine.lane l
        where l.id = p_claim.lane_id and g.id = l.group_id and g.mode = 'Shared';
    if p_delay <= interval '0' then
        perform millrace_engine.announce(p_stream);
    end if;
end $$;

-- millrace_engine.delay(group, attempt, asked for) returns interval
-- The caller's delay, or exponential backoff with half of it at random so that messages nacked together do not come back together.
create or replace function millrace_engine.delay(p_group millrace_engine.consumer_group, p_attempt integer, p_seconds double precision)
returns interval
language sql volatile
return make_interval(secs => coalesce(p_seconds,
    least(p_group.backoff_initial_ms * power(2, least(p_attempt - 1, 40)), p_group.backoff_max_ms) / 1000.0 * (0.5 + random() / 2)));

-- millrace_engine.add_error(errors, attempt, reason) returns jsonb
-- The error history, newest last, at most ten entries of at most 1,000 characters.
create or replace function millrace_engine.add_error(p_errors jsonb, p_attempt integer, p_reason text) returns jsonb
language sql volatile
return case when p_reason is null then p_errors else
    (case when jsonb_array_length(p_errors) >= 10 then p_errors - 0 else p_errors end)
    || jsonb_build_object('attempt', p_attempt, 'at', millrace_engine.clock(), 'error', left(p_reason, 1000)) end;
