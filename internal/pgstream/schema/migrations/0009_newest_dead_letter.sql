-- 0009_newest_dead_letter.sql
-- What:  an index of each group's dead letters in the order in which they were set aside.
-- Why:   the manager shows the newest error of every group (functions/group_report.sql), and looked through all dead letters of the database for it.
-- Locks: share on the dead letters while the index is built: setting a message aside waits.
-- Cost:  a second per million dead letters.
-- Skew:  none.

create index dead_letter_newest_idx on millrace_engine.dead_letter (group_id, id);
