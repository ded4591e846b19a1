-- What a change of a stream's retention would remove, for whoever has to approve it. Nothing is locked or changed, so it is what would go if nothing were
-- published or acked from now on.

-- millrace_engine.removable_segments(stream) returns table (segment, messages, bytes, newest)
-- The segments that maintenance would remove one after the other under the settings given, which need not be those that the stream has (its id says which
-- one is meant), the oldest first. The segment that is written to counts too, because it is rotated before its messages are due.
-- messages: positions from its first to its last, so an upper bound.
create or replace function millrace_engine.removable_segments(s millrace_engine.stream)
returns table (segment smallint, messages bigint, bytes bigint, newest timestamptz)
language plpgsql volatile as $$
declare
    has constant integer := (select x.segments from millrace_engine.stream x where x.id = s.id);
    last_ constant bigint := coalesce(pg_sequence_last_value(('millrace_engine.position_' || s.id)::regclass), 0);
    left_ bigint;
    keep_from bigint;
    top record;
begin
    if s.retention_policy <> 'Limits' then
        select min(t.ack_floor) into keep_from from millrace_engine.progress(array[s.id]) t
            join millrace_engine.consumer_group g on g.id = t.group_id where g.lapsed_at is null;
        if s.retention_policy = 'WorkQueue' and not exists (select from millrace_engine.consumer_group g where g.stream_id = s.id) then
            keep_from := 0;
        end if;
    end if;
    select coalesce(sum(pg_total_relation_size(to_regclass(format('millrace_engine.segment_%s_%s', s.id, i)))), 0) into left_ from generate_series(0, has - 1) i;
    for k in 1 .. has loop
        segment := (millrace_engine.segment(s.id) + k) % has;
        continue when to_regclass(format('millrace_engine.segment_%s_%s', s.id, segment)) is null;
        execute format('select x."position", x.created_at from millrace_engine.segment_%s_%s x order by x."position" desc limit 1', s.id, segment) into top;
        continue when top."position" is null;
        exit when not millrace_engine.removable(s, top."position", top.created_at, keep_from, last_, left_);
        messages := millrace_engine.segment_span(s.id, segment);
        bytes := pg_total_relation_size(to_regclass(format('millrace_engine.segment_%s_%s', s.id, segment)));
        newest := top.created_at;
        left_ := left_ - bytes;
        return next;
    end loop;
end $$;
comment on function millrace_engine.removable_segments(millrace_engine.stream) is 'Segments that maintenance would remove under other settings.';
