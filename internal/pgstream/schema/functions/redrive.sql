-- Verbs for operators: they look at what was set aside, move it back or remove it. Each call is one transaction, so what a call has not done is left for
-- the next one. Each covers the priority lanes of the stream, the highest first.
--
-- A filter says which messages are meant; all its parts must hold, and null means all messages:
--   keys                     an array of keys; null in it stands for messages without one
--   positions                [lowest, highest]; null for no limit
--   headers                  an object: each of its members is in the message's headers with that value
--   reason                   a text that is contained in the reason, or in the last error of a delivery
--   dead_after, dead_before  times, dead letters only; the first is included
--
-- millrace_engine.check_choice(filter, dead letters) returns void
-- Raises: MR004 when it is no such filter.
create or replace function millrace_engine.check_choice(p_filter jsonb, p_dead boolean) returns void
language plpgsql stable as $$
declare
    allowed constant text := 'A filter has keys (an array), positions ([lowest, highest]), headers (an object) and reason (a text); for dead letters also '
        'dead_after and dead_before (times).';
    part record;
begin
    if p_filter is null then
        return;
    end if;
    if jsonb_typeof(p_filter) <> 'object' then
        raise exception 'a filter is a JSON object, not %', jsonb_typeof(p_filter) using errcode = 'MR004', hint = allowed;
    end if;
    for part in select x.key, x.value, jsonb_typeof(x.value) as type from jsonb_each(p_filter) x loop
        if part.key not in ('keys', 'positions', 'headers', 'reason') and not (p_dead and part.key in ('dead_after', 'dead_before')) then
            raise exception 'a filter has no part "%" here', left(part.key, 100) using errcode = 'MR004', hint = allowed;
        end if;
        if part.type <> (case part.key when 'keys' then 'array' when 'positions' then 'array' when 'headers' then 'object' else 'string' end)
                or part.key = 'positions' and jsonb_array_length(part.value) <> 2 then
            raise exception 'the part "%" of a filter cannot be %', part.key, part.type using errcode = 'MR004', hint = allowed;
        end if;
    end loop;
    begin
        perform (p_filter -> 'positions' ->> 0)::bigint, (p_filter -> 'positions' ->> 1)::bigint, (p_filter ->> 'dead_after')::timestamptz,
            (p_filter ->> 'dead_before')::timestamptz;
    exception when data_exception then
        raise exception 'a position or time of the filter cannot be read' using errcode = 'MR004', hint = allowed;
    end;
end $$;

-- millrace_engine.is_chosen(filter, position, key, headers, reason, dead at) returns boolean
-- Whether a message passes a filter that check_choice has seen.
create or replace function millrace_engine.is_chosen(p_filter jsonb, p_position bigint, p_key text, p_headers jsonb, p_reason text, p_at timestamptz)
returns boolean
language sql stable
return p_filter is null or coalesce(
    (p_filter -> 'keys' is null or p_filter -> 'keys' @> coalesce(to_jsonb(p_key), 'null'))
    and (p_filter -> 'positions' ->> 0 is null or p_position >= (p_filter -> 'positions' ->> 0)::bigint)
    and (p_filter -> 'positions' ->> 1 is null or p_position <= (p_filter -> 'positions' ->> 1)::bigint)
    and (p_filter -> 'headers' is null or p_headers @> (p_filter -> 'headers'))
    and (p_filter -> 'reason' is null or strpos(p_reason, p_filter ->> 'reason') > 0)
    and (p_filter -> 'dead_after' is null or p_at >= (p_filter ->> 'dead_after')::timestamptz)
    and (p_filter -> 'dead_before' is null or p_at < (p_filter ->> 'dead_before')::timestamptz), false);

-- millrace.dead_letters(stream, group, filter, max) returns the dead letters, the oldest positions first
-- max null: all of them.
-- Raises: MR002 no such stream or group; MR004 bad filter or max.
create or replace function millrace.dead_letters(p_stream text, p_group text, p_filter jsonb default null, p_max bigint default 100)
returns table ("position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempts integer, reason text,
    errors jsonb, dead_at timestamptz, priority smallint)
language plpgsql stable as $$
begin
    perform millrace_engine.need_group(p_stream, p_group);
    perform millrace_engine.check_choice(p_filter, true);
    if p_max < 0 then
        raise exception 'cannot show % dead letters', p_max using errcode = 'MR004', hint = 'Pass 0 or more, or null for all.';
    end if;
    return query select d."position", d.key, d.headers, d.payload, d.payload_bytes, d.created_at, d.attempts, d.reason, d.errors, d.dead_at, s.priority
        from millrace_engine.groups_of(p_stream, p_group) g
        join millrace_engine.stream s on s.id = g.stream_id
        join millrace_engine.dead_letter d on d.group_id = g.id
        where millrace_engine.is_chosen(p_filter, d."position", d.key, d.headers, d.reason, d.dead_at)
        order by s.priority desc, d."position" limit p_max;
end $$;
comment on function millrace.dead_letters(text, text, jsonb, bigint) is 'The dead letters of a consumer group, with their errors.';

-- millrace.redrive(stream, group, filter, max, rate, to) returns bigint, the number of dead letters that were moved
-- Moves dead letters back, at most max of them, the oldest positions first; repeat it until it returns 0. With a rate they become due one after the other, that many in a
-- second, from now on.
-- to null: to the group that gave up on them. Attempts count from zero, the error history stays. In an Ordered group they are parked: those of one key are
--          handed out in order, and what else the key has in the log waits behind them. One that is being delivered again already loses its dead letter
--          and is delivered once.
-- to:      they are published to that stream, as new messages for all its groups, with their key and headers and the header millrace_origin,
--          {stream, group, position}. With a rate they are delayed messages there.
--          With queue policy Short or Stately one of a key at most, and only while none of it is queued: the others stay dead letters.
-- Order:   those of one key keep their order.
-- Locks:   the dead letters; those that another redrive holds are passed over.
-- Raises:  MR002 no such stream or group; MR004 bad argument, another payload type, or a message too large for that stream.
create or replace function millrace.redrive(p_stream text, p_group text, p_filter jsonb default null, p_max bigint default null,
    p_rate double precision default null, p_to text default null) returns bigint
language plpgsql volatile as $$
declare
    g millrace_engine.consumer_group;
    total bigint := 0;
    ids bigint[];
    keys text[];
begin
    perform millrace_engine.need_group(p_stream, p_group);
    perform millrace_engine.check_choice(p_filter, true);
    if p_max < 1 then
        raise exception 'cannot redrive % messages', p_max using errcode = 'MR004', hint = 'Pass a positive number, or null for all.';
    end if;
    if not p_rate between 1e-6 and 1e9 then
        raise exception 'cannot redrive % messages per second', p_rate using errcode = 'MR004', hint = 'Pass a positive rate, or null for all at once.';
    end if;
    if p_to is not null then
        perform millrace_engine.stream_id(p_to);   -- also when there is nothing to move yet
    end if;
    for g in select * from millrace_engine.groups_of(p_stream, p_group) loop
        exit when total >= p_max;
        if p_to is null and g.queue_policy is not null then
            perform millrace_engine.hold_receives(g.id);   -- nobody queues a message of the same key meanwhile
        end if;
        select array_agg(x.id), array_agg(x.key) into ids, keys
            from (select d.id, d.key from millrace_engine.dead_letter d
                  where d.group_id = g.id and millrace_engine.is_chosen(p_filter, d."position", d.key, d.headers, d.reason, d.dead_at)
                      and (p_to is not null or millrace_engine.may_queue(g, d, p_filter))
                  order by d."position" limit p_max - total for update skip locked) x;
        continue when ids is null;
        if p_to is not null then
            perform millrace_engine.republish(g, ids, p_to, p_rate, total);
        else
            if g.mode = 'Ordered' then
                perform millrace_engine.park_keys(g.id, keys);
            end if;
            with gone as (
                delete from millrace_engine.dead_letter d where d.id = any (ids) returning d.*
            )
            -- Of a parked key only the first is due; the others follow it. One that is there already is left out, and not only by the constraint: that would wait
            -- for an ack which is removing it, and then deliver it once more, in its place but never due.
            insert into millrace_engine.delivery (group_id, "position", key, headers, payload, payload_bytes, created_at, attempt, visible_at, not_before,
                    parked, errors, queue_key)
                select x.group_id, x."position", x.key, x.headers, x.payload, x.payload_bytes, x.created_at, 0,
                    case when g.mode = 'Ordered' and x.key is not null and row_number() over (partition by x.key order by x."position") > 1
                        then 'infinity' else x.due end,
                    case when p_rate is not null then x.due end, g.mode = 'Ordered', x.errors,
                    case when g.queue_policy is not null or g.filter ? 'unrouted' then millrace_engine.queue_key(x.key) end
                from (select d.*, millrace_engine.clock()
                              + coalesce(make_interval(secs => (total + row_number() over (order by d."position") - 1) / p_rate), interval '0') as due
                      from gone d
                      where not exists (select from millrace_engine.delivery y where y.group_id = d.group_id and y."position" = d."position")) x
                on conflict on constraint delivery_position_unique do nothing;
            perform millrace_engine.announce(g.stream_id);
        end if;
        total := total + cardinality(ids);
    end loop;
    return total;
end $$;
comment on function millrace.redrive(text, text, jsonb, bigint, double precision, text) is
    'Moves dead letters back to their consumer group, or publishes them to another stream.';

-- millrace_engine.republish(group, dead letter ids, stream, rate, number of those before) returns void
-- Publishes dead letters to a stream and removes them.
create or replace function millrace_engine.republish(p_group millrace_engine.consumer_group, p_ids bigint[], p_to text, p_rate double precision,
    p_before bigint) returns void
language plpgsql volatile as $$
declare
    source millrace_engine.stream;
    target millrace_engine.stream;
    largest integer;
    origin constant text := 'coalesce(x.headers, ''{}'') || jsonb_build_object(''millrace_origin'',
        jsonb_build_object(''stream'', $2::text, ''group'', $3::text, ''position'', x."position"))';
    payload text;
begin
    select * into strict source from millrace_engine.stream s where s.id = p_group.stream_id;
    select * into strict target from millrace_engine.stream s where s.id = millrace_engine.stream_id(p_to);
    if source.payload_type <> target.payload_type then
        raise exception 'stream "%" has payloads of type %, and "%" of type %', source.name, source.payload_type, target.name, target.payload_type
            using errcode = 'MR004', hint = 'Redrive to a stream with the same payload type.';
    end if;
    if target.versions then
        perform millrace_engine.check_entity_keys(array(select d.key from millrace_engine.dead_letter d where d.id = any (p_ids)));
    end if;
    payload := case source.payload_type when 'JSON' then 'payload' else 'payload_bytes' end;
    execute format('select max(pg_column_size(d.%I)) from millrace_engine.dead_letter d where d.id = any ($1)', payload) into largest using p_ids;
    if largest > target.max_message_bytes then
        raise exception 'a message of % bytes is larger than the % allowed in stream "%"', largest, target.max_message_bytes, target.name
            using errcode = 'MR004', hint = 'Choose the others with a filter, or raise max_message_bytes of the stream, maxMessageBytes in a resource.';
    end if;
    if p_rate is null then
        execute format('with x as (delete from millrace_engine.dead_letter d where d.id = any ($1) returning d.*)
            insert into millrace.%I (key, headers, payload) select x.key, %s, x.%I from x order by x."position"', target.name, origin, payload)
            using p_ids, source.name, p_group.name;
    else
        execute format('with x as (delete from millrace_engine.dead_letter d where d.id = any ($1) returning d.*),
            y as (select x.key, %s as headers, x.%I as payload, row_number() over (order by x."position") - 1 as n from x)
            select %s(p_stream => $4, p_payload => y.payload, p_key => y.key, p_headers => y.headers,
                p_deliver_at => millrace_engine.clock() + make_interval(secs => ($5 + y.n) / $6)) from y order by y.n', origin, payload,
                case source.payload_type when 'JSON' then 'millrace.publish' else 'millrace.publish_bytes' end)
            using p_ids, source.name, p_group.name, target.name, p_before, p_rate;
    end if;
end $$;

-- millrace.purge_dead_letters(stream, group, filter) returns bigint, the number of dead letters that were removed
-- Passed over: those that a redrive or another purge holds this moment.
-- Raises: MR002 no such stream or group; MR004 bad filter.
create or replace function millrace.purge_dead_letters(p_stream text, p_group text, p_filter jsonb default null) returns bigint
language plpgsql volatile as $$
declare
    n bigint;
begin
    perform millrace_engine.need_group(p_stream, p_group);
    perform millrace_engine.check_choice(p_filter, true);
    delete from millrace_engine.dead_letter d where d.id in (
        select x.id from millrace_engine.dead_letter x
        where x.group_id in (select g.id from millrace_engine.groups_of(p_stream, p_group) g)
          and millrace_engine.is_chosen(p_filter, x."position", x.key, x.headers, x.reason, x.dead_at)
        for update skip locked);
    get diagnostics n = row_count;
    return n;
end $$;
comment on function millrace.purge_dead_letters(text, text, jsonb) is 'Removes dead letters of a consumer group for good.';

-- millrace.purge_deliveries(stream, group, filter) returns bigint, the number of messages that were removed
-- Removes messages that wait for another delivery after a nack, an expiry or a redrive, and that nobody holds: the group never gets them again.
-- Passed over: what a member holds, and the parked messages of a key whose next one is being settled this moment.
-- Raises: MR002 no such stream or group; MR004 bad filter.
create or replace function millrace.purge_deliveries(p_stream text, p_group text, p_filter jsonb default null) returns bigint
language plpgsql volatile as $$
declare
    g millrace_engine.consumer_group;
    free text[];
    n bigint;
    total bigint := 0;
begin
    perform millrace_engine.need_group(p_stream, p_group);
    perform millrace_engine.check_choice(p_filter, false);
    for g in select * from millrace_engine.groups_of(p_stream, p_group) loop
        perform millrace_engine.end_expired(g.id, millrace_engine.clock());
        -- Whoever removes the next message of a key first holds its row, and so must this, or each would wait for the other.
        select array_agg(x.key) into free from (
            select k.key from millrace_engine.parked_key k where k.group_id = g.id order by k.key for no key update skip locked) x;
        delete from millrace_engine.delivery d where d.id in (
            select x.id from millrace_engine.delivery x
            where x.group_id = g.id and x.nonce is null and (not x.parked or x.key is null or x.key = any (free))
              and millrace_engine.is_chosen(p_filter, x."position", x.key, x.headers, coalesce(x.errors -> -1 ->> 'error', ''), null)
            for update skip locked);
        get diagnostics n = row_count;
        total := total + n;
    end loop;
    return total;
end $$;
comment on function millrace.purge_deliveries(text, text, jsonb) is 'Removes messages that wait for another delivery and that nobody holds.';
