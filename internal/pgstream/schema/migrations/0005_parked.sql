-- 0005_parked.sql
-- What:  parked messages of Ordered groups: a mark on deliveries, the keys that have some, and whether a group ever had one.
-- Why:   a message that failed waits with the later ones of its key, and only with them (failure policy Park; redrive into an Ordered group).
-- Locks: access exclusive on millrace_engine.delivery and millrace_engine.consumer_group, for a moment.
-- Cost:  a few milliseconds; the defaults are constants, so no row is written. The index is built over what is in the delivery table.
-- Skew:  the previous release knows no failure policy Park. In an Ordered group it never looks at deliveries, so what is parked waits for this one.

alter table millrace_engine.consumer_group
    add column parks boolean not null default false;   -- Ordered: some message of it was parked, so receive must look for them

alter table millrace_engine.delivery
    add column parked     boolean not null default false,  -- Ordered: handed out in order of position among those of its key
    add column not_before timestamptz;                     -- of a throttled redrive: when it is due, should its turn come earlier
create index delivery_parked_idx on millrace_engine.delivery (group_id, key, "position") where parked;
create index delivery_parked_held_idx on millrace_engine.delivery (group_id, key) where parked and nonce is not null;

-- A key is here while messages of it are parked; those that receive reaches in the log go behind them (park.sql).
create table millrace_engine.parked_key (
    group_id integer not null references millrace_engine.consumer_group (id) on delete cascade,
    slot     smallint not null,
    key      text not null,
    constraint parked_key_pkey primary key (group_id, slot, key)
) with (fillfactor = 70);

-- Whoever removes a parked message, for whatever reason, makes the next of its key due. The body is in park.sql.
create function millrace_engine.unpark() returns trigger language plpgsql as 'begin return null; end';
create trigger unpark after delete on millrace_engine.delivery referencing old table as gone
    for each statement execute function millrace_engine.unpark();
