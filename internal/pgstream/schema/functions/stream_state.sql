-- What every publishing transaction must know about its stream is kept in a sequence, state_<stream id>, because reading one costs a tenth of a
-- query, and changing one leaves no dead row behind: the lower four bits are the segment for new messages, the others the time, in seconds
-- since 1970, until which somebody waits for notifications. A value that is a moment old does no harm.

-- millrace_engine.set_state(stream id, segment or null, waiting until or null) returns void
-- Changes what is not null. Takes effect at once, whatever becomes of the transaction.
create or replace function millrace_engine.set_state(p_stream integer, p_segment integer, p_until timestamptz) returns void
language plpgsql volatile as $$
declare
    state constant regclass := 'millrace_engine.state_' || p_stream;
    old bigint;
begin
    perform pg_advisory_xact_lock(1836019571, p_stream);
    old := pg_sequence_last_value(state);
    perform setval(state, (coalesce(ceil(extract(epoch from p_until))::bigint, old >> 4) << 4) | coalesce(p_segment, old & 15));
end $$;

-- millrace_engine.segment(stream id) returns smallint
-- The segment that new messages go to.
create or replace function millrace_engine.segment(p_stream integer) returns smallint
language sql volatile
return pg_sequence_last_value(('millrace_engine.state_' || p_stream)::regclass) & 15;

-- millrace_engine.wait_for(stream ids) returns void
-- Registers interest for ten seconds: publishers notify until then. Renewed when half used up, so a member that waits after every message
-- does not miss those published in between.
create or replace function millrace_engine.wait_for(p_streams integer[]) returns void
language plpgsql volatile as $$
declare
    id integer;
begin
    foreach id in array p_streams loop
        if pg_sequence_last_value(('millrace_engine.state_' || id)::regclass) >> 4 < extract(epoch from clock_timestamp()) + 5 then
            perform millrace_engine.set_state(id, null, clock_timestamp() + interval '10 seconds');
            perform millrace_engine.confirm_fresh_locks(id);
        end if;
    end loop;
end $$;
-- millrace_engine.confirm_fresh_locks(stream id) returns void
-- Marks a stream that somebody has waited for, and its lanes, when every open publisher has made sure that the L of its lock is recent (publish_guard_template.sql). One that began before
-- anybody waited, or before an upgrade, may not have. It holds the lock that an INSERT takes on the table, which it took before the trigger was called. So whoever does not hold such a lock now, will see the
-- new state, and with it the new function, because a lock that has to be taken brings the news about functions. Those who hold one are remembered; when none of them is left, there is nobody.
-- Looked for whenever a wait is registered, until it is so: then for one indexed row.
-- Runs with its owner's rights: the runtime role calls it by wait_for, and may change no stream.
-- Locks: the stream's row, and never waits for it.
create or replace function millrace_engine.confirm_fresh_locks(p_stream integer) returns void
language plpgsql volatile
security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
as $$
declare
    s record;
    holders text[];
begin
    for s in select x.id, x.suspects, to_regclass(format('millrace.%I', x.name)) as log from millrace_engine.stream x
             where coalesce(x.parent_id, x.id) = p_stream and not x.fresh_locks for no key update skip locked loop
        select coalesce(array_agg(distinct k.virtualtransaction), '{}') into holders
            from pg_locks k
            where k.locktype = 'relation' and k.granted and k.mode <> 'AccessShareLock'
              and k.database = (select d.oid from pg_database d where d.datname = current_database())
              and k.relation in (select t.relid from pg_partition_tree(s.log) t)
              and k.virtualtransaction = any(coalesce(s.suspects, array[k.virtualtransaction]));   -- a prepared transaction keeps its name
        update millrace_engine.stream x set fresh_locks = holders = '{}', suspects = nullif(holders, '{}') where x.id = s.id;
    end loop;
end $$;
comment on function millrace_engine.confirm_fresh_locks(integer) is 'Marks a stream when all open publishers have made sure that their locks are recent.';

comment on function millrace_engine.wait_for(integer[]) is 'Asks publishers of these streams to notify for the next ten seconds.';
