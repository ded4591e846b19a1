-- millrace_engine.publish_guard_template() returns trigger
-- Copied once per stream (install_functions.sql). Fires once per statement before any row of an INSERT or COPY into a stream, so that it always runs
-- before the position is allocated. On the transaction's first statement for this stream it
--   1. takes the shared advisory lock that carries L, the position allocated last, until the end of the transaction: readers stay
--      below L while the lock is held (horizon.sql). If somebody has ever waited for the stream, it makes sure that L is still no more than 7 behind, so
--      that readers need not list all locks;
--   2. tells the column default which segment to write to;
--   3. notifies, if somebody waits, unless somebody has notified in the same millisecond or has yet to commit a notification.
-- That it has run is remembered in a transaction-local setting: a letter for the segment, which the column default reads, and the transaction's id. Without
-- the id, a setting leaked by a pooler into a later transaction would silence the lock, and messages would be lost.
-- PostgreSQL holds one lock for all notifying transactions of the server while they flush their commit. Without a limit, one waiting consumer would cost
-- all publishers their group commit: 1,200 instead of 3,500 transactions a second, and where a flush takes longer than a millisecond they would queue for
-- it. So whoever notifies holds a lock of the stream until its end, and whoever does not get that leaves it at that: until then nobody sees its message
-- either, as its position is above the other's L, and L was locked first. Who is not announced is found by the consumer that was woken, which looks
-- again after one millisecond, two, four (wake.go); or by the scout, when the other one rolls back.
-- PostgreSQL cannot PREPARE a transaction that has notified: whoever uses two-phase commit sets millrace.notify to off, and waiting consumers poll.
-- A child of a stream with priorities asks the state of its parent whether somebody waits, and notifies the parent (install_functions.sql).
-- Enabled ALWAYS, on the stream and on every segment. It is on every publisher's path, so it runs no query: conditions and assignments of single
-- functions are far cheaper in PL/pgSQL. Each operator costs about a thousand instructions, whether it is evaluated or not, because PL/pgSQL prepares
-- an expression again in each transaction; hence conditions within conditions. It is declared stable because PL/pgSQL takes a new snapshot for each
-- expression of a volatile function. Nothing here reads by a snapshot, neither sequences nor locks nor settings, and nobody plans a trigger.
create or replace function millrace_engine.publish_guard_template() returns trigger
language plpgsql stable as $$
declare
    state bigint;
    l bigint;
    now_ms bigint;
    guard text;
begin
    if pg_current_xact_id_if_assigned() is not null then   -- or this cannot be the second time
        if substr(current_setting('millrace.guard_template', true), 2) = pg_current_xact_id()::text then
            return null;
        end if;
    end if;
    state := pg_sequence_last_value('millrace_engine.state_template');
    -- This gives the transaction its id, before the last position is read: otherwise a reader could hear that nobody writes (horizon.sql), and pass it by without seeing its lock.
    guard := set_config('millrace.guard_template', chr(97 + (state & 15)::integer) || pg_current_xact_id()::text, true);
    if /* waiting */ state > 15 then   -- somebody has waited, ever
        l := coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0);
        if pg_advisory_xact_lock_shared((/* stream id */ 0::bigint << 40) | (l & 1099511627775)) is null   -- cannot be: a void is not null
                or pg_sequence_last_value('millrace_engine.position_template') > l then
            while pg_sequence_last_value('millrace_engine.position_template') - l > 7 loop
                l := pg_sequence_last_value('millrace_engine.position_template');
                if pg_advisory_xact_lock_shared((/* stream id */ 0::bigint << 40) | (l & 1099511627775)) is null then
                    return null;
                end if;
            end loop;
        end if;
        if to_timestamp(/* waiting */ state >> 4) > clock_timestamp() then
            now_ms := (date_part('epoch', clock_timestamp()) * 1000)::bigint;
            if now_ms <> pg_sequence_last_value('millrace_engine.notified_template') then
                if current_setting('millrace.notify', true) is distinct from 'off' then
                    if pg_try_advisory_xact_lock(805306368 + /* stream id */ 0, 0) then
                        now_ms := setval('millrace_engine.notified_template', now_ms);
                        if pg_notify('millrace', '/* notified stream */ 0') is null then   -- PERFORM would run a query
                            return null;
                        end if;
                    end if;
                end if;
            end if;
        end if;
    elsif pg_advisory_xact_lock_shared((/* stream id */ 0::bigint << 40)
            | (coalesce(pg_sequence_last_value('millrace_engine.position_template'), 0) & 1099511627775)) is null then
        return null;
    end if;
    return null;
end $$;
comment on function millrace_engine.publish_guard_template() is
    'Statement trigger of every stream: locks the publisher''s position for readers, chooses the segment, wakes waiting consumers.';
