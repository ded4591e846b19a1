-- ledger_put.sql: notes entries and returns the places, counted from 1, of those that were not there. TABLE stands for the qualified name.
-- They come sorted, so that concurrent batches with the same entries wait for each other and never deadlock.
-- $1 processor, $2 target, then streams, times, ids and digests.
with given as materialized (
    select * from unnest($3::text[], $4::timestamptz[], $5::text[], $6::bigint[]) with ordinality as g(stream, entry_at, entry_id, digest, n)
), noted as (
    insert into TABLE (processor, target, stream, entry_at, entry_id, digest)
    select $1, $2, stream, entry_at, entry_id, digest from given order by n
    on conflict on constraint millrace_ledger_pkey do nothing
    returning stream, entry_id, digest
)
select min(g.n) from noted join given g using (stream, entry_id, digest) group by stream, entry_id, digest
