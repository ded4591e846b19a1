-- A claim's token is <group>.<lane>.<claim>.<nonce>; lane and claim are 0 when its messages come from the delivery table. Callers treat it
-- as opaque.
--
-- millrace_engine.parse_token(token) returns bigint[4]
-- Raises: MR004 when it is not a token.
create or replace function millrace_engine.parse_token(p_token text) returns bigint[]
language plpgsql immutable as $$
begin
    if p_token is null or p_token !~ '^[0-9]{1,10}\.[0-9]{1,10}\.[0-9]{1,18}\.[1-9][0-9]{0,17}$' then
        raise exception 'not a claim token' using errcode = 'MR004', hint = 'Pass the value of the column "claim" that receive returned.';
    end if;
    return string_to_array(p_token, '.')::bigint[];
end $$;

-- Advisory locks of the engine, in the two-integer key space, with a tag in the upper bits that applications are unlikely to use:
--   claim:   (0x40000000 + lane, claim)  shared by ack, nack and extend; exclusive, by try, for takeover
--   retries: (0x40000000, nonce)         the same for a claim of messages from the delivery table; no lane has number 0
--   settle:  (0x60000000 + lane, claim)  one transaction at a time settles messages of a claim: of two that do it for one token, as when a commit
--                                        whose answer was lost is tried again, the second must see what the first did
--   receive: (0x20000000 + group, 0)     serialises the receives of one group; in an Ordered group members with lanes of their own share it, and take
--            (0x20000000 + group, lane)
--   notify:  (0x30000000 + stream, 0)    by try: of the publishers of one stream that are open, one notifies (publish_guard_template.sql)
-- Who settles takes settle, claim, and then receive, if that at all. Who holds receive takes the others by try, or two would wait for each other.

-- millrace_engine.try_claim(lane, claim) returns boolean
-- Takes both locks of a claim, to take it back from its holder until the end of the transaction, unless somebody settles it just now. The caller
-- holds the receive lock.
create or replace function millrace_engine.try_claim(p_lane bigint, p_claim bigint) returns boolean
language plpgsql volatile as $$
begin
    return pg_try_advisory_xact_lock((1610612736 + p_lane)::integer, (p_claim & 2147483647)::integer)
        and pg_try_advisory_xact_lock((1073741824 + p_lane)::integer, (p_claim & 2147483647)::integer);
end $$;
comment on function millrace_engine.try_claim(bigint, bigint) is 'Locks a claim against whoever settles it, unless somebody does.';

-- millrace_engine.hold_retries(nonce) returns void
-- Keeps a claim of messages from the delivery table from being taken over until the end of the transaction. It is taken over as a whole
-- (receive_deliveries.sql), so that whoever lost one of its messages cannot commit the effects of the others with an ack.
create or replace function millrace_engine.hold_retries(p_nonce bigint) returns void
language plpgsql volatile as $$
begin
    perform pg_advisory_xact_lock_shared(1073741824, (p_nonce & 2147483647)::integer);
end $$;
