-- Locks of workflows: for work between two transactions, such as a call of a service, that must not be done twice at the same time. What fits into one transaction needs none: the
-- version is enough. A lock is a column of the workflow's row and not an advisory lock, so it belongs to no session, and works through a pooler.
--
-- millrace.lock_memory(memory, subject, ttl_seconds, holder) returns (token, expires_at, holder, state, version)
-- Locks a subject until now plus ttl_seconds by the database's clock, and returns the token, with the state and version, which nobody else changes meanwhile. The subject
-- need not have a state yet. Commit before the work: others see the lock from then on.
-- The token is what write_memory, extend_memory and unlock_memory know the owner by; no two locks have one. It is a fencing number as well: a later lock of a
-- subject has a greater one, so other systems can refuse what comes with a smaller.
-- When somebody has it already, token is null, and expires_at and holder are theirs: the answer is immediate, and trying again is the client's affair. It is that also while
-- a transaction is just writing the workflow; only the end of one that writes a subject's first state is waited for.
--   holder  who it is, for people.
-- A lock that has expired is anybody's. Until somebody takes it, its owner can still write, extend and unlock.
-- Commits synchronously, whatever the session says: a token that a crash of the server forgot could be given twice.
-- Raises: MR002 no such memory; MR004 a bad argument, or the memory's table was altered; 40001 in REPEATABLE READ and SERIALIZABLE.
create or replace function millrace.lock_memory(p_memory text, p_subject text, p_ttl_seconds double precision default 120, p_holder text default null,
    out token bigint, out expires_at timestamptz, out holder text, out state jsonb, out version bigint)
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
begin
    perform millrace_engine.check_subject(p_subject);
    perform millrace_engine.check_ttl(p_ttl_seconds);
    execute 'select * from millrace_engine.lock_memory_' || m.id || '($1, $2, $3)' into token, expires_at, holder, state, version
        using p_subject, p_ttl_seconds, p_holder;
    if token is not null and current_setting('synchronous_commit') = 'off' then
        perform set_config('synchronous_commit', 'on', true);
    end if;
end $$;
comment on function millrace.lock_memory(text, text, double precision, text) is
    'Locks a workflow for a time and returns the owner''s token, with state and version; token null when somebody else has it.';

create or replace function millrace_engine.lock_memory_pattern(p_subject text, p_seconds double precision, p_holder text,
    out token bigint, out expires_at timestamptz, out holder text, out state jsonb, out version bigint)
language plpgsql volatile as $$
declare
    now_ constant timestamptz := millrace_engine.clock();
begin
    loop
        select x.locked_until, x.lock_holder into expires_at, holder from millrace.memory_pattern x where x.subject = p_subject for no key update skip locked;
        if found then
            if expires_at > now_ then
                return;
            end if;
            -- The number is drawn with the row in hand, so a subject's numbers only grow.
            update millrace.memory_pattern x set lock_token = nextval('millrace_engine.memory_token'), lock_holder = p_holder,
                    locked_until = now_ + make_interval(secs => p_seconds)
                where x.subject = p_subject
                returning x.lock_token, x.locked_until, x.lock_holder, x.state, x.version into token, expires_at, holder, state, version;
            return;
        end if;
        -- Somebody has the row in hand; or there is none.
        select greatest(x.locked_until, now_), x.lock_holder into expires_at, holder from millrace.memory_pattern x where x.subject = p_subject;
        if found then
            return;
        end if;
        insert into millrace.memory_pattern (subject, created_at, updated_at) values (p_subject, now_, now_) on conflict (subject) do nothing;
    end loop;
end $$;

-- millrace_engine.check_ttl(seconds) returns void
-- Raises: MR004.
create or replace function millrace_engine.check_ttl(p_seconds double precision) returns void
language plpgsql immutable as $$
begin
    if p_seconds is null or p_seconds <= 0 or p_seconds > 86400 then
        raise exception 'cannot lock for % seconds', coalesce(p_seconds::text, 'null') using errcode = 'MR004',
            hint = 'Pass more than 0 and at most 86400 seconds, a day; who needs longer extends the lock while it works.';
    end if;
end $$;

-- millrace.extend_memory(memory, subject, token, ttl_seconds) returns timestamptz
-- Keeps the lock until now plus ttl_seconds, and returns that time.
-- Raises: MR012 the lock has ended; MR002 no such memory; MR004 a bad argument, or the memory's table was altered.
create or replace function millrace.extend_memory(p_memory text, p_subject text, p_token bigint, p_ttl_seconds double precision default 120) returns timestamptz
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
    ends timestamptz;
begin
    perform millrace_engine.check_subject(p_subject);
    perform millrace_engine.check_ttl(p_ttl_seconds);
    ends := millrace_engine.clock() + make_interval(secs => p_ttl_seconds);
    execute 'select millrace_engine.extend_memory_' || m.id || '($1, $2, $3)' into ends using p_subject, p_token, ends;
    if ends is null then
        perform millrace_engine.refuse_token(p_memory, p_subject);
    end if;
    return ends;
end $$;
comment on function millrace.extend_memory(text, text, bigint, double precision) is 'Prolongs the lock of a workflow to the given number of seconds from now.';

create or replace function millrace_engine.extend_memory_pattern(p_subject text, p_token bigint, p_until timestamptz) returns timestamptz
language plpgsql volatile as $$
declare
    result timestamptz;
begin
    update millrace.memory_pattern x set locked_until = p_until where x.subject = p_subject and x.lock_token = p_token returning x.locked_until into result;
    return result;
end $$;

-- millrace.unlock_memory(memory, subject, token) returns void
-- Gives a lock up before it expires: one's own, and nobody else's.
-- Raises: MR012 the lock has ended; MR002 no such memory; MR004 a bad argument, or the memory's table was altered.
create or replace function millrace.unlock_memory(p_memory text, p_subject text, p_token bigint) returns void
language plpgsql volatile as $$
declare
    m millrace_engine.memory := millrace_engine.memory(p_memory);
    done boolean;
begin
    perform millrace_engine.check_subject(p_subject);
    execute 'select millrace_engine.unlock_memory_' || m.id || '($1, $2)' into done using p_subject, p_token;
    if not done then
        perform millrace_engine.refuse_token(p_memory, p_subject);
    end if;
end $$;
comment on function millrace.unlock_memory(text, text, bigint) is 'Gives up the lock of a workflow; only its owner can, who has the token.';

create or replace function millrace_engine.unlock_memory_pattern(p_subject text, p_token bigint) returns boolean
language plpgsql volatile as $$
begin
    update millrace.memory_pattern x set lock_token = null, lock_holder = null, locked_until = null where x.subject = p_subject and x.lock_token = p_token and x.version > 0;
    if not found then
        -- What was only locked leaves nothing behind. Its number is not given again, so nothing can be mistaken for it.
        delete from millrace.memory_pattern x where x.subject = p_subject and x.lock_token = p_token and x.version = 0;
    end if;
    return found;
end $$;
