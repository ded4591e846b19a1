-- millrace_engine.publish_guard() returns trigger
-- Fires once per statement before any row of an INSERT or COPY into a stream, so that it always runs before the position is allocated.
-- On the transaction's first statement for this stream it
--   1. takes the shared advisory lock that carries L, the position allocated last, until the end of the transaction: readers stay
--      below L while the lock is held (horizon.sql);
--   2. tells the column default which segment to write to;
--   3. notifies, if somebody waits.
-- That it has run is remembered in a transaction-local setting whose value contains the transaction's id: a setting leaked by a
-- pooler into a later transaction would otherwise silence the lock, and messages would be lost.
-- Arguments: stream id, sequence name. Enabled ALWAYS, on the stream and on every segment.
create or replace function millrace_engine.publish_guard() returns trigger
language plpgsql volatile as $$
declare
    done text := tg_argv[0] || '/' || pg_current_xact_id()::text;
    last bigint;
    state record;
begin
    if current_setting('millrace.guard_' || tg_argv[0], true) = done then
        return null;
    end if;
    last := coalesce(pg_sequence_last_value(tg_argv[1]::regclass), 0);
    perform pg_advisory_xact_lock_shared((tg_argv[0]::bigint << 40) | (last & 1099511627775));
    select s.segment, s.waiting_until > clock_timestamp() as waiting into strict state
        from millrace_engine.stream_state s where s.stream_id = tg_argv[0]::integer;
    if state.waiting then
        perform pg_notify('millrace', tg_argv[0]);
    end if;
    perform set_config('millrace.segment_' || tg_argv[0], state.segment::text, true),
            set_config('millrace.guard_' || tg_argv[0], done, true);
    return null;
end $$;
comment on function millrace_engine.publish_guard() is
    'Statement trigger of every stream: locks the publisher''s position for readers, chooses the segment, wakes waiting consumers.';
