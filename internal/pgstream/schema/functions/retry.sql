-- millrace.retry(stream, group, member, min_idle_seconds, positions, delay_seconds, max_attempts, max, reason)
--     returns the messages: position, attempts, member, due_at, priority
-- For operators: takes messages that were handed out and are not settled back from whoever holds them, so that they are delivered again after the delay without
-- waiting for the end of a lease; and makes messages that wait for another delivery due then. Returns what became of each: attempts is how often it was delivered,
-- member who held it (null: nobody), due_at when it is delivered again (null: it is a dead letter now). All parts that are given must hold:
--   member            held by this member
--   min_idle_seconds  for so long at least since it was handed out or extended, reckoned from the end of the lease and the group's ack wait; or since its last failure
--   positions         one of these
--   max               so many messages at most, the oldest claims first
-- max_attempts: a message that was delivered so often becomes a dead letter; null is the group's own limit. Only for Shared groups.
-- A claim ends as a whole: its token is good for nothing from then on, or the effects of its holder and of the next delivery could both commit. In a Shared group what it
-- held besides is delivered again at once, and the attempt is not counted. In an Ordered group everything in it comes again, in order, after the delay.
-- What somebody settles this moment is left to that transaction. Covers the priority lanes.
-- Locks:  the groups' receive locks, the claims that end.
-- Raises: MR002 no such stream or group; MR003 isolation level; MR004 a value that cannot be.
create or replace function millrace.retry(p_stream text, p_group text, p_member text default null, p_min_idle_seconds double precision default 0,
    p_positions bigint[] default null, p_delay_seconds double precision default 0, p_max_attempts integer default null, p_max integer default 1000,
    p_reason text default 'taken back')
returns table ("position" bigint, attempts integer, member text, due_at timestamptz, priority smallint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    now_ constant timestamptz := millrace_engine.clock();
    due timestamptz;
    latest timestamptz;      -- a lease that ends later has not been idle for long enough
    left_ bigint := p_max;
    n bigint;
    g millrace_engine.consumer_group;
    lane smallint;           -- the priority
    most integer;
    held bigint;
    l record;
    o millrace_engine.claim;
    c millrace_engine.claim;
    chosen bigint[];
begin
    perform millrace_engine.need_group(p_stream, p_group);
    if current_setting('transaction_isolation') <> 'read committed' then
        perform millrace_engine.refuse_isolation();
    end if;
    if (millrace_engine.is_duration(p_min_idle_seconds) and millrace_engine.is_duration(p_delay_seconds) and p_max >= 1) is not true or p_max_attempts < 1 then
        raise exception 'an option of the retry is out of range' using errcode = 'MR004',
            hint = 'Times are 0 seconds or more, up to a hundred years; p_max and p_max_attempts are 1 or more.';
    end if;
    due := now_ + make_interval(secs => p_delay_seconds);
    for g in select x.* from millrace_engine.groups_of(p_stream, p_group) x loop
        if g.mode = 'Ordered' and p_max_attempts is not null then
            raise exception 'group "%" is Ordered and has no attempts of single messages', g.name using errcode = 'MR004',
                hint = 'Leave p_max_attempts out: its failure policy says what becomes of a message that fails.';
        end if;
        perform pg_advisory_xact_lock(536870912 + g.id, 0);
        select s.priority into lane from millrace_engine.stream s where s.id = g.stream_id;
        most := case when g.mode = 'Shared' then coalesce(p_max_attempts, nullif(g.max_attempts, 0)) end;
        latest := now_ + make_interval(secs => g.ack_wait_ms / 1000.0 - p_min_idle_seconds);

        -- Those that somebody holds for another time.
        for held in select d.nonce from millrace_engine.delivery d
                where d.group_id = g.id and d.nonce is not null and d.visible_at <= latest and (p_member is null or d.member = p_member)
                  and (p_positions is null or d."position" = any (p_positions))
                group by d.nonce order by min(d."position") loop
            exit when left_ <= 0;
            continue when not pg_try_advisory_xact_lock(1073741824, (held & 2147483647)::integer);
            return query
                with mine as (
                    select d.*, x.id is not null as chosen, x.id is not null and d.attempt >= most as dead
                    from millrace_engine.delivery d
                    left join (select y.id from millrace_engine.delivery y
                        where y.group_id = g.id and y.nonce = held and (p_positions is null or y."position" = any (p_positions))
                        order by y."position" limit left_) x on x.id = d.id
                    where d.group_id = g.id and d.nonce = held
                ), buried as (
                    select millrace_engine.bury(array_agg(m.id), p_reason) from mine m where m.dead having count(*) > 0
                ), back as (
                    update millrace_engine.delivery d set nonce = null, member = null, attempt = d.attempt - (not m.chosen)::integer,
                        visible_at = case when m.chosen then due else now_ end,
                        errors = case when m.chosen then millrace_engine.add_error(d.errors, d.attempt, p_reason) else d.errors end
                    from mine m where d.id = m.id and m.dead is not true
                )
                select m."position", m.attempt, m.member, case when m.dead then null else due end, lane
                from mine m left join buried on true where m.chosen order by m."position";
            get diagnostics n = row_count;
            left_ := left_ - n;
        end loop;

        -- Those that wait. Of a parked key only the first has a time.
        if p_member is null and left_ > 0 then
            return query
                with mine as (
                    select d.id, d."position", d.attempt, d.attempt >= most as dead from millrace_engine.delivery d
                    where d.group_id = g.id and d.nonce is null and d.visible_at > now_ and d.visible_at < 'infinity'
                      and (p_positions is null or d."position" = any (p_positions))
                      and coalesce((d.errors -> -1 ->> 'at')::timestamptz, d.created_at) <= now_ - make_interval(secs => p_min_idle_seconds)
                    order by d."position" limit left_ for update skip locked
                ), buried as (
                    select millrace_engine.bury(array_agg(m.id), p_reason) from mine m where m.dead having count(*) > 0
                ), back as (
                    update millrace_engine.delivery d set visible_at = due from mine m where d.id = m.id and m.dead is not true
                )
                select m."position", m.attempt, null::text, case when m.dead then null else due end, lane
                from mine m left join buried on true order by m."position";
            get diagnostics n = row_count;
            left_ := left_ - n;
        end if;

        -- Those that were handed out from the log.
        for l in select x.id, f.floor, f.stragglers from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and not f.idle loop
            for o in select * from millrace_engine.open_claims(l.id, l.floor, l.stragglers) x
                    where x.nonce <> 0 and x.expires_at <= latest and (p_member is null or x.member = p_member) loop   -- 0: given back already
                exit when left_ <= 0;
                continue when not millrace_engine.try_claim(l.id, o.claim);
                begin
                    c := millrace_engine.hold_claim(array[g.id, l.id, o.claim, o.nonce]);
                exception when sqlstate 'MR001' then
                    continue;   -- settled or given back meanwhile
                end;
                chosen := millrace_engine.held_positions(c, p_positions, left_);
                continue when chosen = '{}';
                if g.mode = 'Ordered' then
                    chosen := millrace_engine.held_positions(c, null, null);
                    perform millrace_engine.give_back(c, g.stream_id, due - now_, c.attempt + 1);
                else
                    perform millrace_engine.set_aside(c, chosen, c.attempt >= most, c.attempt, due - now_, p_reason, false);
                    perform millrace_engine.settle_messages(c, chosen);
                    if exists (select from millrace_engine.open_claim(l.id, c.claim)) then
                        perform millrace_engine.give_back(c, g.stream_id, interval '0', c.attempt);
                    end if;
                end if;
                return query select x, c.attempt, c.member, case when c.attempt >= most then null else due end, lane from unnest(chosen) x order by x;
                left_ := left_ - cardinality(chosen);
            end loop;
        end loop;
        perform millrace_engine.announce(g.stream_id);
        exit when left_ <= 0;
    end loop;
end $$;
comment on function millrace.retry(text, text, text, double precision, bigint[], double precision, integer, integer, text) is
    'Takes messages that are not settled back from their holders, to be delivered again.';
