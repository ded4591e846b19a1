-- millrace_engine.note_claimed_template(claim, low, high, n) returns void
-- Corrects what claim_next supposed when only n messages were found: positions that rollbacks left empty are noted as settled; a claim without
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
