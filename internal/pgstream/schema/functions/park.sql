-- Parked messages. In an Ordered group with failure policy Park a message that fails waits in the delivery table, and every later message of its
-- key waits behind it; other keys go on. What is redriven into an Ordered group is parked too, whatever its policy.
--
-- While a key is in parked_key, receive moves its messages from the log to the delivery table instead of handing them out. Of a key's parked
-- messages only the first is due, none while another one is held, none while a claim of the lane is open, which may hold others of the key, and
-- none that the lane has not reached (again), because earlier ones may still be in the log: a claim that was given back is read again from its beginning.
-- Whoever removes the last one also removes the key, in the same transaction. Locks on the row of a key:
--   for key share      who adds a parked message (nack, redrive; receive by try): the key stays while they do
--   for no key update  who removes one: of two that remove at once, the second sees what the first left
--   for update         who finds none left: waits for those who add, and looks again
-- A message without a key is parked alone, and nothing waits for it.
--
-- millrace_engine.park_keys(group, keys) returns void
-- Marks keys as parked and keeps them so until the end of the transaction. Waits for whoever unparks one of them.
-- Raises: MR004 a key of more than 2,048 bytes.
create or replace function millrace_engine.park_keys(p_group integer, p_keys text[]) returns void
language plpgsql volatile as $$
declare
    wanted text[];
    k text;
begin
    update millrace_engine.consumer_group x set parks = true where x.id = p_group and not x.parks;
    select array_agg(distinct x order by x) into wanted from unnest(p_keys) x where x is not null;
    if exists (select from unnest(wanted) x where octet_length(x) > millrace_engine.longest_key()) then
        raise exception 'a message whose key has more than % bytes cannot be parked', millrace_engine.longest_key() using errcode = 'MR004',
            hint = 'Publish with a shorter key, such as a hash. Settle this message with ack_messages or dead_letter, or redrive it to another stream.';
    end if;
    foreach k in array coalesce(wanted, '{}') loop
        loop
            insert into millrace_engine.parked_key (group_id, slot, key) values (p_group, millrace_engine.slot(k, 0), k) on conflict do nothing;
            perform from millrace_engine.parked_key x where x.group_id = p_group and x.slot = millrace_engine.slot(k, 0) and x.key = k for key share;
            exit when found;
        end loop;
    end loop;
end $$;

-- millrace_engine.park(claim, group, positions, delay, reason) returns void
-- Parks messages of a held range claim with every later message of their keys in it that is not settled, and settles them all in the claim. Those that
-- were asked for keep the attempt and wait for the delay; the others wait for those before them, and the attempt is not counted.
create or replace function millrace_engine.park(p_claim millrace_engine.claim, p_group millrace_engine.consumer_group, p_positions bigint[],
    p_delay interval, p_reason text) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    source record;
    held text;
    keys text[];
    firsts bigint[];
    alone bigint[];
    parked bigint[];
begin
    select st.name, l.slot_low, l.slot_high, case st.payload_type when 'JSON' then 'm.payload, null::bytea' else 'null::jsonb, m.payload' end as payload
        into strict source
        from millrace_engine.lane l join millrace_engine.stream st on st.id = p_group.stream_id where l.id = p_claim.lane_id;
    held := format('from millrace.%I m where m."position" > $1 and m."position" <= $2 and not $3 @> m."position"
        and millrace_engine.slot(m.key, m."position") between %s and %s - 1', source.name, source.slot_low, source.slot_high);
    execute format('select array_agg(x.key) filter (where x.key is not null), array_agg(x.first) filter (where x.key is not null)
        from (select m.key, min(m."position") as first %s and m."position" = any ($4) group by m.key) x', held)
        into keys, firsts using p_claim.low, p_claim.high, p_claim.settled, p_positions;
    perform millrace_engine.park_keys(p_group.id, keys);
    execute format('with chosen as (
            select %s as group_id, m."position", m.key, m.headers, %s, m.created_at,
                case when m."position" = any ($4) then $5 else $5 - 1 end,
                case when m.key is null or m."position" = any ($7) then millrace_engine.clock() + $8 else ''infinity'' end, true,
                case when m."position" = any ($4) then millrace_engine.add_error(''[]'', $5, $9) else ''[]'' end
            %s and (m."position" = any ($4) or m."position" >= $7[array_position($6, m.key)] and millrace_engine.matches($10, m.key, m.headers))
        ), parked as (
            insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, parked, errors)
            select * from chosen on conflict on constraint delivery_position_unique do nothing
        ) select array_agg(x."position") from chosen x', p_group.id, source.payload, held)
        into parked using p_claim.low, p_claim.high, p_claim.settled, p_positions, p_claim.attempt, keys, firsts, p_delay, p_reason,
            p_group.filter;
    perform millrace_engine.settle_messages(p_claim, array(select unnest(parked) union select unnest(p_positions)));
end $$;

-- millrace_engine.receive_parked(group, lowest slot, highest slot, frontier, member, max, now, end of the lease, nonce) returns messages
-- Hands out parked messages of the slots, up to the lane's frontier, that are due: at most one of a key, and none of a key that somebody holds. A message that was handed out for the last
-- time and whose lease ended is a dead letter. Under the group's receive lock, while no claim of the lane is open; never waits.
create or replace function millrace_engine.receive_parked(p_group integer, p_low_slot integer, p_top_slot integer, p_frontier bigint, p_member text, p_max integer,
    p_now timestamptz, p_ends timestamptz, p_nonce bigint)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    most integer;
    worn record;
begin
    perform millrace_engine.end_expired(p_group, p_now);
    select g.max_attempts into most from millrace_engine.consumer_group g where g.id = p_group;
    if most > 0 then
        for worn in select x.id, x.key from millrace_engine.delivery x
                where x.group_id = p_group and x.visible_at <= p_now and x.nonce is null and not x.blocked and x.attempt >= most
                  and millrace_engine.slot(x.key, x."position") between p_low_slot and p_top_slot
                order by x."position" for update skip locked loop
            -- The strongest lock by try, because the next of the key is looked for in this transaction, which must not wait.
            perform from millrace_engine.parked_key k
                where k.group_id = p_group and k.slot = millrace_engine.slot(worn.key, 0) and k.key = worn.key for update skip locked;
            if found or worn.key is null then
                perform millrace_engine.bury(array[worn.id], 'not settled within the ack wait');
            end if;
        end loop;
    end if;
    -- By the index of what is due, which is little; every delivery of an Ordered group is parked, so that need not be asked, and + 0 keeps the planner
    -- from going through all positions up to the frontier.
    return query
        with due as (
            select y.id from millrace_engine.delivery y
            where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked and y."position" + 0 <= p_frontier
              and millrace_engine.slot(y.key, y."position") between p_low_slot and p_top_slot
              and (y.key is null
                  or not exists (select from millrace_engine.delivery o
                      where o.group_id = p_group and o.key = y.key and o.parked and o."position" < y."position")
                  and not exists (select from millrace_engine.delivery o
                      where o.group_id = p_group and o.key = y.key and o.parked and o.nonce is not null))
            order by y.visible_at, y."position" limit p_max for update of y skip locked
        )
        update millrace_engine.delivery d
            set attempt = d.attempt + 1, nonce = p_nonce, member = p_member, visible_at = p_ends
            from due where d.id = due.id
            returning p_group || '.0.0.' || p_nonce, d."position", d.key, d.headers, d.payload, d.payload_bytes, d.created_at, d.attempt, p_ends;
end $$;
comment on function millrace_engine.receive_parked(integer, integer, integer, bigint, text, integer, timestamptz, timestamptz, bigint) is
    'Hands out parked messages that are due, in order of position among those of a key.';

-- millrace_engine.divert_template(group, lowest slot, highest slot, low, high, settled, max, filter, out high, out diverted, out n, out stopped)
-- Moves the messages of parked keys in (low, high] of the log behind the parked ones, as far as the first max others. high
-- becomes the place up to which it looked; diverted are the n positions that were moved, for the caller to note as settled. A key that somebody
-- unparks this moment ends the range before its first message, and stopped is true: its next message is then read by a later call.
-- Under the group's receive lock, while no claim of the lane is open; never waits for whoever unparks.
create or replace function millrace_engine.divert_template(p_group integer, p_low_slot integer, p_top_slot integer, p_low bigint, p_high bigint,
    p_settled int8multirange, p_max integer, p_filter jsonb, out high bigint, out diverted int8multirange, out n integer, out stopped boolean)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    hits bigint[];
    keys text[];
    kept text[];
    busy bigint;
    seen bigint;
    last bigint;
    edge bigint;
begin
    high := p_high;
    diverted := '{}';
    n := 0;
    stopped := false;
    if not exists (select from millrace_engine.parked_key k where k.group_id = p_group and k.slot >= p_low_slot and k.slot <= p_top_slot) then
        return;
    end if;
    select count(*), max(x."position"), min(x."position") filter (where x.plain = p_max),
           array_agg(x."position" order by x."position") filter (where x.parked), array_agg(x.key order by x."position") filter (where x.parked)
        into seen, last, edge, hits, keys
        from (select m."position", m.key, k.key is not null as parked, count(*) filter (where k.key is null) over (order by m."position") as plain
              from (select y."position", y.key from millrace.stream_template y
                    where y."position" > p_low and y."position" <= p_high
                      and millrace_engine.slot(y.key, y."position") between p_low_slot and p_top_slot
                      and (p_settled is null or not p_settled @> y."position")
                      and (p_filter is null or millrace_engine.matches(p_filter, y.key, y.headers))
                    order by y."position" limit 2 * p_max + 50) m
              left join millrace_engine.parked_key k
                on k.group_id = p_group and k.slot = millrace_engine.slot(m.key, m."position") and k.key = m.key) x;
    if edge is not null then
        high := edge;
    elsif seen >= 2 * p_max + 50 then
        high := last;
    end if;
    if hits is null or hits[1] > high then
        return;
    end if;
    select array_agg(x.key) into kept from (
        select k.key from millrace_engine.parked_key k
        where k.group_id = p_group and k.slot >= p_low_slot and k.slot <= p_top_slot and k.key = any (keys) for key share skip locked) x;
    select min(h.p) into busy from unnest(hits, keys) h (p, key) where h.p <= high and array_position(kept, h.key) is null;
    if busy is not null then
        high := busy - 1;
        stopped := true;
    end if;
    -- Behind those that wait. One that was passed over when the others were parked is before them, and so it is the first, and due.
    insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, parked)
        select p_group, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, 0,
               case when row_number() over (partition by m.key order by m."position") = 1 and exists (select from millrace_engine.delivery d
                       where d.group_id = p_group and d.key = m.key and d.parked and d."position" > m."position")
                   then millrace_engine.clock() else 'infinity' end, true
        from millrace.stream_template m where m."position" = any (hits) and m."position" <= high
        on conflict on constraint delivery_position_unique do nothing;
    select coalesce(range_agg(int8range(p, p, '[]')), '{}'), count(*) into diverted, n from unnest(hits) p where p <= high;
end $$;

-- millrace_engine.unpark() is the trigger on deliveries: it makes the next message of each key due from which a parked one was removed.
create or replace function millrace_engine.unpark() returns trigger
language plpgsql volatile as $$
declare
    k record;
begin
    for k in select distinct g.group_id, g.key from gone g where g.parked and g.key is not null order by g.group_id, g.key loop
        perform millrace_engine.next_parked(k.group_id, k.key);
    end loop;
    return null;
end $$;

-- millrace_engine.next_parked(group, key) returns void
-- Makes the first parked message of the key due if it only waited for others; unparks the key when none is left.
create or replace function millrace_engine.next_parked(p_group integer, p_key text) returns void
language plpgsql volatile
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    slot_ constant smallint := millrace_engine.slot(p_key, 0);
    head record;
begin
    perform from millrace_engine.parked_key k where k.group_id = p_group and k.slot = slot_ and k.key = p_key for no key update;
    select d.id, d.visible_at into head from millrace_engine.delivery d
        where d.group_id = p_group and d.key = p_key and d.parked order by d."position" limit 1;
    if not found then
        perform from millrace_engine.parked_key k where k.group_id = p_group and k.slot = slot_ and k.key = p_key for update;
        -- A new statement after the lock: those who were adding a message are done now.
        select d.id, d.visible_at into head from millrace_engine.delivery d
            where d.group_id = p_group and d.key = p_key and d.parked order by d."position" limit 1;
        if not found then
            delete from millrace_engine.parked_key k where k.group_id = p_group and k.slot = slot_ and k.key = p_key;
            perform millrace_engine.announce(g.stream_id) from millrace_engine.consumer_group g where g.id = p_group;
            return;
        end if;
    end if;
    if head.visible_at = 'infinity' then
        update millrace_engine.delivery d set visible_at = greatest(millrace_engine.clock(), d.not_before) where d.id = head.id;
        perform millrace_engine.announce(g.stream_id) from millrace_engine.consumer_group g where g.id = p_group;
    end if;
end $$;

-- millrace_engine.announce(stream) returns void
-- Wakes those who wait for messages of the stream, at the commit. A priority lane is announced as its parent, which consumers listen for. Not with
-- millrace.notify off, as in publish_guard_template.sql: a transaction that has notified cannot be prepared.
create or replace function millrace_engine.announce(p_stream integer) returns void
language plpgsql volatile as $$
declare
    announced integer;
begin
    select coalesce(s.parent_id, s.id) into announced from millrace_engine.stream s where s.id = p_stream;
    if to_timestamp(pg_sequence_last_value(('millrace_engine.state_' || announced)::regclass) >> 4) > clock_timestamp()
            and current_setting('millrace.notify', true) is distinct from 'off' then
        perform pg_notify('millrace', announced::text);
    end if;
end $$;
