-- The scout: one process per database that wakes waiting consumers when nobody's commit does. A publisher that rolls back, or that commits late, releases
-- the messages of others; a delay ends; a claim or a membership expires. Everything here is harmless when two do it at once, and needed by nobody:
-- consumers look for themselves now and then. It only makes waiting shorter.

-- millrace_engine.scout_lease(holder, lease in seconds, term in seconds, out leads, out epoch, out again_seconds)
-- Whether the holder is the scout, and when to ask again. It takes the lease when nobody has it, when it has expired, or when the scout's term is over: so
-- they take turns, without a gap, because the former scout goes on until it asks again. Renews a lease that is half used up. On a standby nobody
-- leads.
-- Locks: the row, and never waits for it.
create or replace function millrace_engine.scout_lease(p_holder text, p_lease_seconds double precision default 10,
    p_term_seconds double precision default 60, out leads boolean, out epoch bigint, out again_seconds double precision)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    now_ constant timestamptz := millrace_engine.clock();
    s millrace_engine.scout;
    free_at timestamptz;
begin
    leads := false;
    again_seconds := p_lease_seconds / 2;
    select x.* into strict s from millrace_engine.scout x where x.id = 1;
    free_at := least(s.expires_at, s.since + make_interval(secs => p_term_seconds));
    if s.holder = p_holder and s.expires_at > now_ + make_interval(secs => p_lease_seconds / 2) then
        leads := true;
        again_seconds := extract(epoch from s.expires_at - now_) - p_lease_seconds / 2;
    elsif s.holder is distinct from p_holder and free_at > now_ then
        again_seconds := extract(epoch from free_at - now_);
    elsif not pg_is_in_recovery() then
        -- Who finds the row locked, or taken meanwhile, has somebody before it.
        perform from millrace_engine.scout x where x.id = 1 and x.epoch = s.epoch for update skip locked;
        if found then
            update millrace_engine.scout x
                set holder = p_holder, expires_at = now_ + make_interval(secs => p_lease_seconds),
                    epoch = x.epoch + (x.holder is distinct from p_holder)::integer,
                    since = case when x.holder is distinct from p_holder then now_ else x.since end
                where x.id = 1
                returning x.epoch into s.epoch;
            leads := true;
        end if;
    end if;
    epoch := s.epoch;
end $$;
comment on function millrace_engine.scout_lease(text, double precision, double precision) is 'Takes or renews the lease of the scout; never waits.';

-- millrace_engine.scout_leave(holder) returns void
-- Gives the lease up, so that the next one to ask has it.
create or replace function millrace_engine.scout_leave(p_holder text) returns void
language plpgsql volatile as $$
begin
    update millrace_engine.scout x set expires_at = '-infinity' where x.id = 1 and x.holder = p_holder and x.expires_at > '-infinity';
end $$;
comment on function millrace_engine.scout_leave(text) is 'Gives up the lease of the scout.';

-- millrace_engine.scout(seen, full, out seen, out notified, out waiting, out due, out next_seconds, out cost_seconds)
-- One look. Notifies the streams that somebody waits for and for which, since the look that returned `seen`,
--   1. the horizon has moved (horizons.sql): the publishers' locks are looked at once for all, and only when there is a position above a horizon
--      seen before;
--   2. a message of the delivery table has become due, a claim or a membership has expired.
-- seen is null for the first look, which notifies whoever may have missed something. full: also look for what has become due without being foreseen,
-- as by a nack that committed meanwhile; once a second is enough. What became due up to ten seconds before is told again then, because a commit may
-- come later than the time it names.
-- waiting is how many streams somebody waits for, due whether delayed messages are due (move_due, in a transaction of its own: it publishes), next_seconds the
-- time until something is known to become due, cost_seconds what the look took. Its cost: a probe per stream; two per group and lane of those that somebody waits for; nothing per message. Locks nothing.
create or replace function millrace_engine.scout(p_seen jsonb, p_full boolean, out seen jsonb, out notified integer[], out waiting integer,
    out due boolean, out next_seconds double precision, out cost_seconds double precision)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    begun constant timestamptz := clock_timestamp();
    now_ constant timestamptz := millrace_engine.clock();
    after_ timestamptz := coalesce((p_seen ->> 'at')::timestamptz, '-infinity');
    soonest timestamptz := coalesce((p_seen ->> 'soonest')::timestamptz, 'infinity');
    horizons jsonb := coalesce(p_seen -> 'horizons', '{}');
    settled jsonb := coalesce(p_seen -> 'settled', '{}');
    ids integer[];
    roots integer[];
    lasts bigint[];
    lanes text[] := '{}';
    claims text[] := '{}';
    awaited integer[] := '{}';
    first_ timestamptz;
    l record;
    o record;
begin
    -- Publishers of a priority lane notify the stream itself.
    select array_agg(x.id), array_agg(x.root), array_agg(x.last) into ids, roots, lasts
        from (select s.id, coalesce(s.parent_id, s.id) as root,
                     coalesce(pg_sequence_last_value(to_regclass('millrace_engine.position_' || s.id)), 0) as last
              from millrace_engine.stream s
              where pg_sequence_last_value(to_regclass('millrace_engine.state_' || coalesce(s.parent_id, s.id))) >> 4 > extract(epoch from begun)) x;
    waiting := coalesce(cardinality(ids), 0);
    notified := '{}';

    if waiting = 0 then
        horizons := '{}';
    elsif exists (select from unnest(ids, lasts) u(id, last) where u.last > coalesce((horizons ->> u.id::text)::bigint, 0)) then
        select coalesce(jsonb_object_agg(x.id, greatest(x.horizon, x.before)), '{}'),
               coalesce(array_agg(distinct x.root) filter (where x.horizon > x.before), '{}')
            into horizons, notified
            from (select u.id, u.root, h.horizon, coalesce((horizons ->> u.id::text)::bigint, 0) as before
                  from unnest(ids, roots) u(id, root) join millrace_engine.horizons(ids) h on h.stream_id = u.id) x;
    end if;

    if waiting = 0 then
        settled := '{}';
        soonest := 'infinity';
    elsif p_seen is null or p_full or now_ >= soonest then
        if p_full then
            after_ := after_ - interval '10 seconds';
        end if;
        soonest := 'infinity';
        for l in
            select u.root,
                   (select max(d.visible_at) from millrace_engine.delivery d where d.group_id = g.id and d.visible_at <= now_) > after_
                   or (select max(m.expires_at) from millrace_engine.member m where m.group_id = g.id and m.expires_at <= now_) > after_ as due,
                   least((select min(d.visible_at) from millrace_engine.delivery d where d.group_id = g.id and d.visible_at > now_),
                         (select min(m.expires_at) from millrace_engine.member m where m.group_id = g.id and m.expires_at > now_)) as next
            from unnest(ids, roots) u(id, root)
            join millrace_engine.consumer_group g on g.stream_id = u.id and not g.paused and g.lapsed_at is null
        loop
            soonest := least(soonest, l.next);
            if l.due then
                awaited := awaited || l.root;
            end if;
        end loop;
        for l in
            select u.root, g.mode, x.id, g.recheck_at, c.claim, c.floor, c.stragglers, c.next_check
            from unnest(ids, roots) u(id, root)
            join millrace_engine.consumer_group g on g.stream_id = u.id and not g.paused and g.lapsed_at is null
            join millrace_engine.lane x on x.group_id = g.id
            cross join lateral (select y.* from millrace_engine.claim y where y.lane_id = x.id order by y.claim desc limit 1) c
        loop
            if settled ->> l.id::text = l.claim::text then
                lanes := lanes || l.id::text;      -- nothing was open at its newest claim, and it is still the newest
                claims := claims || l.claim::text;
            elsif l.mode = 'Shared' and least(l.next_check, l.recheck_at) > now_ then
                soonest := least(soonest, l.next_check, l.recheck_at);
            else
                select count(*) as n, bool_or(y.expires_at > after_ and y.expires_at <= now_) as due, min(y.expires_at) filter (where y.expires_at > now_) as next
                    into o from millrace_engine.open_claims(l.id, l.floor, l.stragglers) y;
                soonest := least(soonest, o.next);
                if o.due then
                    awaited := awaited || l.root;
                end if;
                if o.n = 0 then
                    lanes := lanes || l.id::text;
                    claims := claims || l.claim::text;
                end if;
            end if;
        end loop;
        settled := jsonb_object(lanes, claims);
        select coalesce(array_agg(distinct x), '{}') into notified from unnest(notified || awaited) x;
    end if;

    perform pg_notify('millrace', x::text) from unnest(notified) x;
    select d.due_at into first_ from millrace_engine.delayed d order by d.due_at, d.id limit 1;
    due := coalesce(first_ <= now_, false);
    seen := jsonb_build_object('at', now_, 'soonest', soonest, 'horizons', horizons, 'settled', settled);
    soonest := least(soonest, first_);
    next_seconds := case when soonest < 'infinity' then greatest(extract(epoch from soonest - now_), 0) end;
    cost_seconds := extract(epoch from clock_timestamp() - begun);
end $$;
comment on function millrace_engine.scout(jsonb, boolean) is 'One look of the scout: notifies streams that waiting consumers should look at.';
