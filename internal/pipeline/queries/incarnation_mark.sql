-- incarnation_mark.sql: adds to a table of an earlier release the entry by which a stream is known again. Processors of that
-- release, which do not write it, may run beside. TABLE stands for the qualified name.
alter table TABLE
    add column if not exists mark_incarnation integer,
    add column if not exists mark_id text,
    add column if not exists mark_digest bigint
