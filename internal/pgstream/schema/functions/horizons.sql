-- millrace_engine.horizons(stream ids) returns table (stream_id, last, horizon)
-- The horizons of many streams with one look at the locks, if any, as horizon.sql has it for one: every last position is read first, and the locks in a
-- later statement. The horizon is null on a standby, where it cannot be known. A stream that has no sequence, because it was dropped
-- meanwhile, is left out.
create or replace function millrace_engine.horizons(p_streams integer[]) returns table (stream_id integer, last bigint, horizon bigint)
language plpgsql volatile as $$
declare
    ids bigint[];
    tops bigint[];
begin
    select array_agg(x.id), array_agg(coalesce(pg_sequence_last_value(x.seq), 0)) into ids, tops
        from (select s as id, to_regclass('millrace_engine.position_' || s) as seq from unnest(p_streams) s offset 0) x where x.seq is not null;
    if pg_is_in_recovery() then
        return query select x.id::integer, x.h, null::bigint from unnest(ids, tops) x(id, h);
        return;
    end if;
    if millrace_engine.nobody_writes() then
        return query select x.id::integer, x.h, x.h from unnest(ids, tops) x(id, h);
        return;
    end if;
    return query
        select x.id::integer, x.h,
               least(x.h, min(x.h - (((x.h - (((k.classid::bigint & 255) << 32) | k.objid::bigint) + 549755813888) & 1099511627775) - 549755813888)))
        from unnest(ids, tops) x(id, h)
        left join pg_locks k on k.locktype = 'advisory' and k.objsubid = 1 and k.mode = 'ShareLock' and k.granted
             and k.classid::bigint >> 8 = x.id
             and k.database = (select d.oid from pg_database d where d.datname = current_database())
        group by x.id, x.h;
end $$;
comment on function millrace_engine.horizons(integer[]) is 'The horizons of many streams, with one look at the locks.';
