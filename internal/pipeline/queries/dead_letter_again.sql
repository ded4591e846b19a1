-- dead_letter_again.sql: notes that dead letters have failed again. TABLE stands for the qualified name.
-- $1 processor, $2 ids, $3 reasons.
update TABLE d
   set deliveries = d.deliveries + 1, reason = f.reason, failed_at = clock_timestamp()
  from unnest($2::bigint[], $3::text[]) as f(id, reason)
 where d.processor = $1
   and d.id = f.id
