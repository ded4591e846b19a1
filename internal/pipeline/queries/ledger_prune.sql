-- ledger_prune.sql: forgets entries that cannot come again, at most $5 at a time. TABLE stands for the qualified name.
-- $1 processor, $2 target, $3 stream, $4 a time at which every entry before it was acknowledged if it had been delivered. What was written just now may have been
-- delivered after that was asked, so it stays for a while.
delete from TABLE
 where ctid = any (array (
    select ctid from TABLE
     where processor = $1 and target = $2 and stream = $3 and entry_at < $4 and written_at < now() - interval '10 minutes'
     limit $5))
