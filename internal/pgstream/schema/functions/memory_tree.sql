-- millrace.memory_children(memory, subject) returns workflows
-- The workflows that have the subject as their parent, in the order in which they began.
-- Cost:   one index scan.
-- Raises: MR002 no such memory; MR004 no subject, or the memory's table was altered.
create or replace function millrace.memory_children(p_memory text, p_subject text)
returns table (subject text, parent text, version bigint, state jsonb, metadata jsonb, completed_at timestamptz, created_at timestamptz, updated_at timestamptz)
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
begin
    perform millrace_engine.check_subject(p_subject);
    return query execute 'select * from millrace_engine.children_memory_' || m.id || '($1)' using p_subject;
end $$;
comment on function millrace.memory_children(text, text) is 'The workflows that a workflow has started.';

create or replace function millrace_engine.children_memory_pattern(p_subject text)
returns table (subject text, parent text, version bigint, state jsonb, metadata jsonb, completed_at timestamptz, created_at timestamptz, updated_at timestamptz)
language plpgsql stable as $$
begin
    return query select x.subject::text, x.parent::text, x.version, x.state, x.metadata, x.completed_at, x.created_at, x.updated_at
        from millrace.memory_pattern x where x.parent = p_subject order by x.created_at, x.subject;
end $$;

-- millrace.memory_descendants(memory, subject) returns workflows
-- All workflows below the subject, in the order in which they began.
-- Cost:   below a root one index scan, because each row knows its root; below another an index probe for each workflow that is found.
-- Raises: as memory_children.
create or replace function millrace.memory_descendants(p_memory text, p_subject text)
returns table (subject text, parent text, version bigint, state jsonb, metadata jsonb, completed_at timestamptz, created_at timestamptz, updated_at timestamptz)
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
begin
    perform millrace_engine.check_subject(p_subject);
    return query execute 'select * from millrace_engine.descendants_memory_' || m.id || '($1)' using p_subject;
end $$;
comment on function millrace.memory_descendants(text, text) is 'All workflows below a workflow.';

create or replace function millrace_engine.descendants_memory_pattern(p_subject text)
returns table (subject text, parent text, version bigint, state jsonb, metadata jsonb, completed_at timestamptz, created_at timestamptz, updated_at timestamptz)
language plpgsql stable as $$
begin
    if exists (select from millrace.memory_pattern x where x.subject = p_subject and x.root = p_subject) then
        return query select x.subject::text, x.parent::text, x.version, x.state, x.metadata, x.completed_at, x.created_at, x.updated_at
            from millrace.memory_pattern x where x.root = p_subject and x.subject <> p_subject order by x.created_at, x.subject;
        return;
    end if;
    return query
        with recursive below as (
            select x.* from millrace.memory_pattern x where x.parent = p_subject
            union all
            select x.* from below b join millrace.memory_pattern x on x.parent = b.subject)
        select x.subject::text, x.parent::text, x.version, x.state, x.metadata, x.completed_at, x.created_at, x.updated_at
            from below x order by x.created_at, x.subject;
end $$;

-- millrace.delete_memory(memory, subject, expected_version, token) returns bigint
-- Removes a workflow with all below it, and returns how many that were; 0 when there was none.
-- Locks:  the root of the tree, against new children; what is removed. Waits for transactions that are writing them.
-- Raises: MR011 the version is another; MR012 the lock has ended; MR013 somebody else has locked one of them; MR002 no such memory; MR004 a bad argument, or the memory's table
--         was altered.
create or replace function millrace.delete_memory(p_memory text, p_subject text, p_expected_version bigint default null, p_token bigint default null) returns bigint
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
    result bigint;
begin
    perform millrace_engine.check_subject(p_subject);
    execute 'select millrace_engine.delete_memory_' || m.id || '($1, $2, $3, $4)' into result using m.name, p_subject, p_expected_version, p_token;
    return result;
end $$;
comment on function millrace.delete_memory(text, text, bigint, bigint) is 'Removes a workflow and all below it.';

create or replace function millrace_engine.delete_memory_pattern(p_memory text, p_subject text, p_expected bigint, p_token bigint) returns bigint
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    m record;
    doomed text[];
    result bigint;
begin
    perform from millrace.memory_pattern x where x.subject = (select y.root from millrace.memory_pattern y where y.subject = p_subject) for update;
    select x.version, x.lock_token into m from millrace.memory_pattern x where x.subject = p_subject for update;
    if p_token is not null and m.lock_token is distinct from p_token then
        perform millrace_engine.refuse_token(p_memory, p_subject);
    end if;
    if p_expected <> coalesce(m.version, 0) then
        raise exception 'subject "%" of memory "%" has version %, not %', p_subject, p_memory, coalesce(m.version, 0), p_expected
            using errcode = 'MR011', detail = coalesce(m.version, 0)::text, hint = 'Somebody else may have written. Read it again and decide anew.';
    end if;
    doomed := array[p_subject] || array(select d.subject from millrace_engine.descendants_memory_pattern(p_subject) d);
    for m in select x.subject, x.lock_token, x.locked_until from millrace.memory_pattern x where x.subject = any (doomed) order by x.subject for update loop
        if m.locked_until > now_ and m.lock_token is distinct from p_token then
            raise exception 'subject "%" of memory "%" is locked by somebody else', m.subject, p_memory using errcode = 'MR013', detail = m.locked_until::text,
                hint = 'Try again when the lock has ended, or pass its token.';
        end if;
    end loop;
    delete from millrace.memory_pattern x where x.subject = any (doomed);
    get diagnostics result = row_count;
    return result;
end $$;

-- millrace_engine.clean_memory(memory id, max) returns bigint
-- Removes workflows that were completed longer ago than the memory keeps them, and returns how many rows that were. A tree goes as a whole, when all of it is completed and was for
-- so long, and nobody has locked any of it; what is being written is left for the next round. A call ends with the tree that reaches max. Expired locks of subjects that never
-- got a state go too, after an hour.
-- Locks:  the rows that it removes, by try.
create or replace function millrace_engine.clean_memory(p_memory integer, p_max integer) returns bigint
language plpgsql volatile as $$
declare
    m millrace_engine.memory;
    result bigint := 0;
begin
    select * into m from millrace_engine.memory x where x.id = p_memory;
    if found then
        m := millrace_engine.memory(m.name);
        execute 'select millrace_engine.clean_memory_' || m.id || '($1, $2)' into result using m.keep_completed_seconds, p_max;
    end if;
    return result;
end $$;
comment on function millrace_engine.clean_memory(integer, integer) is 'Removes completed workflows by the policy of their memory.';

create or replace function millrace_engine.clean_memory_pattern(p_keep_seconds bigint, p_max integer) returns bigint
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    before constant timestamptz := now_ - make_interval(secs => p_keep_seconds);
    tree record;
    mine text[];
    n bigint;
    result bigint := 0;
begin
    delete from millrace.memory_pattern x where x.subject in (
        select y.subject from millrace.memory_pattern y where y.root is null and coalesce(y.locked_until, y.created_at) < now_ - interval '1 hour'
        limit p_max for update skip locked);
    get diagnostics result = row_count;
    if p_keep_seconds = 0 then
        return result;
    end if;
    for tree in select x.subject from millrace.memory_pattern x where x.subject = x.root and x.completed_at < before
            and not exists (select from millrace.memory_pattern y where y.root = x.subject and y.completed_at is null)
            and not exists (select from millrace.memory_pattern y where y.root = x.subject and y.completed_at >= before)
            order by x.completed_at limit p_max loop
        exit when result >= p_max;
        -- If somebody has one of its rows in hand, or has had, another time. Whoever makes a child has the root; one that was made since is counted by the second
        -- statement, which begins with the root in hand.
        mine := array(select x.subject from millrace.memory_pattern x where x.root = tree.subject and x.completed_at < before and coalesce(x.locked_until < now_, true)
            for update skip locked);
        select count(*) into n from millrace.memory_pattern x where x.root = tree.subject;
        continue when n <> cardinality(mine);
        delete from millrace.memory_pattern x where x.subject = any (mine);
        result := result + n;
    end loop;
    return result;
end $$;
