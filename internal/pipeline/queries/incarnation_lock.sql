-- incarnation_lock.sql: what is remembered of a stream, which nobody else changes until the transaction ends. TABLE stands
-- for the qualified name. $1 processor, $2 stream, $3 the incarnation of a stream that nobody remembers yet.
insert into TABLE as t (processor, stream, incarnation, top_id, added)
values ($1, $2, $3, '0-0', -1)
on conflict on constraint millrace_redis_stream_pkey do update set incarnation = t.incarnation
returning incarnation, top_id, added,
          case when mark_incarnation = incarnation then mark_id else '' end,
          case when mark_incarnation = incarnation then mark_digest else 0 end
