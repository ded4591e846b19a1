-- What several functions ask of the values that they are given. PostgreSQL inlines all but the last, so that asking costs no call.

-- millrace_engine.longest_key() returns integer
-- How many bytes a text may have that is put into an index: a row of one has room for 2,700, other columns and headers included.
create or replace function millrace_engine.longest_key() returns integer
language sql immutable parallel safe
return 2048;
comment on function millrace_engine.longest_key() is 'The most bytes of a text that is put into an index.';

-- millrace_engine.is_duration(seconds) returns boolean
-- Whether that is a time to wait: 0 seconds or more, up to a hundred years. Null for null. (NaN is above everything.)
create or replace function millrace_engine.is_duration(p_seconds double precision) returns boolean
language sql immutable parallel safe
return p_seconds between 0 and 3155760000;
comment on function millrace_engine.is_duration(double precision) is 'Whether so many seconds can be waited.';

-- millrace_engine.milliseconds(seconds) returns bigint
-- What no bigint can hold becomes more than any time that is_duration takes.
create or replace function millrace_engine.milliseconds(p_seconds double precision) returns bigint
language sql immutable parallel safe
return case when p_seconds not between -1e15 and 1e15 then 1e18 else p_seconds * 1000 end::bigint;
comment on function millrace_engine.milliseconds(double precision) is 'Seconds in milliseconds, rounded.';

-- millrace_engine.table_name(name, example) returns text
-- The name of a table as it was written, with quotes where they are needed, so that it can stand in a statement.
-- Raises: MR004 it is none.
create or replace function millrace_engine.table_name(p_name text, p_example text) returns text
language plpgsql immutable as $$
begin
    return array_to_string(array(select quote_ident(x) from unnest(parse_ident(p_name)) with ordinality y(x, n) order by n), '.');
exception when invalid_parameter_value then
    raise exception '% is not the name of a table', quote_literal(p_name) using errcode = 'MR004',
        hint = format('Write it as in SQL, with its schema: %s.', p_example);
end $$;
comment on function millrace_engine.table_name(text, text) is 'The name of a table, quoted for a statement.';
