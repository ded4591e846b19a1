-- dead_letter_take.sql: removes dead letters of a processor and returns those that were there. TABLE stands for the qualified name.
-- They are locked in the order of their ids, so that two that take the same wait for each other and never deadlock.
-- $1 processor, $2 ids.
delete from TABLE d
 where d.id in (select l.id from TABLE l where l.processor = $1 and l.id = any ($2::bigint[]) order by l.id for update)
returning d.id
