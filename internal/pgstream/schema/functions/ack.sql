-- millrace.ack(claim) returns void
-- Settles every message of the claim. In the caller's transaction: effect and ack commit together, which makes the effect exactly once.
-- Raises: MR001 the claim has ended; nothing is settled then, and the caller must undo what it did for these messages; MR003 isolation level.
create or replace function millrace.ack(p_claim text) returns void
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
begin
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        delete from millrace_engine.delivery d where d.group_id = t[1] and d.nonce = t[4];
    else
        if current_setting('transaction_isolation') <> 'read committed' then
            perform millrace_engine.refuse_isolation();
        end if;
        -- As hold_claim, with the settlement in the same statement: this is the hot path.
        perform pg_advisory_xact_lock((1610612736 + t[2])::integer, (t[3] & 2147483647)::integer),
                pg_advisory_xact_lock_shared((1073741824 + t[2])::integer, (t[3] & 2147483647)::integer);
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            select c.lane_id, c.claim, millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'A'
            from millrace_engine.claim c
            where c.lane_id = t[2] and c.claim = t[3] and c.nonce = t[4]
              and not exists (select from millrace_engine.settlement s
                  where s.lane_id = t[2] and s.claim = t[3] and s.kind in ('A', 'T', 'R'))
              and not exists (select from millrace_engine.claim s
                  where s.lane_id = t[2] and s.claim > t[3] and s.claim <= t[3] + 64 and s.settles = t[3])
            limit 1;
    end if;
    if not found then
        raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
            hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
    end if;
end $$;
comment on function millrace.ack(text) is 'Settles all messages of a claim, in the caller''s transaction.';

-- millrace.ack_messages(claim, positions) returns void
-- Settles some messages of the claim; the rest stay held. The last of them settles the claim.
-- Raises: MR001 the claim has ended, or one of the messages is settled already; MR004 a position that the claim does not hold.
create or replace function millrace.ack_messages(p_claim text, p_positions bigint[]) returns void
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the deliveries were few
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    n integer;
begin
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        delete from millrace_engine.delivery d where d.group_id = t[1] and d.nonce = t[4] and d."position" = any (p_positions);
        get diagnostics n = row_count;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001',
                hint = 'Pass positions that came with this claim and are not settled. If it has expired, its messages are delivered again.';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    if exists (select from unnest(p_positions) p where c.settled @> p) then
        raise exception 'some of these messages are settled already' using errcode = 'MR001', hint = 'Their effect is done; undo this one.';
    end if;
    perform millrace_engine.settle_messages(c, p_positions);
end $$;
comment on function millrace.ack_messages(text, bigint[]) is 'Settles some messages of a claim, in the caller''s transaction.';

-- millrace_engine.settle_messages(claim, positions) returns void
-- Notes progress inside a held range claim, and settles the claim when nothing is left in it.
create or replace function millrace_engine.settle_messages(p_claim millrace_engine.claim, p_positions bigint[]) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    done int8multirange;
    progress int8multirange;
    total bigint;
    rest boolean;
    source text;
begin
    select range_agg(int8range(p, p, '[]')) into progress from unnest(p_positions) p;
    if progress is null then
        return;
    end if;
    if not int8range(p_claim.low, p_claim.high, '(]') @> range_merge(progress) then
        raise exception 'the claim does not hold all of these positions' using errcode = 'MR004',
            hint = 'Pass positions that came with this claim.';
    end if;
    insert into millrace_engine.settlement (lane_id, claim, at, ring, kind, settled)
        values (p_claim.lane_id, p_claim.claim, millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'P', progress);
    select coalesce(range_agg(s.settled), '{}') + coalesce(p_claim.settled, '{}') into done from millrace_engine.settlement s
        where s.lane_id = p_claim.lane_id and s.claim = p_claim.claim and s.kind = 'P';
    select coalesce(sum(upper(r) - lower(r)), 0) into total from unnest(done) r;
    if total < p_claim.messages then
        return;
    end if;
    -- Enough positions to be everything; make sure that they are the right ones before the rest is given up.
    select format('select exists (select from millrace.%I m where m."position" > $1 and m."position" <= $2
            and millrace_engine.slot(m.key, m."position") between %s and %s - 1 and not $3 @> m."position"
            and millrace_engine.matches(%L, m.key, m.headers))', st.name, l.slot_low, l.slot_high, g.filter) into source
        from millrace_engine.lane l
        join millrace_engine.consumer_group g on g.id = l.group_id
        join millrace_engine.stream st on st.id = g.stream_id
        where l.id = p_claim.lane_id;
    execute source into rest using p_claim.low, p_claim.high, done;
    if not rest then
        insert into millrace_engine.settlement (lane_id, claim, at, ring, kind)
            values (p_claim.lane_id, p_claim.claim, millrace_engine.clock(), pg_sequence_last_value('millrace_engine.ring'), 'A');
    end if;
end $$;
