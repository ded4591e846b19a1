-- millrace_engine.clock() returns timestamptz
-- The engine's only source of time for leases and due messages. Tests replace it in their own database to make time jump.
create or replace function millrace_engine.clock() returns timestamptz
language sql volatile parallel safe
return clock_timestamp();
comment on function millrace_engine.clock() is 'Time of leases and due messages: the database''s wall clock.';
