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
        end if;
    end loop;
end $$;
comment on function millrace_engine.wait_for(integer[]) is 'Asks publishers of these streams to notify for the next ten seconds.';
