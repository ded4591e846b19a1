-- 0002_ledger_ring.sql
-- What:  the number of the current ledger ring moves from a table to a sequence; a claim can say which claim it settles; a group's row has all that
--        a receive must know before it takes the group's lock.
-- Why:   every receive and every ack asks for the ring, and reading a sequence costs a tenth of a query. With `settles`, acking one claim and
--        making the next is one row instead of two. Joining four tables was a third of a receive.
-- Locks: access exclusive on the ledgers, for moments.
-- Cost:  milliseconds: a new column without a default rewrites nothing.

create sequence millrace_engine.ring as smallint minvalue 0 maxvalue 2 start 0 cache 1 no cycle;
comment on sequence millrace_engine.ring is 'Which of the three ledger rings new rows go to.';
select setval('millrace_engine.ring', l.ring) from millrace_engine.ledger l;
drop table millrace_engine.ledger;

-- The claim of the same lane, at most 64 before this one, that was acked by the call that made this one.
alter table millrace_engine.claim add column settles bigint;
-- The segment that had the claim's newest message: a hint, where to look first for those after it.
alter table millrace_engine.claim add column segment smallint;

alter table millrace_engine.consumer_group
    add column lane_id bigint,                                  -- Shared: the lane
    add column recheck_at timestamptz not null default 'infinity', -- when a claim was given back: look at the open claims then, whatever next_check says
    add column first_position bigint not null default 1;        -- nothing below it is delivered; follows the stream's trim mark
update millrace_engine.consumer_group g set first_position = s.first_position from millrace_engine.stream s where s.id = g.stream_id;
update millrace_engine.consumer_group g set lane_id = l.id, recheck_at = l.recheck_at from millrace_engine.lane l where l.group_id = g.id and g.mode = 'Shared';
alter table millrace_engine.lane drop column recheck_at;

-- receive has a new parameter; the copies of every stream are made again with the new functions.
do $$
declare
    f regprocedure;
begin
    for f in select p.oid from pg_proc p where p.pronamespace = 'millrace_engine'::regnamespace and p.proname ~ '^receive_(template|[0-9]+)$' loop
        execute 'drop function ' || f;
    end loop;
    drop function if exists millrace.receive(text, text, text, integer, double precision, text);
    drop function if exists millrace_engine.raise_floor(millrace_engine.claim);
    drop function if exists millrace_engine.lane_progress(bigint);
end $$;
