-- millrace.nack(claim, positions, delay_seconds, reason) returns void
-- Gives messages back to be delivered again after the delay; null means the group's backoff for this attempt. Positions that are null are none, as for
-- all who settle some. The reason is kept, but where only the claim ends (Ordered, Block, and Skip before the last attempt): no row of the message is
-- there to hold it.
-- Shared:  each message goes to the delivery table, or to the dead letters when it has had all its attempts; with queue policy Stately also when
--          another message of its key waits for its retry. The rest of the claim stays held.
-- Ordered: the claim ends. Everything in it that is not settled is delivered again, in order, after the delay: settle what is done
--          before. With failure policy Skip, messages that have had all their attempts become dead letters and are passed over.
--          With failure policy Park the claim stays held: each message waits in the delivery table with all later ones of its key in the
--          claim, which are settled in it with that, and other keys go on (park.sql). At the last attempt only it becomes a dead letter.
-- Raises: MR001 the claim has ended; MR004 a position that the claim does not hold (where only the claim ends, they are not looked at), or no such delay.
create or replace function millrace.nack(p_claim text, p_positions bigint[], p_delay_seconds double precision default null, p_reason text default null)
returns void
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the deliveries were few
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    g millrace_engine.consumer_group;
    c millrace_engine.claim;
    n integer;
begin
    if not millrace_engine.is_duration(p_delay_seconds) then
        raise exception 'a message cannot come back after % seconds', p_delay_seconds using errcode = 'MR004',
            hint = 'Pass 0 or more, up to a hundred years, or null for the backoff of the group.';
    end if;
    select * into g from millrace_engine.consumer_group x where x.id = t[1];
    if not found then
        raise exception 'the claim has ended: its group was dropped' using errcode = 'MR001', hint = 'Stop receiving for it, or create it again.';
    end if;
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        with held as (
            select d.*, g.max_attempts > 0 and d.attempt >= g.max_attempts or millrace_engine.retry_is_taken(d) as done from millrace_engine.delivery d
            where d.group_id = g.id and d.nonce = t[4] and d."position" = any (p_positions) for update
        ), dead as (
            insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
            select h.group_id, h."position", h.key, h.headers, h.payload, h.payload_bytes, h.created_at, h.attempt,
                   coalesce(p_reason, 'nacked'), millrace_engine.add_error(h.errors, h.attempt, p_reason), millrace_engine.clock()
            from held h where h.done
            on conflict on constraint dead_letter_position_unique do nothing
        ), gone as (
            delete from millrace_engine.delivery d using held h
            where d.id = h.id and h.done
        ), back as (
            update millrace_engine.delivery d set nonce = null, member = null, suspect = false,
                visible_at = millrace_engine.clock() + millrace_engine.delay(g, h.attempt, p_delay_seconds),
                errors = millrace_engine.add_error(h.errors, h.attempt, p_reason)
            from held h where d.id = h.id and not h.done
        )
        select count(*) into n from held;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001',
                hint = 'Pass positions that came with this claim and are not settled. If it has expired, its messages are delivered again.';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    if g.mode = 'Shared' then
        perform millrace_engine.set_aside(c, coalesce(p_positions, '{}'), g.max_attempts > 0 and c.attempt >= g.max_attempts,
            c.attempt, millrace_engine.delay(g, c.attempt, p_delay_seconds), coalesce(p_reason, 'nacked'), false);
        perform millrace_engine.settle_messages(c, p_positions);
    elsif g.failure_policy = 'Park' then
        if g.max_attempts > 0 and c.attempt >= g.max_attempts then
            perform millrace_engine.set_aside(c, coalesce(p_positions, '{}'), true, c.attempt, null, coalesce(p_reason, 'nacked'), false);
            perform millrace_engine.settle_messages(c, p_positions);
        else
            perform millrace_engine.park(c, g, p_positions, millrace_engine.delay(g, c.attempt, p_delay_seconds), coalesce(p_reason, 'nacked'));
        end if;
    elsif g.failure_policy = 'Skip' and g.max_attempts > 0 and c.attempt >= g.max_attempts then
        perform millrace_engine.set_aside(c, coalesce(p_positions, '{}'), true, c.attempt, null, coalesce(p_reason, 'nacked'), false);
        perform millrace_engine.settle_messages(c, p_positions);
        perform millrace_engine.give_back(c, g.stream_id, interval '0', 1);
    else
        perform millrace_engine.give_back(c, g.stream_id, millrace_engine.delay(g, c.attempt, p_delay_seconds), c.attempt + 1);
    end if;
end $$;
comment on function millrace.nack(text, bigint[], double precision, text) is
    'Gives messages of a claim back, to be delivered again after a delay.';

-- millrace.dead_letter(claim, positions, reason) returns void
-- Moves messages of the claim to the dead letters at once, whatever their attempt; the rest of the claim stays held.
-- Raises: MR001 the claim has ended; MR004 a position that the claim does not hold.
create or replace function millrace.dead_letter(p_claim text, p_positions bigint[], p_reason text) returns void
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
        with gone as (
            delete from millrace_engine.delivery d
            where d.group_id = t[1] and d.nonce = t[4] and d."position" = any (p_positions) returning d.*
        ), dead as (
            insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
            select h.group_id, h."position", h.key, h.headers, h.payload, h.payload_bytes, h.created_at, h.attempt,
                   coalesce(p_reason, ''), millrace_engine.add_error(h.errors, h.attempt, p_reason), millrace_engine.clock()
            from gone h on conflict on constraint dead_letter_position_unique do nothing
        )
        select count(*) into n from gone;
        if n < (select count(distinct p) from unnest(p_positions) p) then
            raise exception 'the claim does not hold all of these messages, or has ended' using errcode = 'MR001',
                hint = 'Pass positions that came with this claim and are not settled. If it has expired, its messages are delivered again.';
        end if;
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    perform millrace_engine.set_aside(c, coalesce(p_positions, '{}'), true, c.attempt, null, coalesce(p_reason, ''), false);
    perform millrace_engine.settle_messages(c, p_positions);
end $$;
comment on function millrace.dead_letter(text, bigint[], text) is 'Moves messages of a claim to the dead letters.';

-- millrace.release(claim) returns void
-- Gives the whole claim back at once and does not count the attempt. For a consumer that stops.
-- Raises: MR001 the claim has ended.
create or replace function millrace.release(p_claim text) returns void
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    stream integer;
begin
    select g.stream_id into stream from millrace_engine.consumer_group g where g.id = t[1];
    if not found then
        raise exception 'the claim has ended: its group was dropped' using errcode = 'MR001', hint = 'Stop receiving for it, or create it again.';
    end if;
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        if not millrace_engine.release_deliveries(t[1]::integer, t[4]) then
            raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
                hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
        end if;
        perform millrace_engine.announce(stream);
        return;
    end if;
    c := millrace_engine.hold_claim(t);
    perform millrace_engine.give_back(c, stream, interval '0', c.attempt);
end $$;
comment on function millrace.release(text) is 'Gives a claim back at once, without counting an attempt.';
