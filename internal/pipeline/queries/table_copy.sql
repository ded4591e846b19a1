-- table_copy.sql: whether COPY does with a table what INSERT does: not with row security, which it refuses, nor with rules, which it ignores,
-- nor with views and foreign tables.
-- $1 schema, $2 table.
select c.relkind in ('r', 'p') and not c.relhasrules and not row_security_active(c.oid)
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where n.nspname = $1
   and c.relname = $2
   and c.relkind in ('r', 'p', 'v', 'f')
