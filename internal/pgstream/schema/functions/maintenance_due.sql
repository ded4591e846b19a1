-- What a round of maintenance has to look at. A database of a thousand streams at rest must not be asked a thousand questions every half minute, so one
-- statement says which of them are worth one. Both functions may name what needs nothing, and never leave out what does, beyond the next round.

-- millrace_engine.streams_to_maintain() returns table (id, name)
-- The streams for which maintain_stream (maintain_stream.sql) may have something to do:
--   * a segment besides the current one holds something that retention may no longer keep;
--   * the current one may have to be left, or is wholly below the trim mark;
--   * a group can lapse.
-- Cost: a look at one sequence for a stream that was never published to, and at the sizes of its segments for another. No table is read.
create or replace function millrace_engine.streams_to_maintain() returns table (id integer, name text)
language sql volatile
set enable_seqscan = off
set jit = off
as $$
    select s.id, s.name
        from millrace_engine.stream s
        cross join lateral (select pg_sequence_last_value(to_regclass('millrace_engine.position_' || s.id)) as last) p
        cross join lateral (
            select coalesce(sum(b.bytes) filter (where b.number = b.present), 0) as present, coalesce(sum(b.bytes) filter (where b.number <> b.present), 0) as others
            from (select k as number, pg_relation_size(to_regclass(format('millrace_engine.segment_%s_%s', s.id, k))) as bytes,
                         pg_sequence_last_value(to_regclass('millrace_engine.state_' || s.id)) & 15 as present
                  from generate_series(0, s.segments - 1) k where p.last is not null) b) z
        where z.others > 0
           or z.present > 0 and (p.last < s.first_position
                or s.max_messages > 0
                or z.present > coalesce(nullif(s.max_bytes, 0) / s.segments, 1073741824)
                or s.max_age_seconds > 0 and clock_timestamp() > s.segment_started_at + make_interval(secs => s.max_age_seconds / (s.segments - 1.0))
                or s.retention_policy <> 'Limits' and z.present > 67108864)
           or exists (select from millrace_engine.consumer_group g where g.stream_id = s.id and g.parent_id is null and g.lapsed_at is null
                and (g.lapse_lag > 0 or g.lapse_after_seconds > 0))
        order by s.id;
$$;
comment on function millrace_engine.streams_to_maintain() is 'The streams that a round of maintenance has to look at.';

-- millrace_engine.groups_to_carry() returns setof integer
-- The groups for which carry_over (rotate_ledger.sql) may have something to do: those with a lane whose newest row, or a row above its floor, is not in the
-- current ring, or that has stragglers.
-- Cost: two probes of the ledger for each lane.
create or replace function millrace_engine.groups_to_carry() returns setof integer
language sql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
    select g.id
        from millrace_engine.consumer_group g
        cross join (select pg_sequence_last_value('millrace_engine.ring'::regclass) as present) r
        where exists (
            select from millrace_engine.lane l
            cross join lateral (select c.ring, c.floor, c.stragglers from millrace_engine.claim c where c.lane_id = l.id order by c.claim desc limit 1) n
            where l.group_id = g.id and (n.ring <> r.present or n.stragglers is not null
                or exists (select from millrace_engine.claim c where c.lane_id = l.id and c.claim > n.floor and c.ring <> r.present)))
        order by g.id;
$$;
comment on function millrace_engine.groups_to_carry() is 'The consumer groups whose claims a rotation of the ledgers has to carry over.';
