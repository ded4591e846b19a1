-- Queued groups. A Shared group that has a queue policy, or that is for unrouted messages, hands out from the delivery table only: its messages are copied
-- there, in the order of the log, by whoever receives and by maintenance. A row then says of each message whether it is queued (never handed out), waits for
-- another delivery, or is active (nonce is set). The policies are those of pg-boss, for each key of messages, and for all messages without a key together:
--   Short      at most one is queued: one that comes while another is queued is passed over
--   Singleton  at most one is active: others wait
--   Stately    at most one is queued, one waits for another delivery and one is active; one that fails while another waits is a dead letter
-- A message counts as queued from the moment when it can be read, whenever it is copied, because every receive copies all that can be read before it
-- hands anything out. So nothing is decided on the publisher's way, which knows nothing of groups, and other groups get every message.
-- Other groups do not come here: they hand out ranges of the log, and write nothing per message.

-- millrace_engine.queue_key(key) returns text
-- What messages of a key are counted by: the key, '' for none, and a hash of one that would not fit into an index. INSERT and COPY do not look at keys, and
-- one message must not keep a group from receiving.
create or replace function millrace_engine.queue_key(p_key text) returns text
language sql immutable parallel safe
return case when octet_length(p_key) > millrace_engine.longest_key() then 'sha256:' || encode(sha256(convert_to(p_key, 'UTF8')), 'hex') else coalesce(p_key, '') end;
comment on function millrace_engine.queue_key(text) is 'What a queued group counts the messages of a key by.';

-- millrace_engine.enqueue(group, nonce) returns boolean
-- Copies messages of the log that a queued group takes to the delivery table, and returns whether there are more. One that would be handed out in any case is
-- copied when its turn may come, ten thousand positions at a time; of Short and Stately all, because what is passed over depends on what is queued.
-- The caller holds the group's receive lock. nonce: of the row that notes the progress, 0 for maintenance.
-- Raises: MR003 isolation level.
create or replace function millrace_engine.enqueue(p_group integer, p_nonce bigint) returns boolean
language plpgsql volatile
set enable_seqscan = off
set jit = off   -- which takes longer than copying what there usually is
as $$
declare
    step constant bigint := 10000;
    g record;
    last millrace_engine.claim;
    low_ bigint;
    high_ bigint;
    safe bigint;
    one_queued boolean;
    routes jsonb[];
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'messages are queued at isolation level read committed, not %', current_setting('transaction_isolation') using errcode = 'MR003',
            hint = 'An older snapshot would miss messages for ever.';
    end if;
    select x.stream_id, x.lane_id, x.filter, x.queue_policy, x.first_position, s.name,
           case s.payload_type when 'JSON' then 'm.payload, null::bytea' else 'null::jsonb, m.payload' end as payload
        into strict g
        from millrace_engine.consumer_group x join millrace_engine.stream s on s.id = x.stream_id where x.id = p_group;
    select c.* into strict last from millrace_engine.claim c where c.lane_id = g.lane_id order by c.claim desc limit 1;
    low_ := greatest(last.frontier, g.first_position - 1);
    if coalesce(pg_sequence_last_value(('millrace_engine.position_' || g.stream_id)::regclass), 0) <= low_ then
        return false;
    end if;
    -- The horizon comes from a statement before the one that looks at messages.
    safe := greatest(last.horizon, millrace_engine.horizon(g.stream_id));
    if safe <= low_ then
        return false;
    end if;
    one_queued := coalesce(g.queue_policy in ('Short', 'Stately'), false);
    if g.filter ? 'unrouted' then
        routes := millrace_engine.routes(g.stream_id, p_group);
    end if;
    loop
        high_ := least(low_ + step, safe);
        execute format('insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, queue_key)
            select $1, x."position", x.key, x.headers, x.payload, x.payload_bytes, x.created_at, 0, millrace_engine.clock(), millrace_engine.queue_key(x.key)
            from (select m."position", m.key, m.headers, %s, m.created_at, row_number() over (partition by coalesce(m.key, '''') order by m."position") as nth
                  from millrace.%I m
                  where m."position" > $2 and m."position" <= $3 and millrace_engine.matches($4, m.key, m.headers)
                    and ($5 is null or not exists (select from unnest($5) r(filter) where millrace_engine.matches(r.filter, m.key, m.headers)))
                 ) x("position", key, headers, payload, payload_bytes, created_at, nth)
            where not $6 or x.nth = 1 and not exists (select from millrace_engine.delivery d
                where d.group_id = $1 and d.queue_key = millrace_engine.queue_key(x.key) and d.nonce is null and d.attempt = 0)
            order by x."position"
            on conflict on constraint delivery_position_unique do nothing', g.payload, g.name)
            using p_group, low_, high_, g.filter, routes, one_queued;
        low_ := high_;
        exit when low_ = safe or not one_queued;
    end loop;
    insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring)
        values (g.lane_id, last.claim + 1, low_, low_, low_, safe, last.claim + 1, p_nonce, 'infinity', 'infinity', 0, 0,
            pg_sequence_last_value('millrace_engine.ring'));
    return low_ < safe;
end $$;
comment on function millrace_engine.enqueue(integer, bigint) is 'Copies messages that a queued group takes to the delivery table.';

-- millrace_engine.groups_to_enqueue() returns setof integer
-- The queued groups whose stream has positions that they have not come to: for maintenance. Whoever receives needs none.
create or replace function millrace_engine.groups_to_enqueue() returns setof integer
language sql volatile
set enable_seqscan = off
set jit = off
begin atomic
    select g.id from millrace_engine.consumer_group g
        cross join lateral (select c.frontier from millrace_engine.claim c where c.lane_id = g.lane_id order by c.claim desc limit 1) c
        where (g.queue_policy is not null or g.filter ? 'unrouted') and g.lapsed_at is null
          and pg_sequence_last_value(to_regclass('millrace_engine.position_' || g.stream_id)) > c.frontier
        order by g.id;
end;
comment on function millrace_engine.groups_to_enqueue() is 'Queued groups that maintenance has to look at.';

-- millrace_engine.enqueue_group(group) returns boolean
-- enqueue for maintenance, and whether there is more to do. What somebody else enqueues this moment is left to it.
create or replace function millrace_engine.enqueue_group(p_group integer) returns boolean
language plpgsql volatile as $$
begin
    if not pg_try_advisory_xact_lock(536870912 + p_group, 0)
            or not exists (select from millrace_engine.consumer_group g where g.id = p_group) then
        return false;
    end if;
    return millrace_engine.enqueue(p_group, 0);
end $$;
comment on function millrace_engine.enqueue_group(integer) is 'Copies messages that a queued group takes to the delivery table, for maintenance.';

-- millrace_engine.receive_singletons(group, member, max, now, end of the lease, nonce) returns messages
-- receive_deliveries for the policies Singleton and Stately: of a key the message that has been due longest, and none while one is active. Whoever holds the
-- group's receive lock hands out alone, and what becomes inactive meanwhile is found by the next receive. A message that was handed out for the last time and
-- whose lease ended is a dead letter.
-- Messages are looked for in the order in which they became due, a hundred more than are asked for. When nothing is to be had among so many, they all wait behind
-- active messages; then they are marked as blocked, which takes them out of that order, and from now on their keys are looked at one by one. The mark is a hint
-- where to look, and not what decides: nobody has to take it away when a key is free, and a receive that finds the key free hands out its first.
-- Cost: each message is marked once at most. Else a look at p_max and a hundred messages, and at each key with blocked ones; these are the oldest, so their key
-- is active, or the next to be handed out. It does not matter how many wait behind them.
create or replace function millrace_engine.receive_singletons(p_group integer, p_member text, p_max integer, p_now timestamptz, p_ends timestamptz,
    p_nonce bigint)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
set enable_material = off
set enable_sort = off
set jit = off
as $$
#variable_conflict use_column
declare
    most constant integer := (select nullif(g.max_attempts, 0) from millrace_engine.consumer_group g where g.id = p_group);
    look integer := p_max + 100;
    chosen bigint[];
    freed bigint[];
    worn bigint[];
    further boolean;    -- than look
begin
    perform millrace_engine.end_expired(p_group, p_now);
    perform millrace_engine.bury_worn(p_group, p_max, p_now);
    loop
        chosen := array(
            select x.id from (
                select y.id, y.queue_key from millrace_engine.delivery y
                where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked
                order by y.visible_at, y."position" limit look) x
            where x.id = millrace_engine.first_queued(p_group, x.queue_key) and not millrace_engine.is_active(p_group, x.queue_key)
            limit p_max);   -- in their order, and no further than needed
        freed := array(
            with recursive blocked as (
                select (select b.queue_key from millrace_engine.delivery b
                        where b.group_id = p_group and b.blocked order by b.queue_key limit 1) as key
                union all
                select (select b.queue_key from millrace_engine.delivery b
                        where b.group_id = p_group and b.queue_key > w.key and b.blocked order by b.queue_key limit 1)
                from blocked w where w.key is not null
            )
            select x.id from blocked w join millrace_engine.delivery x on x.id = millrace_engine.first_queued(p_group, w.key)
            where w.key is not null and x.visible_at <= p_now and not millrace_engine.is_active(p_group, w.key));
        if cardinality(freed) > 0 then
            chosen := array(select x.id from millrace_engine.delivery x where x.id = any (chosen || freed)
                order by x.visible_at, x."position" limit p_max);
        end if;
        worn := array(select x.id from millrace_engine.delivery x where x.id = any (chosen) and x.attempt >= most for update skip locked);
        if cardinality(worn) > 0 then
            perform millrace_engine.bury(worn, 'not settled within the ack wait');
            continue;   -- they were further back than bury_worn has looked; each makes room for another
        end if;
        exit when cardinality(chosen) = p_max or not exists (select from millrace_engine.delivery y
            where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked
            order by y.visible_at, y."position" offset p_max + 99);
        further := exists (select from millrace_engine.delivery y
            where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked
            order by y.visible_at, y."position" offset look);
        -- Every key that was seen is active, or its first is chosen.
        update millrace_engine.delivery d set blocked = true
            where d.id in (select y.id from millrace_engine.delivery y
                           where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked
                           order by y.visible_at, y."position" limit look for update skip locked)
              and d.id <> all (chosen);
        exit when not further;
        look := look * 2;
    end loop;
    return query
        update millrace_engine.delivery d
            set attempt = d.attempt + 1, nonce = p_nonce, member = p_member, visible_at = p_ends, blocked = false
            where d.id in (select x.id from millrace_engine.delivery x
                           where x.id = any (chosen) and x.nonce is null and (x.attempt >= most) is not true for update skip locked)
            returning p_group || '.0.0.' || p_nonce, d."position", d.key, d.headers, d.payload, d.payload_bytes, d.created_at, d.attempt, p_ends;
end $$;
comment on function millrace_engine.receive_singletons(integer, text, integer, timestamptz, timestamptz, bigint) is
    'Hands out queued messages, at most one of a key at a time.';

-- millrace_engine.is_active(group, key) returns boolean
-- Whether a member holds a message of the key.
create or replace function millrace_engine.is_active(p_group integer, p_key text) returns boolean
language plpgsql stable
as $$
begin
    return exists (select from millrace_engine.delivery a
        where a.group_id = p_group and a.queue_key = p_key and a.queue_key is not null and a.nonce is not null);
end $$;

-- millrace_engine.first_queued(group, key) returns bigint
-- The id of the key's message that is to be handed out first. Functions and no joins, because each has one plan whatever the planner believes of the table.
create or replace function millrace_engine.first_queued(p_group integer, p_key text) returns bigint
language plpgsql stable
as $$
begin
    return (select b.id from millrace_engine.delivery b
        where b.group_id = p_group and b.queue_key = p_key and b.queue_key is not null and b.nonce is null
        order by b.queue_key, b.visible_at, b."position" limit 1);
end $$;

-- millrace_engine.retry_is_taken(delivery) returns boolean
-- Whether a message that is active in a group with policy Stately cannot be delivered again, because another one of its key waits for that.
create or replace function millrace_engine.retry_is_taken(d millrace_engine.delivery) returns boolean
language plpgsql stable as $$
begin
    return d.queue_key is not null
        and exists (select from millrace_engine.consumer_group g where g.id = d.group_id and g.queue_policy = 'Stately')
        and exists (select from millrace_engine.delivery r
            where r.group_id = d.group_id and r.queue_key = d.queue_key and r.nonce is null and r.attempt > 0);
end $$;

-- millrace_engine.release_deliveries(group, nonce) returns boolean
-- Gives the messages of a claim of deliveries back at once, without counting the attempt; false when there are none. With Short and Stately one that was
-- handed out for the first time is queued again: of two of a key that are queued then, the later one is passed over.
-- Locks: with Short and Stately the group's receive lock, after the claim's.
create or replace function millrace_engine.release_deliveries(p_group integer, p_nonce bigint) returns boolean
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the deliveries were few
as $$
declare
    one_queued constant boolean := exists (select from millrace_engine.consumer_group g where g.id = p_group and g.queue_policy in ('Short', 'Stately'));
    keys text[];
begin
    if one_queued then
        perform pg_advisory_xact_lock(536870912 + p_group, 0);
        keys := array(select d.queue_key from millrace_engine.delivery d where d.group_id = p_group and d.nonce = p_nonce);
    end if;
    update millrace_engine.delivery d set nonce = null, member = null, attempt = d.attempt - 1, visible_at = millrace_engine.clock()
        where d.group_id = p_group and d.nonce = p_nonce;
    if not found then
        return false;
    end if;
    if one_queued then
        delete from millrace_engine.delivery d
            where d.group_id = p_group and d.queue_key = any (keys) and d.nonce is null and d.attempt = 0
              and exists (select from millrace_engine.delivery e where e.group_id = p_group and e.queue_key = d.queue_key and e.nonce is null
                  and e.attempt = 0 and e."position" < d."position");
    end if;
    return true;
end $$;

-- millrace_engine.may_queue(group, dead letter, filter) returns boolean
-- Whether redrive may queue the dead letter: with Short and Stately the first of its key among those that the filter chooses, while none is queued. The
-- caller holds the group's receive lock.
create or replace function millrace_engine.may_queue(p_group millrace_engine.consumer_group, d millrace_engine.dead_letter, p_filter jsonb) returns boolean
language plpgsql stable as $$
begin
    return coalesce(p_group.queue_policy not in ('Short', 'Stately'), true)
        or not exists (select from millrace_engine.delivery q
                where q.group_id = p_group.id and q.queue_key = millrace_engine.queue_key(d.key) and q.nonce is null and q.attempt = 0)
            and not exists (select from millrace_engine.dead_letter e
                where e.group_id = p_group.id and coalesce(e.key, '') = coalesce(d.key, '') and e."position" < d."position"
                  and millrace_engine.is_chosen(p_filter, e."position", e.key, e.headers, e.reason, e.dead_at));
end $$;
