-- millrace_engine.publish_guard() returns trigger
-- Fires once per statement before any row of an INSERT or COPY into a stream, so that it always runs before the position is allocated.
-- On the transaction's first statement for this stream it
--   1. takes the shared advisory lock that carries L, the position allocated last, until the end of the transaction: readers stay
--      below L while the lock is held (horizon.sql);
--   2. tells the column default which segment to write to;
--   3. notifies, if somebody waits.
-- That it has run is remembered in a transaction-local setting whose value contains the transaction's id: a setting leaked by a
-- pooler into a later transaction would otherwise silence the lock, and messages would be lost.
-- Arguments: stream id, position sequence, state sequence (stream_state.sql). Enabled ALWAYS, on the stream and on every segment.
-- It is on every publisher's path, so it runs no query: conditions and assignments of single functions are far cheaper in PL/pgSQL.
create or replace function millrace_engine.publish_guard() returns trigger
language plpgsql volatile as $$
declare
    setting constant text := 'millrace.guard_' || tg_argv[0];
    done text := pg_current_xact_id()::text;
    state bigint;
begin
    if current_setting(setting, true) = done then
        return null;
    end if;
    if pg_advisory_xact_lock_shared((tg_argv[0]::bigint << 40)
            | (coalesce(pg_sequence_last_value(tg_argv[1]::regclass), 0) & 1099511627775)) is null then
        return null;   -- cannot be: a void is not null
    end if;
    state := pg_sequence_last_value(tg_argv[2]::regclass);
    if state >> 4 > extract(epoch from clock_timestamp()) then
        perform pg_notify('millrace', tg_argv[0]);
    end if;
    done := set_config('millrace.segment_' || tg_argv[0], (state & 15)::text, true) || set_config(setting, done, true);
    return null;
end $$;
comment on function millrace_engine.publish_guard() is
    'Statement trigger of every stream: locks the publisher''s position for readers, chooses the segment, wakes waiting consumers.';
