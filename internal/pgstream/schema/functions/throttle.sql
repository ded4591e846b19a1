-- Throttled messages: of a dedupe key at most one in each slot of time. Slots lie side by side, counted from the epoch, so that all publishers have the same. A slot
-- is a dedupe key of its own, remembered until the slot ends: waiting for others, rollback and purge are as for every dedupe key (dedupe.sql).

-- millrace_engine.slot_start(seconds) returns timestamptz
-- When the present slot has begun.
create or replace function millrace_engine.slot_start(p_seconds integer) returns timestamptz
language sql volatile
return to_timestamp(floor(extract(epoch from millrace_engine.clock()) / p_seconds) * p_seconds);

-- millrace_engine.slot_keys(dedupe keys, seconds, start of the slot) returns text[]
-- The dedupe keys of that slot. A character that nobody types keeps them apart from those of others.
create or replace function millrace_engine.slot_keys(p_keys text[], p_seconds integer, p_start timestamptz) returns text[]
language sql immutable
return (select array_agg(k || chr(31) || p_seconds || chr(31) || extract(epoch from p_start)::bigint order by n) from unnest(p_keys) with ordinality u(k, n));

-- millrace_engine.check_throttle(dedupe keys, seconds, next slot, the message has a time, serialize) returns void
-- Raises: MR004.
create or replace function millrace_engine.check_throttle(p_keys text[], p_seconds integer, p_next boolean, p_timed boolean, p_serialize boolean) returns void
language plpgsql immutable as $$
begin
    if p_seconds is null then
        raise exception 'a message that waits for the next slot needs slots' using errcode = 'MR004', hint = 'Pass p_throttle_seconds, too.';
    end if;
    if p_seconds not between 1 and 31536000 then
        raise exception 'a message cannot be throttled to one in % seconds', p_seconds using errcode = 'MR004', hint = 'Use 1 to 31536000, a year.';
    end if;
    if p_keys is null or array_position(p_keys, null) is not null then
        raise exception 'a throttled message needs a dedupe key' using errcode = 'MR004',
            hint = 'Pass p_dedupe_key, of which there is to be one message in each slot.';
    end if;
    if exists (select from unnest(p_keys) k where octet_length(k) > 1024) then
        raise exception 'a dedupe key is longer than 1024 bytes' using errcode = 'MR004', hint = 'Use a hash of it.';
    end if;
    if p_next and (p_timed or p_serialize) then
        raise exception 'a message that may wait for the next slot has neither a time of its own nor p_serialize' using errcode = 'MR004',
            hint = 'Leave them out, or p_next_slot.';
    end if;
end $$;
