-- millrace_engine.lapse_groups(stream id) returns text[]
-- Ends the groups of a stream that have broken a limit of theirs, and returns what it did. Part of maintain_stream, which holds the stream's row.
-- A group lapses
--   * when its lag is above lapse_lag;
--   * when for lapse_after_seconds messages have been waiting and nobody has worked: claimed, held a claim or a retry, or, in an Ordered group, been
--     a member. A paused group does not lapse by time. A reset begins the time anew.
-- A group that has lapsed keeps nothing from being removed any more, and receive refuses it; its retries and dead letters stay, and claims that are
-- open can be settled. millrace.reset_group brings it back.
-- Of a stream with priorities the groups of all priorities count together, and lapse together.
-- Nothing on the way of a message says when a group has worked, so this notes the newest claims that it has seen, at most ten times in
-- lapse_after_seconds: a group never lapses early, and at most by a tenth and one round late.
create or replace function millrace_engine.lapse_groups(p_stream integer) returns text[]
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    did text[] := '{}';
    g record;
    p record;
    reason text;
    idle interval;
    all_ integer[];
begin
    for g in select x.id, x.name, x.mode, x.paused, x.lapse_lag, x.lapse_after_seconds from millrace_engine.consumer_group x
             where x.stream_id = p_stream and x.parent_id is null and x.lapsed_at is null and (x.lapse_lag > 0 or x.lapse_after_seconds > 0)
             order by x.name loop
        all_ := array(select x.id from millrace_engine.consumer_group x where x.id = g.id or x.parent_id = g.id);
        select sum(t.lag)::bigint as lag, min(t.oldest) as oldest into p
            from millrace_engine.progress(array(select x.stream_id from millrace_engine.consumer_group x where x.id = any (all_))) t
            where t.group_id = any (all_);
        reason := null;
        if g.lapse_lag > 0 and p.lag > g.lapse_lag then
            reason := format('lag %s is above the limit of %s', p.lag, g.lapse_lag);
        elsif g.lapse_after_seconds > 0 then
            idle := millrace_engine.idle_for(g.id, all_, g.paused, now_, g.lapse_after_seconds);
            if least(now_ - coalesce(p.oldest, now_), idle) > make_interval(secs => g.lapse_after_seconds) then
                reason := format('messages have waited and nobody has worked for %s seconds', g.lapse_after_seconds);
            end if;
        end if;
        if reason is not null then
            update millrace_engine.consumer_group x set lapsed_at = now_, lapse_reason = reason where x.id = any (all_);
            did := did || format('group %s has lapsed: %s', g.name, reason);
        end if;
    end loop;
    return did;
end $$;

-- millrace_engine.idle_for(group, it and its priorities, paused, now, lapse_after_seconds) returns interval
-- For how long nobody has worked for a group, as far as maintenance has seen. Not more than the truth. A paused group is not idle.
create or replace function millrace_engine.idle_for(p_group integer, p_all integer[], p_paused boolean, p_now timestamptz, p_seconds bigint) returns interval
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    seen record;
    nonces bigint[];
    active boolean;
begin
    select a.nonces, a.seen_at into seen from millrace_engine.group_activity a where a.group_id = p_group;
    -- A row without a nonce was written by maintenance. Where a ledger was truncated since, a lane has no other row; that is no news either.
    nonces := array(select c.nonce from millrace_engine.lane l
        cross join lateral (select x.nonce from millrace_engine.claim x where x.lane_id = l.id and x.nonce <> 0 order by x.claim desc limit 1) c
        where l.group_id = any (p_all));
    active := p_paused or seen.nonces is null or not nonces <@ seen.nonces
        or exists (select from millrace_engine.member m where m.group_id = any (p_all) and m.expires_at > p_now)
        or exists (select from millrace_engine.delivery d where d.group_id = any (p_all) and d.nonce is not null and d.visible_at > p_now)
        or exists (select from millrace_engine.lane l
            cross join lateral (select x.floor, x.stragglers from millrace_engine.claim x where x.lane_id = l.id order by x.claim desc limit 1) c
            cross join lateral millrace_engine.open_claims(l.id, c.floor, c.stragglers) o
            where l.group_id = any (p_all) and o.expires_at > p_now);
    if not active then
        return p_now - seen.seen_at;
    end if;
    if seen.nonces is null or seen.seen_at < p_now - make_interval(secs => p_seconds / 10.0) then
        insert into millrace_engine.group_activity as a (group_id, nonces, seen_at) values (p_group, nonces, p_now)
            on conflict on constraint group_activity_pkey do update set nonces = excluded.nonces, seen_at = excluded.seen_at;
    end if;
    return interval '0';
end $$;

-- millrace_engine.note_redelivery(group) returns void
-- Says that somebody works for the group. A claim from the delivery table leaves nothing behind when its messages are settled or given back, so the next
-- round of maintenance begins the group's time anew. Whoever has the row begins it anew as well, so nobody waits.
create or replace function millrace_engine.note_redelivery(p_group integer) returns void
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the groups were few
as $$
begin
    delete from millrace_engine.group_activity a where a.group_id = (
        select y.group_id from millrace_engine.consumer_group x join millrace_engine.group_activity y on y.group_id = coalesce(x.parent_id, x.id)
        where x.id = p_group and x.lapse_after_seconds > 0 for update of y skip locked);
end $$;
comment on function millrace_engine.note_redelivery(integer) is 'Begins the time anew after which a group lapses.';
