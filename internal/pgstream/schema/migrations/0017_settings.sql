-- 0017_settings.sql
-- What:  the end of the signatures of create_stream and create_group that have got more parameters.
-- Why:   whatever a resource can declare is a parameter of its own; a second function of the same name would make calls ambiguous.
-- Locks: none but of the functions.
-- Cost:  none.
-- Skew:  the previous release's calls fit the new signatures.

drop function if exists millrace.create_stream(text, integer, text, integer, integer, bigint, bigint, bigint, bigint, text, boolean, jsonb);
drop function if exists millrace.create_group(text, text, text, text, jsonb, text, integer, double precision, bigint, timestamptz, text);
