-- millrace_engine.horizon_holder(stream id) returns integer
-- The backend whose open transaction holds the horizon back furthest, or null. For status and for people on call.
create or replace function millrace_engine.horizon_holder(p_stream integer) returns integer
language sql volatile
begin atomic
    select k.pid
    from pg_locks k
    where k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
      and k.classid::bigint >> 8 = p_stream
      and k.database = (select d.oid from pg_database d where d.datname = current_database())
    order by ((k.classid::bigint & 255) << 32) | k.objid::bigint, k.pid
    limit 1;
end;
comment on function millrace_engine.horizon_holder(integer) is
    'Process id of the open transaction that published to the stream longest ago, null when there is none.';

-- millrace_engine.horizon_holders() returns table (stream_id, holder, since)
-- For each stream that an open transaction has published to, with one look at the locks: the one that published longest ago, 'pid 123' or
-- 'prepared transaction <gid>', and when it began. since is null where the caller may not see that of other users' sessions.
create or replace function millrace_engine.horizon_holders() returns table (stream_id integer, holder text, since timestamptz)
language plpgsql volatile as $$
begin
    return query
        with lock as materialized (
            select k.* from pg_locks k where k.granted and (k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock'
                and k.database = (select d.oid from pg_database d where d.datname = current_database())
                or k.locktype = 'transactionid' and k.pid is null)   -- a prepared transaction has no backend; this lock tells which it is
        )
        select distinct on (x.stream) x.stream, coalesce('pid ' || x.pid, 'prepared transaction ' || p.gid, 'an unknown transaction'),
               coalesce(a.xact_start, p.prepared)
        from (select (k.classid::bigint >> 8)::integer as stream, ((k.classid::bigint & 255) << 32) | k.objid::bigint as l, k.pid, k.virtualtransaction
              from lock k where k.locktype = 'advisory') x
        left join pg_stat_activity a on a.pid = x.pid
        left join lock t on x.pid is null and t.locktype = 'transactionid' and t.virtualtransaction = x.virtualtransaction
        left join pg_prepared_xacts p on p.transaction = t.transactionid
        order by x.stream, x.l, coalesce(a.xact_start, p.prepared), x.pid;
end $$;
comment on function millrace_engine.horizon_holders() is 'Which open transactions hold the horizons of streams back.';
