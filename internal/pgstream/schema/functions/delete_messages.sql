-- millrace.delete_messages(claim, positions) returns void
-- Settles messages of the claim and removes them from the stream, in the caller's transaction; positions null: everything that the claim still holds. For what must not
-- be kept until retention takes it. Whoever has not been given them yet, in other groups too, never is; copies that other groups keep for another
-- delivery or as dead letters stay there.
-- Fenced as an ack: whoever has lost the claim removes nothing.
-- Rights: its owner's, because the runtime role may not write to a stream otherwise than by publishing.
-- Raises: MR001 the claim has ended, or one of the messages is settled already; MR003 isolation level; MR004 a position that the claim does not hold, or a stream
--         with versions: a history has no holes.
create or replace function millrace.delete_messages(p_claim text, p_positions bigint[] default null) returns void
language plpgsql volatile security definer
set search_path = pg_catalog
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    t bigint[] := millrace_engine.parse_token(p_claim);
    c millrace_engine.claim;
    source record;
    removed bigint[] := p_positions;
begin
    select st.name, st.versions, g.filter into source
        from millrace_engine.consumer_group g join millrace_engine.stream st on st.id = g.stream_id where g.id = t[1];
    if not found then
        raise exception 'the claim has ended: its group was dropped' using errcode = 'MR001', hint = 'Stop receiving for it, or create it again.';
    end if;
    if source.versions then
        raise exception 'messages of stream "%" cannot be deleted one by one', source.name using errcode = 'MR004',
            hint = 'They are the histories of its keys, which have no holes. Ack them.';
    end if;
    if p_positions is not null then
        perform millrace.ack_messages(p_claim, p_positions);
    elsif t[2] = 0 then
        select array_agg(d."position") into removed from millrace_engine.delivery d where d.group_id = t[1] and d.nonce = t[4];
        perform millrace.ack(p_claim);
    else
        c := millrace_engine.hold_claim(t);
        removed := millrace_engine.held_positions(c, null, null);
        perform millrace.ack(p_claim);
    end if;
    execute format('delete from millrace.%I m where m."position" = any ($1)', source.name) using removed;
end $$;
comment on function millrace.delete_messages(text, bigint[]) is 'Settles messages of a claim and removes them from the stream.';

-- millrace_engine.held_positions(claim, positions, max) returns bigint[]
-- What a range claim holds and has not settled, in order: of these positions, or all of it; at most max.
create or replace function millrace_engine.held_positions(p_claim millrace_engine.claim, p_positions bigint[], p_max bigint) returns bigint[]
language plpgsql volatile
set enable_seqscan = off
set jit = off
set enable_bitmapscan = off
as $$
declare
    source record;
    held bigint[];
begin
    select st.name, st.first_position, l.slot_low, l.slot_high, g.filter into strict source
        from millrace_engine.lane l
        join millrace_engine.consumer_group g on g.id = l.group_id
        join millrace_engine.stream st on st.id = g.stream_id
        where l.id = p_claim.lane_id;
    execute format('select coalesce(array_agg(x."position"), ''{}'') from (
            select m."position" from millrace.%I m
            where m."position" > $1 and m."position" <= $2 and millrace_engine.slot(m.key, m."position") between %s and %s - 1
              and not $3 @> m."position" and ($4 is null or m."position" = any ($4)) and millrace_engine.matches(%L, m.key, m.headers)
            order by m."position" limit $5) x', source.name, source.slot_low, source.slot_high, source.filter)
        into held using greatest(p_claim.low, source.first_position - 1), p_claim.high, coalesce(p_claim.settled, '{}'), p_positions, p_max;
    return held;
end $$;
