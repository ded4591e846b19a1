-- millrace.read_memory(memory, subject) returns (state, version, parent, root, metadata, completed_at, locked_until, lock_holder)
-- What is known of a workflow. One row, always: of a workflow that nobody has written, version is 0 and state null. Pass the version to write_memory as the expected one.
-- locked_until and lock_holder are of a lock that has not expired.
-- It sees what this transaction has written, in this statement too.
-- Raises: MR002 no such memory; MR004 no subject, or the memory's table was altered.
create or replace function millrace.read_memory(p_memory text, p_subject text, out state jsonb, out version bigint, out parent text, out root text, out metadata jsonb,
    out completed_at timestamptz, out locked_until timestamptz, out lock_holder text)
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
begin
    perform millrace_engine.check_subject(p_subject);
    execute 'select * from millrace_engine.read_memory_' || m.id || '($1)'
        into state, version, parent, root, metadata, completed_at, locked_until, lock_holder using p_subject;
end $$;
comment on function millrace.read_memory(text, text) is 'The state of a workflow and its version; version 0 when there is none.';

create or replace function millrace_engine.read_memory_pattern(p_subject text, out state jsonb, out version bigint, out parent text, out root text, out metadata jsonb,
    out completed_at timestamptz, out locked_until timestamptz, out lock_holder text)
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
begin
    select m.state, m.version, m.parent, m.root, m.metadata, m.completed_at, case when m.locked_until > now_ then m.locked_until end,
            case when m.locked_until > now_ then m.lock_holder end
        into state, version, parent, root, metadata, completed_at, locked_until, lock_holder
        from millrace.memory_pattern m where m.subject = p_subject;
    version := coalesce(version, 0);
end $$;

-- millrace.write_memory(memory, subject, state, expected_version, parent, metadata, completed, token, unlock) returns bigint
-- Writes the state of a workflow inside the caller's transaction, and returns its new version: 1 for the first. With an ack, a publish or an append in the same transaction
-- all of it happens, or nothing.
--   expected_version  the version that the state was decided upon; 0: the workflow must be new; -1: it must exist; null: not looked at.
--   parent            the workflow that started this one, with the first write; it has to exist, and never changes.
--   metadata          replaces the metadata; null leaves them.
--   completed         true: the workflow has ended, and maintenance may remove it (create_memory); false: it has not, after all; null leaves that.
--   token             of lock_memory: the write is refused when the lock has moved to somebody else, whatever the version. Without a token, the subject must not be locked.
--   unlock            gives the lock up with this write.
-- Locks:  the workflow's row to the end of the transaction; with the first write of a child its root's, against removal only. Who waits holds no reader of a stream back, unless
--         the transaction has published before. Transactions that write several workflows should do it in the order of the subjects.
-- Cost:   one update in place (HOT), or one insert; completing touches two indexes.
-- Raises: MR011 the version is another, with the present one as the error's detail; MR012 the lock has ended; MR013 somebody else has locked the subject, with the time until
--         which as the detail; MR002 no such memory; MR004 a bad argument, no such parent, or the memory's table was altered; 40001 in REPEATABLE READ and SERIALIZABLE when
--         the workflow has changed since the snapshot.
create or replace function millrace.write_memory(p_memory text, p_subject text, p_state jsonb, p_expected_version bigint default null, p_parent text default null,
    p_metadata jsonb default null, p_completed boolean default null, p_token bigint default null, p_unlock boolean default false) returns bigint
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
    result bigint;
begin
    perform millrace_engine.check_subject(p_subject);
    if p_state is null then
        raise exception 'a state cannot be null' using errcode = 'MR004', hint = 'Write a JSON value, ''null''::jsonb if need be, or remove the workflow with millrace.delete_memory.';
    end if;
    if p_expected_version < -1 then
        raise exception 'version % cannot be expected', p_expected_version using errcode = 'MR004',
            hint = 'Pass the version that was read, 0 when the workflow must be new, -1 when it must exist, null for any.';
    end if;
    if p_parent = p_subject then
        raise exception 'a workflow cannot be its own parent' using errcode = 'MR004', hint = 'Leave the parent of a root out.';
    end if;
    if p_unlock and p_token is null then
        raise exception 'giving up a lock needs its token' using errcode = 'MR004', hint = 'Pass the token that lock_memory has returned.';
    end if;
    execute 'select millrace_engine.write_memory_' || m.id || '($1, $2, $3, $4, $5, $6, $7, $8, $9)' into result
        using m.name, p_subject, p_state, p_expected_version, p_parent, p_metadata, p_completed, p_token, coalesce(p_unlock, false);
    return result;
end $$;
comment on function millrace.write_memory(text, text, jsonb, bigint, text, jsonb, boolean, bigint, boolean) is
    'Writes the state of a workflow, if it has the expected version and nobody else has locked it; returns the new version.';

create or replace function millrace_engine.write_memory_pattern(p_memory text, p_subject text, p_state jsonb, p_expected bigint, p_parent text, p_metadata jsonb,
    p_completed boolean, p_token bigint, p_unlock boolean) returns bigint
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
    root_ text := p_subject;
    result bigint;
    m record;
    present bigint;
begin
    loop
        -- A row of version 0 was only locked until now. It becomes a root here, and a child below.
        update millrace.memory_pattern x set state = p_state, version = x.version + 1, root = coalesce(x.root, x.subject), metadata = coalesce(p_metadata, x.metadata),
                completed_at = case p_completed when true then coalesce(x.completed_at, now_) when false then null else x.completed_at end,
                lock_token = case when not p_unlock then x.lock_token end, lock_holder = case when not p_unlock then x.lock_holder end,
                locked_until = case when not p_unlock then x.locked_until end, updated_at = now_
            where x.subject = p_subject and (p_parent is null or x.parent = p_parent)
                and (p_expected is null or x.version = p_expected or p_expected = -1 and x.version > 0)
                and case when p_token is null then coalesce(x.locked_until <= now_, true) else x.lock_token = p_token end
            returning x.version into result;
        if found then
            return result;
        end if;
        if coalesce(p_expected, 0) = 0 then
            if p_parent is not null then
                -- The root cannot be removed, and with it the parent, before the child is there.
                select x.root into root_ from millrace.memory_pattern x where x.subject = p_parent and x.version > 0;
                perform from millrace.memory_pattern x where x.subject = root_ for key share;
                if not exists (select from millrace.memory_pattern x where x.subject = p_parent and x.version > 0) then
                    raise exception 'the parent "%" of "%" is not in memory "%"', p_parent, p_subject, p_memory using errcode = 'MR004',
                        hint = 'Write the parent first. One that was completed and removed can have no more children.';
                end if;
                update millrace.memory_pattern x set state = p_state, version = 1, parent = p_parent, root = root_, metadata = p_metadata,
                        completed_at = case when p_completed then now_ end,
                        lock_token = case when not p_unlock then x.lock_token end, lock_holder = case when not p_unlock then x.lock_holder end,
                        locked_until = case when not p_unlock then x.locked_until end, updated_at = now_
                    where x.subject = p_subject and x.version = 0
                        and case when p_token is null then coalesce(x.locked_until <= now_, true) else x.lock_token = p_token end;
                if found then
                    return 1;
                end if;
            end if;
            if p_token is null then
                insert into millrace.memory_pattern as x (subject, state, version, parent, root, metadata, completed_at, created_at, updated_at)
                    values (p_subject, p_state, 1, p_parent, root_, p_metadata, case when p_completed then now_ end, now_, now_)
                    on conflict (subject) do nothing;
                if found then
                    return 1;
                end if;
            end if;
        end if;
        -- Why not? A statement of its own sees what the ones above have met.
        select x.version, x.parent, x.lock_token, x.locked_until into m from millrace.memory_pattern x where x.subject = p_subject;
        present := coalesce(m.version, 0);
        if p_token is not null and m.lock_token is distinct from p_token then
            perform millrace_engine.refuse_token(p_memory, p_subject);
        end if;
        if p_token is null and m.locked_until > now_ then
            raise exception 'subject "%" of memory "%" is locked by somebody else', p_subject, p_memory using errcode = 'MR013', detail = m.locked_until::text,
                hint = 'Try again when the lock has ended, or lock the subject and pass the token.';
        end if;
        if p_expected <> present and not (p_expected = -1 and present > 0) then
            raise exception 'subject "%" of memory "%" has %, not %', p_subject, p_memory,
                case present when 0 then 'no state' else 'version ' || present end,
                case p_expected when 0 then 'none' when -1 then 'any' else 'version ' || p_expected end
                using errcode = 'MR011', detail = present::text, hint = 'Somebody else may have written. Read it again and decide anew.';
        end if;
        if present > 0 and p_parent is distinct from m.parent and p_parent is not null then
            raise exception 'the parent of "%" is %, and not %', p_subject, coalesce(quote_literal(m.parent), 'nobody'), quote_literal(p_parent)
                using errcode = 'MR004', hint = 'Leave the parent out after the first write; it never changes.';
        end if;
        -- It has changed between the two statements.
    end loop;
end $$;

-- millrace_engine.refuse_token(memory, subject) returns void
-- Raises: MR012.
create or replace function millrace_engine.refuse_token(p_memory text, p_subject text) returns void
language plpgsql immutable as $$
begin
    raise exception 'the lock on subject "%" of memory "%" has ended: it was given up, or expired and somebody else has locked it', p_subject, p_memory
        using errcode = 'MR012', hint = 'Roll back. Lock again, read, and decide anew.';
end $$;
