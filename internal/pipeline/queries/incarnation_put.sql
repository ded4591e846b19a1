-- incarnation_put.sql: remembers how far a stream reaches. TABLE stands for the qualified name.
-- $1 processor, $2 stream, $3 incarnation, $4 greatest id, $5 entries ever added, $6 and $7 id and digest of the mark.
update TABLE
   set incarnation = $3, top_id = $4, added = $5,
       mark_incarnation = $3, mark_id = $6, mark_digest = $7,
       changed_at = case when incarnation = $3 then changed_at else now() end
 where processor = $1 and stream = $2
