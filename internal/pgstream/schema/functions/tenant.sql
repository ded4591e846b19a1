-- Tenants, and modules. The tenant of an entity is what stands before the first / in its key: 'acme/cart-1' and 'globex/cart-1' are two entities. A stream with versions may have
-- a table for each tenant, a partition beside the ring of segments: positions, groups, projections and the order of the stream are those of one log, and a tenant's messages are
-- apart on disk.
--
-- millrace.add_tenant(stream, tenant) returns void
-- Gives a tenant its table, millrace."<stream>.<tenant>", into which millrace.append puts its messages from then on. Repeating it is harmless. A stream with tenants keeps all
-- messages, for there is no common end to trim. Entities without a / in their keys belong to no tenant; with one, to a tenant that has been added, or the append is refused.
-- Cost:   every reader of the stream looks into one table more.
-- Locks:  no reader and no publisher waits.
-- Raises: 42501 need_owner; MR002 no such stream; MR004 a stream without versions or with limits, or a bad name.
create or replace function millrace.add_tenant(p_stream text, p_tenant text) returns void
language plpgsql volatile
set client_min_messages = warning as $$
declare
    s millrace_engine.stream;
    step record;
begin
    perform millrace_engine.need_owner();
    if p_tenant is null or p_tenant !~ '^[a-z0-9]([a-z0-9_.-]{0,38}[a-z0-9])?$' or length(p_stream) + length(p_tenant) > 62 then
        raise exception 'tenant name % is not usable', coalesce(quote_literal(p_tenant), 'null') using errcode = 'MR004',
            hint = 'Use 1 to 40 lower case letters and digits, with dashes, underscores and dots between them, and with the name of the stream no more than 62.';
    end if;
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream) for no key update;
    if not s.versions then
        raise exception 'stream "%" has no versions', p_stream using errcode = 'MR004', hint = 'Tenants are for event stores. Declare versions, or make a stream for each tenant.';
    end if;
    s.has_tenants := true;
    perform millrace_engine.check_stream(s);
    insert into millrace_engine.tenant (stream_id, name, segment)
        select s.id, p_tenant, coalesce((select max(t.segment) + 1 from millrace_engine.tenant t where t.stream_id = s.id), 16)
        where not exists (select from millrace_engine.tenant t where t.stream_id = s.id and t.name = p_tenant);
    update millrace_engine.stream x set has_tenants = true where x.id = s.id and not x.has_tenants;
    for step in select r.statement from millrace_engine.stream_repairs(s.id) r loop
        execute step.statement;
    end loop;
end $$;
comment on function millrace.add_tenant(text, text) is 'Gives a tenant of an event store a table of its own.';

-- millrace.drop_tenant(stream, tenant) returns boolean
-- Removes a tenant that leaves: its table with all its messages, the versions of its entities, its messages among retries and dead letters, and its documents in projections
-- that name documents by the key. Projections with a document id are rebuilt without it: the rebuild begins here, and goes on by the controller or by millrace.rebuild_projection.
-- False when there was none. Groups go past what was there.
-- Locks:  access exclusive on the stream's table, until the end of the transaction: call it in one of its own.
-- Raises: 42501 need_owner; MR002 no such stream; 55P03 when a transaction keeps the table locked for ten seconds: call it again.
create or replace function millrace.drop_tenant(p_stream text, p_tenant text) returns boolean
language plpgsql volatile
set lock_timeout = '10s' as $$
declare
    s millrace_engine.stream;
    p millrace_engine.projection;
    low constant text := p_tenant || '/';
    high constant text := p_tenant || '0';   -- the character after /
begin
    perform millrace_engine.need_owner();
    perform pg_advisory_xact_lock(1836019570, 1);
    select * into s from millrace_engine.stream x where x.id = millrace_engine.stream_id(p_stream) for no key update;
    delete from millrace_engine.tenant t where t.stream_id = s.id and t.name = p_tenant;
    if not found then
        return false;
    end if;
    -- The whole table first: appends that have got it are waited for, and later ones find no tenant.
    execute format('lock table millrace.%I in access exclusive mode', s.name);
    execute format('drop table millrace.%I', s.name || '.' || p_tenant);
    delete from millrace_engine.entity e where e.stream_id = s.id and e.key >= low and e.key < high;
    delete from millrace_engine.delivery d using millrace_engine.consumer_group g where g.stream_id = s.id and d.group_id = g.id and starts_with(d.key, low);
    delete from millrace_engine.dead_letter d using millrace_engine.consumer_group g where g.stream_id = s.id and d.group_id = g.id and starts_with(d.key, low);
    for p in select * from millrace_engine.projection x where x.stream_id = s.id and x.documents is not null order by x.id for no key update loop
        if p.document_id is null then
            execute format('delete from %s where starts_with(key, $1)', p.documents) using low;
        end if;
        if p.rebuilt_position is not null then
            delete from millrace_engine.building b where b.projection_id = p.id;
            update millrace_engine.projection x set rebuilt_position = 0 where x.id = p.id;
        elsif p.document_id is not null then
            perform millrace_engine.begin_rebuild(p, p);
        end if;
    end loop;
    return true;
end $$;
comment on function millrace.drop_tenant(text, text) is 'Removes a tenant of an event store with everything that belongs to it.';

-- millrace.tenants(stream) returns a row per tenant
-- Raises: MR002 no such stream.
create or replace function millrace.tenants(p_stream text) returns table (tenant text, entities bigint, bytes bigint)
language plpgsql stable as $$
declare
    stream constant integer := millrace_engine.stream_id(p_stream);
begin
    return query select t.name,
            (select count(*) from millrace_engine.entity e where e.stream_id = stream and e.key >= t.name || '/' and e.key < t.name || '0'),
            pg_total_relation_size(to_regclass(format('millrace.%I', p_stream || '.' || t.name)))
        from millrace_engine.tenant t where t.stream_id = stream order by t.name;
end $$;
comment on function millrace.tenants(text) is 'The tenants of an event store, with how many entities and bytes they have.';

-- millrace_engine.tenant_of(stream, key) returns text
-- The tenant in whose table a key's messages are; null when it has none.
-- Raises: MR004 it names one that has not been added.
create or replace function millrace_engine.tenant_of(s millrace_engine.stream, p_key text) returns text
language plpgsql stable as $$
declare
    result constant text := case when position('/' in p_key) > 0 then split_part(p_key, '/', 1) end;
begin
    if result is not null and not exists (select from millrace_engine.tenant t where t.stream_id = s.id and t.name = result) then
        raise exception 'stream "%" has no tenant "%"', s.name, result using errcode = 'MR004',
            hint = 'Add it (spec.tenants of the Stream, or millrace.add_tenant), or use a key without /.';
    end if;
    return result;
end $$;
