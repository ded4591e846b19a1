-- incarnation_remember.sql: remembers how far a stream was read, if that is further than what is remembered and it is still
-- the same stream, and returns which incarnation is remembered. TABLE stands for the qualified name.
-- $1 processor, $2 stream, $3 incarnation, $4 greatest id that was read, $5 entries ever added, $6 digest of the entry $4.
with further as (
    update TABLE
       set top_id = $4, added = greatest(added, $5::bigint), mark_incarnation = $3, mark_id = $4, mark_digest = $6
     where processor = $1 and stream = $2 and incarnation = $3
       and (split_part(top_id, '-', 1)::numeric, split_part(top_id, '-', 2)::numeric)
         < (split_part($4, '-', 1)::numeric, split_part($4, '-', 2)::numeric)
)
select incarnation from TABLE where processor = $1 and stream = $2
