-- table_columns.sql: the columns of one table or view, with what an INSERT has to know about them.
-- -1 instead of null keeps format_type from writing bpchar as character, which would mean a length of one.
-- $1 schema, $2 table. No row: there is no such table, or it is invisible.
select a.attname                                             as name,
       case t.oid when 'timestamptz'::regtype   then 'timestamptz'
                  when 'timestamptz[]'::regtype then 'timestamptz[]'
                  else format_type(a.atttypid, -1) end       as type,
       a.attgenerated <> '' or a.attidentity = 'a'           as generated,
       a.attnotnull and not a.atthasdef and a.attidentity = '' as must_fill,
       has_column_privilege(c.oid, a.attnum, 'INSERT')       as may_insert
  from pg_catalog.pg_attribute a
  join pg_catalog.pg_class c on c.oid = a.attrelid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_type t on t.oid = a.atttypid
 where n.nspname = $1
   and c.relname = $2
   and c.relkind in ('r', 'p', 'v', 'f')
   and a.attnum > 0
   and not a.attisdropped
 order by a.attnum
