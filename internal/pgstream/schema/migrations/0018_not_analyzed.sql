-- 0018_not_analyzed.sql
-- What:  autovacuum no longer analyzes segments, ledgers and best-effort frames.
-- Why:   no plan of ours depends on their statistics. Collecting them has every session look through all plans that it keeps, and plan anew what
--        reads the table: with a thousand streams that was half of the processors' time.
-- Locks: share update exclusive on these tables. Publishing and receiving go on.
-- Cost:  none. Of more than a thousand streams, those beyond stay as they were: a transaction cannot hold any number of locks.
-- Skew:  none.

do $$
declare
    relation regclass;
begin
    for relation in
        select c.oid from pg_class c
            where c.relnamespace = 'millrace_engine'::regnamespace and c.relkind = 'r' and c.relname ~ '^(segment_\d+|claim|settlement|live_frame)_\d+$'
            order by c.relname ~ '^segment', c.oid limit 4000
    loop
        execute format('alter table %s set (autovacuum_analyze_threshold = 2147483647)', relation);
    end loop;
end $$;
