-- millrace.extend(claim, seconds) returns timestamptz
-- Keeps the claim until now plus seconds, and returns that time. For handlers that need longer than the group's ack wait.
-- Raises: MR001 the claim has ended; MR004 no such time.
create or replace function millrace.extend(p_claim text, p_seconds double precision) returns timestamptz
language plpgsql volatile as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    ends timestamptz;
begin
    if (p_seconds > 0 and millrace_engine.is_duration(p_seconds)) is not true then
        raise exception 'cannot extend a claim by % seconds', coalesce(p_seconds::text, 'null') using errcode = 'MR004',
            hint = 'Pass a positive number of seconds, up to a hundred years.';
    end if;
    ends := millrace_engine.clock() + make_interval(secs => p_seconds);
    if t[2] = 0 then
        perform millrace_engine.hold_retries(t[4]);
        update millrace_engine.delivery d set visible_at = ends where d.group_id = t[1] and d.nonce = t[4];
        if not found then
            raise exception 'the claim has ended: it was settled, or expired and was taken over' using errcode = 'MR001',
                hint = 'This is normal after a long pause: its messages are delivered again. Extend claims that need more time.';
        end if;
        return ends;
    end if;
    c := millrace_engine.hold_claim(t, false);
    insert into millrace_engine.settlement (lane_id, claim, at, expires_at, ring, kind)
        values (c.lane_id, c.claim, millrace_engine.clock(), ends, pg_sequence_last_value('millrace_engine.ring'), 'E');
    update millrace_engine.member m set expires_at = ends
        where m.group_id = t[1] and m.name = c.member and m.expires_at < ends;
    return ends;
end $$;
comment on function millrace.extend(text, double precision) is 'Prolongs a claim to the given number of seconds from now.';
