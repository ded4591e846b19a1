-- millrace_engine.assign(group, member, partitions, now, lease in ms) returns void
-- Ordered groups only, under the group's receive lock. Renews the member's lease, forgets members whose lease has ended, and brings the
-- lanes nearer to a fair share: the live members, in the order they joined, each get an equal run of partitions. A lane is split, merged
-- or handed over only while none of its claims is open, so there is no moment at which two members hold one key, and nobody else stops.
-- A lane of a dead member is taken over with its open claim; receive fences that claim before it delivers again.
-- Raises: MR004 a name that is too long for an index.
create or replace function millrace_engine.assign(p_group integer, p_member text, p_partitions integer, p_now timestamptz, p_lease_ms bigint)
returns void
language plpgsql volatile as $$
declare
    members integer;
    rank integer;
    mine_low integer;
    mine_high integer;
    l record;
    left_id bigint;      -- the idle lane of this member that ends where the present one begins, if any
    left_low smallint;
    left_high smallint;
    left_frontier bigint;
begin
    if octet_length(p_member) > millrace_engine.longest_key() then
        raise exception 'a member of an Ordered group cannot have a name of more than % bytes', millrace_engine.longest_key() using errcode = 'MR004',
            hint = 'Pass a short name that is unique per process.';
    end if;
    update millrace_engine.member m set expires_at = p_now + make_interval(secs => p_lease_ms / 1000.0)
        where m.group_id = p_group and m.name = p_member and m.expires_at < p_now + make_interval(secs => p_lease_ms / 2000.0);
    insert into millrace_engine.member (group_id, name, expires_at)
        values (p_group, p_member, p_now + make_interval(secs => p_lease_ms / 1000.0)) on conflict do nothing;
    -- A member that is being extended just now holds its row, and is alive.
    delete from millrace_engine.member m where m.group_id = p_group and m.name in (
        select x.name from millrace_engine.member x where x.group_id = p_group and x.expires_at <= p_now for update skip locked);

    select count(*), count(*) filter (where m.joined < me.joined) into members, rank
        from millrace_engine.member m, (select x.joined from millrace_engine.member x where x.group_id = p_group and x.name = p_member) me
        where m.group_id = p_group;
    mine_low := (rank * p_partitions / members) * 1024 / p_partitions;
    mine_high := ((rank + 1) * p_partitions / members) * 1024 / p_partitions;

    for l in
        select x.*, f.frontier, f.settled, f.idle, x.member is not distinct from p_member as mine,
               x.member is null or not exists (select from millrace_engine.member m where m.group_id = p_group and m.name = x.member) as free
        from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f
        where x.group_id = p_group order by x.slot_low
    loop
        if l.idle and (l.mine or l.free) and mine_low < mine_high and ((l.slot_low < mine_low and mine_low < l.slot_high) or (l.slot_low < mine_high and mine_high < l.slot_high)) then
            perform millrace_engine.split_lane(l.id, l.frontier, l.settled, array[l.slot_low, mine_low, mine_high, l.slot_high], p_member, mine_low, mine_high);
            left_id := null;
        elsif l.mine and l.idle and (l.slot_high <= mine_low or l.slot_low >= mine_high) then
            update millrace_engine.lane x set member = null where x.id = l.id;
            left_id := null;
        elsif l.free and l.slot_low < mine_high and l.slot_high > mine_low then
            update millrace_engine.lane x set member = p_member where x.id = l.id;
            left_id := null;
        elsif l.mine and l.idle and left_id is not null and left_high = l.slot_low and left_frontier = l.frontier and l.settled is null then
            -- Two idle neighbours of one member at one place: read them as one.
            delete from millrace_engine.lane x where x.id in (left_id, l.id);
            perform millrace_engine.open_lane(p_group, left_low, l.slot_high, l.frontier, p_member);
            left_id := null;
        elsif l.mine and l.idle and l.settled is null then
            left_id := l.id;
            left_low := l.slot_low;
            left_high := l.slot_high;
            left_frontier := l.frontier;
        else
            left_id := null;
        end if;
    end loop;
end $$;
comment on function millrace_engine.assign(integer, text, integer, timestamptz, bigint) is
    'Brings the lanes of an Ordered group nearer to a fair share for the calling member.';

-- millrace_engine.settled_assignment(group, member, now, lease in ms, out lane, out low_slot, out top_slot, out parks)
-- The member's lane, when there is nothing to assign: its lease is young, no member's has ended, and its one lane is exactly its fair share. Null
-- otherwise. Asked at every receive under the group's receive lock; most of the time the answer saves `assign`. parks: messages of the group were parked, or
-- may be (park.sql).
create or replace function millrace_engine.settled_assignment(p_group integer, p_member text, p_now timestamptz, p_lease_ms bigint,
    out lane bigint, out low_slot smallint, out top_slot smallint, out parks boolean)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    members integer;
    rank integer;
    alive boolean;
    l record;
begin
    select count(*), count(*) filter (where m.joined < me.joined), bool_and(m.expires_at > p_now and me.expires_at >= p_now + make_interval(secs => p_lease_ms / 2000.0))
        into members, rank, alive
        from millrace_engine.member me join millrace_engine.member m on m.group_id = p_group
        where me.group_id = p_group and me.name = p_member;
    if alive is not true then
        return;
    end if;
    select x.id, x.slot_low as low, x.slot_high as high, s.partitions, count(*) over () as lanes, g.parks or g.failure_policy = 'Park' as parks into l
        from millrace_engine.lane x
        join millrace_engine.consumer_group g on g.id = x.group_id
        join millrace_engine.stream s on s.id = g.stream_id
        where x.group_id = p_group and x.member = p_member limit 1;
    if l.lanes = 1 and l.low = (rank * l.partitions / members) * 1024 / l.partitions and l.high = ((rank + 1) * l.partitions / members) * 1024 / l.partitions then
        lane := l.id;
        low_slot := l.low;
        top_slot := l.high - 1;
        parks := l.parks;
    end if;
end $$;
comment on function millrace_engine.settled_assignment(integer, text, timestamptz, bigint) is
    'The lane of a member of an Ordered group when nothing is to be assigned.';

-- millrace_engine.lane_progress(lane, out frontier, out horizon, out floor, out stragglers, out next_check, out claim, out settled, out idle)
-- The newest row of the lane's ledger, and whether none of its claims is open.
create or replace function millrace_engine.lane_progress(p_lane bigint,
    out frontier bigint, out horizon bigint, out floor bigint, out stragglers bigint[], out next_check timestamptz, out claim bigint,
    out settled int8multirange, out idle boolean)
language plpgsql volatile
set enable_seqscan = off
as $$
begin
    select c.frontier, c.horizon, c.floor, c.stragglers, c.next_check, c.claim, nullif(c.settled * int8multirange(int8range(c.frontier, null, '()')), '{}')
        into frontier, horizon, floor, stragglers, next_check, claim, settled
        from millrace_engine.claim c where c.lane_id = p_lane order by c.claim desc limit 1;
    if not found then
        raise exception 'broken invariant: lane % has no claim row', p_lane using errcode = 'MR009';
    end if;
    -- The newest claim is often the only one that may be open, and looking for its settlement is far cheaper than listing the open claims.
    idle := stragglers is null and (floor >= claim or floor = claim - 1 and millrace_engine.is_settled(p_lane, claim))
        or not exists (select from millrace_engine.open_claims(p_lane, floor, stragglers));
end $$;

-- millrace_engine.open_lane(group, slots, position, member, settled beyond it) returns bigint
-- A new lane with its first ledger row: a lane without a row would look like one that has delivered nothing.
create or replace function millrace_engine.open_lane(p_group integer, p_low integer, p_high integer, p_frontier bigint, p_member text,
    p_settled int8multirange default null) returns bigint
language plpgsql volatile as $$
declare
    result bigint;
begin
    insert into millrace_engine.lane (group_id, slot_low, slot_high, member) values (p_group, p_low, p_high, p_member) returning id into result;
    if exists (select from millrace_engine.consumer_group x where x.id = p_group and x.mode = 'Shared') then  -- members, who split Ordered lanes, may not
        update millrace_engine.consumer_group x set lane_id = result where x.id = p_group;
    end if;
    insert into millrace_engine.claim (lane_id, claim, low, high, frontier, horizon, floor, nonce, expires_at, next_check, messages, attempt, ring, settled)
        values (result, 0, p_frontier, p_frontier, p_frontier, 0, 0, 0, 'infinity', 'infinity', 0, 0,
            pg_sequence_last_value('millrace_engine.ring'), p_settled);
    return result;
end $$;

-- millrace_engine.split_lane(lane, frontier, settled, cuts, member, low, high) returns void
-- Replaces an idle lane by its parts between the cuts. Parts within [low, high) belong to member, the others to nobody.
create or replace function millrace_engine.split_lane(p_lane bigint, p_frontier bigint, p_settled int8multirange, p_cuts integer[], p_member text, p_low integer,
    p_high integer)
returns void
language plpgsql volatile as $$
declare
    old millrace_engine.lane;
    cuts integer[];
begin
    delete from millrace_engine.lane x where x.id = p_lane returning * into strict old;
    select array_agg(distinct c order by c) into cuts from unnest(p_cuts) c where c between old.slot_low and old.slot_high;
    for i in 1 .. cardinality(cuts) - 1 loop
        perform millrace_engine.open_lane(old.group_id, cuts[i], cuts[i + 1], p_frontier,
            case when cuts[i] >= p_low and cuts[i + 1] <= p_high then p_member end, p_settled);
    end loop;
end $$;
