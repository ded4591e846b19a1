-- millrace_engine.slot(key, position) returns bigint
-- The hash slot of a message, 0 to 1023: a stable property of its key, so that all messages of a key are in one lane of an Ordered group. A message
-- without a key has no order to keep and is spread by its position. It is computed by the readers that need it and not stored, because a stored generated
-- column costs every publisher a tenth of its time. PostgreSQL keeps this hash unchanged over major versions: hash partitions are stored by it.
create or replace function millrace_engine.slot(p_key text, p_position bigint) returns bigint
language sql immutable parallel safe
return coalesce(hashtextextended(p_key, 0), p_position) & 1023;
comment on function millrace_engine.slot(text, bigint) is 'Hash slot of a message, 0 to 1023: all messages of a key share one.';
