-- The tables that FlowFabric's PostgreSQL backend keeps streams in, as its migrations have them: 256 partitions (bench.partitions; a test has fewer), two indexes on frames, a
-- notification for every frame.
create table ff_stream_frame (
    partition_key smallint not null,
    execution_id  uuid     not null,
    attempt_index integer  not null,
    ts_ms         bigint   not null,
    seq           integer  not null,
    fields        jsonb    not null,
    mode          text     not null,
    created_at_ms bigint   not null,
    primary key (partition_key, execution_id, attempt_index, ts_ms, seq)
) partition by hash (partition_key);
create index ff_stream_frame_ts_seq_idx on ff_stream_frame (partition_key, execution_id, attempt_index, ts_ms, seq);

create table ff_stream_summary (
    partition_key    smallint not null,
    execution_id     uuid     not null,
    attempt_index    integer  not null,
    document_json    jsonb    not null,
    version          integer  not null default 0,
    patch_kind       text,
    last_updated_ms  bigint   not null,
    first_applied_ms bigint   not null,
    primary key (partition_key, execution_id, attempt_index)
) partition by hash (partition_key);

create table ff_stream_meta (
    partition_key       smallint         not null,
    execution_id        uuid             not null,
    attempt_index       integer          not null,
    ema_rate_hz         double precision not null default 0,
    last_append_ts_ms   bigint           not null default 0,
    maxlen_applied_last integer          not null default 0,
    primary key (partition_key, execution_id, attempt_index)
) partition by hash (partition_key);

do $$
declare
    parent text;
    n constant integer := current_setting('bench.partitions');
begin
    foreach parent in array array['ff_stream_frame', 'ff_stream_summary', 'ff_stream_meta'] loop
        for i in 0 .. n - 1 loop
            execute format('create table %I partition of %I for values with (modulus %s, remainder %s)', parent || '_p' || i, parent, n, i);
        end loop;
    end loop;
end $$;

create function ff_notify_stream_frame() returns trigger language plpgsql as $$
begin
    perform pg_notify('ff_stream_' || new.execution_id || '_' || new.attempt_index, new.ts_ms || '-' || new.seq);
    return new;
end $$;
create trigger ff_stream_frame_notify_trg after insert on ff_stream_frame for each row execute function ff_notify_stream_frame();
