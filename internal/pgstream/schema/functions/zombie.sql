-- millrace_engine.end_zombies(seen, out seen, out zombies)
-- Whoever settles a claim inside a transaction holds the claim's shared lock until that transaction ends, and takeover never waits for it: a slow sink is not
-- disturbed. So a client that hangs in such a transaction would keep an expired claim for ever. This ends the session of a client that holds the lock of a claim which
-- expired longer ago than the setting zombie_after_seconds (default 60). Its transaction rolls back, its ack with it, and the claim is taken over.
-- Only a transaction that held the lock at an earlier call, too, is looked at (seen is what that call returned): a late ack that is just committing lives. Takeover and
-- maintenance hold the lock exclusively and are never touched. A prepared transaction has no session: it is reported and left to whoever prepared it.
-- The other lock that one client can keep from all is a group's receive lock: whoever receives holds it to the end of the transaction. A driver that begins transactions by itself leaves
-- that one open, and then nobody else of the group receives anything, without a word. So a session is ended, too, that has idled in such a transaction for the same time while somebody
-- waits for the lock. One that is busy, and one whose state the caller may not see, is reported when somebody has waited for as long.
-- zombies: [{pid or gid, user, application, stream, group, receiving, expired_at, ended, problem}, …]; receiving: it holds the receive lock, and there is no expired_at; problem says what
-- to do when it could not be ended.
-- Needs the same role as the session, or pg_signal_backend, and pg_read_all_stats for the receive lock; the session of a superuser can be ended by a superuser only.
create or replace function millrace_engine.end_zombies(p_seen jsonb default null, out seen jsonb, out zombies jsonb)
language plpgsql volatile
set enable_seqscan = off
set jit = off
as $$
declare
    limit_ constant interval := make_interval(secs => coalesce((select s.value::double precision from millrace_engine.setting s
        where s.name = 'zombie_after_seconds'), 60));
    now_ constant timestamptz := millrace_engine.clock();
    h record;
    c record;
    who text;
    whose text;
    gid_ text;
    ended boolean;
    problem text;
    busy text;   -- why a session that receives is not ended
begin
    seen := '{}';
    zombies := '[]';
    for h in
        with lock as materialized (
            select k.pid, k.virtualtransaction, k.classid, k.objid, k.classid::bigint as area, k.mode, k.granted, k.waitstart
            from pg_locks k
            where k.locktype = 'advisory' and k.objsubid = 2
              and k.database = (select d.oid from pg_database d where d.datname = current_database())
        ), waiter as (
            select k.classid, min(k.waitstart) as since from lock k where not k.granted and k.area between 536870913 and 1073741823 and k.objid = 0 group by k.classid
        )
        select k.pid, k.virtualtransaction as vx, k.classid, k.objid, k.area - 1073741824 as lane, k.mode, w.since as waits_since, w.classid is not null as receiving,
               format('%s %s %s', k.virtualtransaction, k.classid, k.objid) as name
        from lock k
        left join waiter w on w.classid = k.classid and k.objid = 0
        where k.granted and (k.mode = 'ShareLock' and k.area between 1073741824 and 1610612735 or w.classid is not null)
          and k.pid is distinct from pg_backend_pid()
    loop
        seen := seen || jsonb_build_object(h.name, true);
        continue when not coalesce(p_seen ? h.name, false);
        busy := null;
        if h.receiving then
            select s.id as stream_id, s.name as stream, g.name as "group", null::timestamptz as expired_at into c
                from millrace_engine.consumer_group g
                join millrace_engine.stream s on s.id = g.stream_id
                where g.id = h.lane + 536870912;
            continue when not found;
            select case when a.state is null and h.pid is not null then format('role %I may not see whether it idles; end it: select pg_terminate_backend(%s); or once and for all: grant pg_read_all_stats, pg_signal_backend to %I',
                            current_user, h.pid, current_user)
                        when a.state like 'idle in transaction%' and a.state_change + limit_ <= now_ then null
                        else format('it is busy; let it commit, or end it: select pg_terminate_backend(%s)', h.pid) end
                into busy from (select) one left join pg_stat_activity a on a.pid = h.pid;
            continue when busy is not null and (h.waits_since + limit_ <= now_) is not true;
        -- The lock knows 31 bits of claim or nonce. Should two share them, both must have ended.
        elsif h.lane > 0 then
            select s.id as stream_id, s.name as stream, g.name as "group", max(o.expires_at) as expired_at into c
                from millrace_engine.lane l
                join millrace_engine.consumer_group g on g.id = l.group_id
                join millrace_engine.stream s on s.id = g.stream_id
                cross join lateral (select y.* from millrace_engine.claim y where y.lane_id = l.id order by y.claim desc limit 1) n
                cross join lateral millrace_engine.open_claims(l.id, n.floor, n.stragglers) o
                where l.id = h.lane and o.claim & 2147483647 = h.objid::bigint
                group by s.id, s.name, g.name;
        else
            select min(s.id) as stream_id, min(s.name) as stream, min(g.name) as "group", max(d.visible_at) as expired_at into c
                from millrace_engine.delivery d
                join millrace_engine.consumer_group g on g.id = d.group_id
                join millrace_engine.stream s on s.id = g.stream_id
                where d.nonce & 2147483647 = h.objid::bigint
                having count(*) > 0;
        end if;
        continue when not h.receiving and (c.expired_at is null or c.expired_at + limit_ > now_);

        ended := false;
        problem := null;
        who := null;
        whose := null;
        gid_ := null;
        if h.pid is null then
            select p.gid, p.owner into gid_, who
                from pg_locks k
                join pg_prepared_xacts p on p.transaction = k.transactionid and p.database = current_database()
                where k.locktype = 'transactionid' and k.mode = 'ExclusiveLock' and k.granted and k.pid is null and k.virtualtransaction = h.vx
                limit 1;
            problem := format('commit or roll back the prepared transaction %L', gid_);
        else
            select a.usename, a.application_name into who, whose from pg_stat_activity a where a.pid = h.pid;
        end if;
        if h.pid is not null and busy is not null then
            problem := busy;
        elsif h.pid is not null then
            begin
                -- Only if it is still the same transaction.
                select pg_terminate_backend(k.pid, 1000) into ended from pg_locks k
                    where k.locktype = 'advisory' and k.objsubid = 2 and k.mode = h.mode and k.granted and k.pid = h.pid
                      and k.virtualtransaction = h.vx and k.classid = h.classid and k.objid = h.objid;
                continue when ended is null;   -- it has just ended by itself
                if ended then
                    perform pg_notify('millrace', c.stream_id::text);
                else
                    problem := 'the server was told to end the session, but it has not ended yet';
                end if;
            exception when insufficient_privilege then
                ended := false;
                problem := format('role %I may not end it; run: select pg_terminate_backend(%s)%s', current_user, h.pid,
                    case when (select r.rolsuper from pg_roles r where r.rolname = who) then ', as a superuser, because it is the session of one'
                         else format('; or once and for all: grant pg_signal_backend to %I', current_user) end);
            end;
        end if;
        zombies := zombies || jsonb_build_object('pid', h.pid, 'gid', gid_, 'user', who, 'application', whose, 'stream', c.stream, 'group', c."group",
            'receiving', h.receiving, 'expired_at', c.expired_at, 'ended', ended, 'problem', problem);
    end loop;
end $$;
comment on function millrace_engine.end_zombies(jsonb) is 'Ends sessions whose open transaction keeps a long expired claim from being taken over, or everybody else of a group from receiving.';
