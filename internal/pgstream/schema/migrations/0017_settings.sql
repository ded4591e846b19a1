-- 0017_settings.sql
-- What:  the end of the signatures of create_stream and create_group that have got more parameters, and of two columns that nothing reads.
-- Why:   whatever a resource can declare is a parameter of its own; a second function of the same name would make calls ambiguous. What fences the holder of
--        a lane is the nonce of its claim, and a stream that was made anew has another id.
-- Locks: access exclusive on millrace_engine.stream and millrace_engine.lane, for a moment.
-- Cost:  none: dropping a column rewrites nothing.
-- Skew:  the previous release's calls fit the new signatures, and its clients read neither column.

drop function if exists millrace.create_stream(text, integer, text, integer, integer, bigint, bigint, bigint, bigint, text, boolean, jsonb);
drop function if exists millrace.create_group(text, text, text, text, jsonb, text, integer, double precision, bigint, timestamptz, text);

alter table millrace_engine.lane drop column epoch;
alter table millrace_engine.stream drop column incarnation;
