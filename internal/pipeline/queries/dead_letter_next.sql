-- dead_letter_next.sql: the next dead letters of a processor that have not failed again since $4. TABLE stands for the qualified name.
-- $1 processor, $2 after this id, $3 up to this id, $4 time, $5 stream or null, $6 branches, $7 part of the reason or null, $8 limit.
select d.id, d.stream, d.entry_id, d.deliveries, d.entry, d.branch
  from TABLE d
 where d.processor = $1
   and d.id > $2
   and d.id <= $3
   and d.failed_at <= $4
   and ($5::text is null or d.stream = $5)
   and d.branch = any ($6::text[])
   and ($7::text is null or strpos(d.reason, $7) > 0)
 order by d.id
 limit $8
