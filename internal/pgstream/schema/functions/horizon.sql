-- millrace_engine.horizon(stream id) returns bigint
-- The highest position that is safe to read: every position up to it is committed or will never exist.
--
-- H, the last allocated position, is read first; then the lowest L among the publishers that are still open. An open publisher whose
-- position is at most H already held its lock when H was read, because it locks before it allocates; and locks are released only
-- after the commit is visible. Hence horizon = least(H, min L). The order of the two reads matters, and the caller must read the log
-- in a later statement, in READ COMMITTED.
--
-- Listing the locks costs as much as there are locks in the whole server, 6 ms with 10,000 of them. Mostly nobody is writing, and then it can be done without
-- (nobody_writes).
--
-- The lock's key is 24 bits of stream and the low 40 bits of L, decoded relative to H (L may also be a little above H).
-- Only locks of this database, granted, in share mode count.
create or replace function millrace_engine.horizon(p_stream integer) returns bigint
language plpgsql volatile as $$
declare
    h bigint;
    l bigint;
begin
    if pg_is_in_recovery() then
        raise exception 'the horizon cannot be read on a standby: the publishers'' locks are only on the primary'
            using errcode = 'MR003', hint = 'Connect to the primary.';
    end if;
    h := coalesce(pg_sequence_last_value(('millrace_engine.position_' || p_stream)::regclass), 0);
    if millrace_engine.nobody_writes() then
        return h;
    end if;
    select min(h - (((h - (((k.classid::bigint & 255) << 32) | k.objid::bigint) + 549755813888) & 1099511627775) - 549755813888))
        into l
        from pg_locks k
        where k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
          and k.classid::bigint >> 8 = p_stream
          and k.database = (select d.oid from pg_database d where d.datname = current_database());
    return least(h, l);
end $$;
comment on function millrace_engine.horizon(integer) is
    'Highest position of a stream that is safe to read: everything up to it is committed or will never exist.';

-- millrace_engine.nobody_writes() returns boolean
-- Whether no transaction of the server that has an id is open; false also when that is not known. A publisher gets its id before it allocates a position
-- (publish_guard_template.sql). So whoever reads the last position first, and hears then that nobody writes, knows that every position up to it is committed or will never exist,
-- and that later statements see it.
-- A snapshot lists the open transactions below its xmax. That none has begun since is what pg_xact_status says by its error: xmax has not been handed out. (age() would say so without
-- an error, but only once per transaction.) A caller that has an id itself may have published.
create or replace function millrace_engine.nobody_writes() returns boolean
language plpgsql volatile as $$
declare
    s pg_snapshot := pg_current_snapshot();
begin
    if right(s::text, 1) <> ':' or pg_current_xact_id_if_assigned() is not null then
        return false;
    end if;
    perform pg_xact_status(pg_snapshot_xmax(s));
    return false;
exception when invalid_parameter_value then
    return true;
end $$;
comment on function millrace_engine.nobody_writes() is 'Whether no transaction of the server that has an id is open.';
