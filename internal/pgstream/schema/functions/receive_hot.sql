-- What receive does nearly always: a claim of the next messages by one statement or two, and the messages. What does not fit, receive_template does.
--
-- millrace_engine.receive_shared_template(group, member, max, lease in ms, ack) returns the messages of one claim
-- Receive for a member of a Shared group.
-- Order, repeat, locks, raises: as receive_template.
create or replace function millrace_engine.receive_shared_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    taken  record;
    n      integer;
    behind integer;
begin
    taken := millrace_engine.claim_next(/* stream id */ 0, 'millrace_engine.position_template', p_group, p_member, p_max, p_lease_ms, p_ack, (random() * 999999999999999)::bigint + 1);
    if taken.claim is not null then
        -- Of the one segment that had the messages before; of the others only if that does not have them all.
        return query select taken.claim, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, 1, taken.expires_at
            from millrace.stream_template m
            where m.segment = taken.segment and m."position" > taken.low and m."position" <= taken.high
            order by m."position";
        get diagnostics n = row_count;
        if n < taken.high - taken.low then
            return query select taken.claim, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, 1, taken.expires_at
                from millrace.stream_template m
                where m.segment is distinct from taken.segment and m."position" > taken.low and m."position" <= taken.high
                order by m."position";
            get diagnostics behind = row_count;
            n := n + behind;
            if n < taken.high - taken.low then
                perform millrace_engine.note_claimed_template(taken.claim, taken.low, taken.high, n);
            end if;
            if behind > 0 then
                perform millrace_engine.note_segment_template(taken.claim, taken.high);
            end if;
        end if;
        if n > 0 then
            return;
        end if;
        p_ack := null;   -- settled with an empty claim: rollbacks left nothing there, go on behind it
        perform set_config('millrace.receiving', pg_current_xact_id_if_assigned()::text, true);
    elsif taken.low is not null then
        return;   -- nothing is there
    end if;
    return query select * from millrace_engine.receive_template(p_group, p_member, p_max, p_lease_ms, p_ack);
end $$;
comment on function millrace_engine.receive_shared_template(text, text, integer, bigint, text) is 'Claims messages for a member of a Shared group.';

-- millrace_engine.receive_ordered_template(group, member, max, lease in ms, ack) returns the messages of one claim
-- Receive for a member of an Ordered group. It holds the group's receive lock alone; the Go client, which can end the transaction in between, does not
-- (fetch.go).
-- Order, repeat, locks, raises: as receive_template.
create or replace function millrace_engine.receive_ordered_template(p_group text, p_member text, p_max integer, p_lease_ms bigint, p_ack text)
returns table (claim text, "position" bigint, key text, headers jsonb, payload jsonb, payload_bytes bytea, created_at timestamptz, attempt integer,
    expires_at timestamptz)
language plpgsql volatile
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    taken record;
begin
    taken := millrace_engine.claim_ordered_template(p_group, p_member, p_max, p_lease_ms, p_ack, (random() * 999999999999999)::bigint + 1, null, true);
    if taken.claim is not null then
        return query select taken.claim, m."position", m.key, m.headers, /* json, bytes */ m.payload, null::bytea, m.created_at, 1, taken.expires_at
            from millrace.stream_template m
            where m."position" > taken.low and m."position" <= taken.high
              and (millrace_engine.slot(m.key, m."position") - taken.slot_low) & 1023 < taken.slot_high - taken.slot_low
            order by m."position";
        return;
    end if;
    return query select * from millrace_engine.receive_template(p_group, p_member, p_max, p_lease_ms, p_ack);
end $$;
comment on function millrace_engine.receive_ordered_template(text, text, integer, bigint, text) is 'Claims messages for a member of an Ordered group.';
