-- millrace.leave(stream, group, member) returns void
-- Ends a membership: open claims of the member go back at once without counting an attempt, and in an Ordered group its partitions are
-- free for others. What it is settling this moment is left to that transaction. Covers the priority lanes. Harmless when there is no such member,
-- as after a second call, or when the group has given its place away. A group that is unknown is an error, or a misspelt one would go unseen until the leases end.
-- Raises: MR002 no such stream or group.
create or replace function millrace.leave(p_stream text, p_group text, p_member text) returns void
language plpgsql volatile
set enable_seqscan = off   -- whatever the statistics were when the deliveries were few
set jit = off
as $$
declare
    g millrace_engine.consumer_group;
    l record;
    o millrace_engine.claim;
    held bigint;
begin
    perform millrace_engine.need_group(p_stream, p_group);
    for g in select x.* from millrace_engine.groups_of(p_stream, p_group) x loop
        perform pg_advisory_xact_lock(536870912 + g.id, 0);
        for l in select x.id, f.floor, f.stragglers from millrace_engine.lane x, millrace_engine.lane_progress(x.id) f where x.group_id = g.id and not f.idle loop
            for o in select * from millrace_engine.open_claims(l.id, l.floor, l.stragglers) x where x.member = p_member and x.nonce <> 0 loop  -- 0: given back already
                if millrace_engine.try_claim(l.id, o.claim) then
                    begin
                        perform millrace.release(g.id || '.' || l.id || '.' || o.claim || '.' || o.nonce);
                    exception when sqlstate 'MR001' then
                        null;  -- settled or given back meanwhile
                    end;
                end if;
            end loop;
        end loop;
        update millrace_engine.lane x set member = null where x.group_id = g.id and x.member = p_member;
        delete from millrace_engine.member m where m.group_id = g.id and m.name = p_member;
        for held in select distinct d.nonce from millrace_engine.delivery d where d.group_id = g.id and d.member = p_member and d.nonce is not null loop
            if pg_try_advisory_xact_lock(1073741824, (held & 2147483647)::integer) then
                perform millrace_engine.release_deliveries(g.id, held);
            end if;
        end loop;
        perform millrace_engine.announce(g.stream_id);
    end loop;
end $$;
comment on function millrace.leave(text, text, text) is 'Ends a membership and gives everything it holds back at once.';
