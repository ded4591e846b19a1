-- dead_letter_put.sql: sets items aside. TABLE stands for the qualified name. Repeating it changes nothing.
insert into TABLE (processor, stream, entry_id, digest, deliveries, reason, entry, branch)
select $1, d.stream, d.entry_id, d.digest, d.deliveries, d.reason, d.entry, d.branch
  from unnest($2::text[], $3::text[], $4::bytea[], $5::integer[], $6::text[], $7::jsonb[], $8::text[])
    as d(stream, entry_id, digest, deliveries, reason, entry, branch)
 order by d.stream, d.entry_id, d.digest, d.branch
on conflict on constraint millrace_dead_letter_entry do nothing
