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
