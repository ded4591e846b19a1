-- dead_letter_branch.sql: gives the table of an earlier release the column branch. TABLE stands for the qualified name.
-- Processors of that release go on writing: the constraint keeps its name.
alter table TABLE
    add column if not exists branch text not null default '',
    drop constraint millrace_dead_letter_entry,
    add constraint millrace_dead_letter_entry unique (processor, stream, entry_id, digest, branch)
