-- millrace_engine.hold_claim(token parts, to settle) returns millrace_engine.claim
-- Takes the shared lock on a range claim until the end of the transaction and returns the claim if it is still open and the token's own.
-- Ack against expiry would be a write skew in which both commit; the lock, and reading again after it in a new statement, prevent it.
-- To settle it waits for other transactions that do so for this claim. What was settled since the claim was made is added to its settled.
-- Raises: MR001 when the claim has ended; MR003 isolation level.
create or replace function millrace_engine.hold_claim(p_token bigint[], p_to_settle boolean default true) returns millrace_engine.claim
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the ledgers were nearly empty
as $$
declare
    c millrace_engine.claim;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        perform millrace_engine.refuse_isolation();
    end if;
    if p_to_settle then
        perform pg_advisory_xact_lock((1610612736 + p_token[2])::integer, (p_token[3] & 2147483647)::integer);
    end if;
    perform pg_advisory_xact_lock_shared((1073741824 + p_token[2])::integer, (p_token[3] & 2147483647)::integer);
    select d.* into c from millrace_engine.claim d
        where d.lane_id = p_token[2] and d.claim = p_token[3] and d.nonce = p_token[4]
          and exists (select from millrace_engine.lane l where l.id = d.lane_id)   -- gone with its group
          and not exists (select from millrace_engine.settlement s
              where s.lane_id = d.lane_id and s.claim = d.claim and s.kind in ('A', 'T', 'R'))
          and not exists (select from millrace_engine.claim s
              where s.lane_id = d.lane_id and s.claim > d.claim and s.claim <= d.claim + 64 and s.settles = d.claim)
        order by d.copy desc limit 1;
    if not found then
        raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
            hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
    end if;
    select coalesce(c.settled, '{}') + coalesce(range_agg(s.settled), '{}') into c.settled from millrace_engine.settlement s
        where s.lane_id = c.lane_id and s.claim = c.claim and s.kind = 'P';
    return c;
end $$;
comment on function millrace_engine.hold_claim(bigint[], boolean) is 'Locks a claim against takeover until the end of the transaction.';

-- millrace_engine.refuse_isolation() returns void
-- Whoever settles a claim must see a takeover that committed a moment ago. The snapshot of REPEATABLE READ or SERIALIZABLE may be older, and
-- then both would take effect.
-- Raises: MR003, always.
create or replace function millrace_engine.refuse_isolation() returns void
language plpgsql stable as $$
begin
    raise exception 'a claim can be settled only at isolation level read committed, not %', current_setting('transaction_isolation')
        using errcode = 'MR003', hint = 'An older snapshot would not see that another member has taken the claim over. Use a READ COMMITTED transaction.';
end $$;
