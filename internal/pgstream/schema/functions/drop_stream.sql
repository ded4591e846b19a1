-- millrace_engine.drop_stream(name, only_if_empty) returns void
-- Removes the stream with its groups, its messages and its priority lanes. Nothing happens when it does not exist.
-- Raises: MR004 when it is a priority lane; MR005 when it has messages and only_if_empty is set; nothing is removed then.
create or replace function millrace_engine.drop_stream(p_name text, p_only_if_empty boolean default false) returns void
language plpgsql volatile
set client_min_messages = warning   -- what a stream does not have is skipped
as $$
declare
    s millrace_engine.stream;
    lane millrace_engine.stream;
    f record;
    used boolean;
begin
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.name = p_name for update;
    if not found then
        return;
    end if;
    perform millrace_engine.refuse_lane(s);
    for lane in select * from millrace_engine.stream x where x.id = s.id or x.parent_id = s.id order by x.priority for update loop
        if p_only_if_empty and to_regclass(format('millrace.%I', lane.name)) is not null then
            -- Locked first, so that nothing arrives between the look and the drop.
            execute format('lock table millrace.%I in access exclusive mode', lane.name);
            execute format('select exists (select from millrace.%I)', lane.name) into used;
            if used then
                raise exception 'stream "%" has messages', s.name using errcode = 'MR005', hint = 'Let them be consumed and removed, or drop it with its messages.';
            end if;
        end if;
    end loop;
    for lane in select * from millrace_engine.stream x where x.id = s.id or x.parent_id = s.id order by x.priority loop
        execute format('drop table if exists millrace.%I', lane.name);
        execute format('drop sequence if exists millrace_engine.position_%1$s, millrace_engine.state_%1$s, millrace_engine.notified_%1$s, millrace_engine.high_%1$s', lane.id);
        for f in select p.oid::regprocedure as signature from pg_proc p
                 where p.pronamespace = 'millrace_engine'::regnamespace
                   and p.proname in (select replace(t.proname, '_template', '_' || lane.id) from pg_proc t
                                     where t.pronamespace = 'millrace_engine'::regnamespace and t.proname like '%\_template') loop
            execute 'drop function ' || f.signature;
        end loop;
    end loop;
    delete from millrace_engine.stream x where x.id = s.id;   -- and its lanes
end $$;
comment on function millrace_engine.drop_stream(text, boolean) is 'Removes a stream, its groups and its messages.';
