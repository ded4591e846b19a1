-- millrace_engine.receive_deliveries(group, member, max, now, end of the lease, nonce) returns messages
-- Hands out due messages of the delivery table, oldest due first; a suspect alone. A message that was handed out for the last time and
-- whose lease ended is a dead letter.
create or replace function millrace_engine.receive_deliveries(p_group integer, p_member text, p_max integer, p_now timestamptz, p_ends timestamptz,
    p_nonce bigint)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off   -- before PostgreSQL 18 what is forbidden, and yet needed, costs so much that it is worth compiling: half a second at each receive
as $$
#variable_conflict use_column
begin
    perform millrace_engine.end_expired(p_group, p_now);
    perform millrace_engine.bury_worn(p_group, p_max, p_now);
    return query
        with due as (
            select x.id, x.suspect, row_number() over (order by x.visible_at, x."position") as n
            from (select y.id, y.suspect, y.visible_at, y."position" from millrace_engine.delivery y
                  where y.group_id = p_group and y.visible_at <= p_now and y.nonce is null and not y.blocked
                  order by y.visible_at, y."position" limit p_max for update skip locked) x
        ), chosen as (
            select d.id from due d where d.n = 1 or (not d.suspect and not (select f.suspect from due f where f.n = 1))
        )
        update millrace_engine.delivery d
            set attempt = d.attempt + 1, nonce = p_nonce, member = p_member, visible_at = p_ends
            from chosen where d.id = chosen.id
            returning p_group || '.0.0.' || p_nonce, d."position", d.key, d.headers, d.payload, d.payload_bytes, d.created_at, d.attempt, p_ends;
end $$;
comment on function millrace_engine.receive_deliveries(integer, text, integer, timestamptz, timestamptz, bigint) is
    'Hands out messages that are due again after a nack or an expiry.';

-- millrace_engine.bury_worn(group, max, now) returns void
-- Makes dead letters of messages that were handed out for the last time and have expired. Only among those that are about to be handed out: looking through all
-- would cost as much as there are. What is worn out makes room for the next.
create or replace function millrace_engine.bury_worn(p_group integer, p_max integer, p_now timestamptz) returns void
language plpgsql volatile as $$
begin
    loop
        perform millrace_engine.bury(array_agg(w.id), 'not settled within the ack wait')
            from (select x.id, x.attempt from millrace_engine.delivery x
                  where x.group_id = p_group and x.visible_at <= p_now and x.nonce is null and not x.blocked
                  order by x.visible_at, x."position" limit p_max for update skip locked) w
            where w.attempt >= (select nullif(g.max_attempts, 0) from millrace_engine.consumer_group g where g.id = p_group)
            having count(*) > 0;
        exit when not found;
    end loop;
end $$;

-- millrace_engine.end_expired(group, now) returns void
-- Ends the expired claims of messages from the delivery table; each message gets an entry in its error history. A claim is ended as a whole,
-- or not at all while somebody settles it.
create or replace function millrace_engine.end_expired(p_group integer, p_now timestamptz) returns void
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    expired bigint;
begin
    for expired in select distinct x.nonce from millrace_engine.delivery x where x.group_id = p_group and x.visible_at <= p_now and x.nonce is not null loop
        if pg_try_advisory_xact_lock(1073741824, (expired & 2147483647)::integer) then
            perform millrace_engine.bury(array_agg(d.id), 'not settled within the ack wait, and another message of its key waits for its retry')
                from millrace_engine.delivery d
                where d.group_id = p_group and d.nonce = expired and d.visible_at <= p_now and millrace_engine.retry_is_taken(d)
                having count(*) > 0;
            update millrace_engine.delivery d set nonce = null, member = null,
                    errors = millrace_engine.add_error(d.errors, d.attempt, 'not settled within the ack wait')
                where d.group_id = p_group and d.nonce = expired and d.visible_at <= p_now;
        end if;
    end loop;
end $$;

-- millrace_engine.bury(delivery ids, reason) returns void
-- Moves messages from the delivery table to the dead letters, with their errors.
create or replace function millrace_engine.bury(p_ids bigint[], p_reason text) returns void
language plpgsql volatile as $$
begin
    with worn as (
        delete from millrace_engine.delivery d where d.id = any (p_ids) returning d.*
    )
    insert into millrace_engine.dead_letter (group_id, "position", key, headers, payload, payload_bytes, created_at, attempts, reason, errors, dead_at)
        select w.group_id, w."position", w.key, w.headers, w.payload, w.payload_bytes, w.created_at, w.attempt,
               p_reason, w.errors, millrace_engine.clock()
        from worn w on conflict on constraint dead_letter_position_unique do nothing;
end $$;
