-- millrace_engine.need_owner() returns void
-- For whatever changes streams, groups and their like: says in words that the role may not, before PostgreSQL says it of a table that nobody has heard of.
-- Raises: 42501 when the caller may not change the engine's tables, as the runtime role.
create or replace function millrace_engine.need_owner() returns void
language plpgsql stable as $$
begin
    if not has_table_privilege('millrace_engine.stream', 'update') then
        raise exception 'role "%" may publish and consume, but not create, change or remove streams, groups and what belongs to them', current_user
            using errcode = '42501',
            hint = format('Do it as the role that owns Millrace''s schemas, %s: in a migration of your application, for example, or with Kubernetes resources.',
                (select n.nspowner::regrole from pg_namespace n where n.nspname = 'millrace_engine'));
    end if;
end $$;
comment on function millrace_engine.need_owner() is 'Raises when the caller may not change streams and groups.';
