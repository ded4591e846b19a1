package pipeline_test

import (
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline"
)

// The dead letters of the first release get the column branch, and its processors go on writing to them.
func TestDeadLettersOfTheFirstReleaseAreBroughtUpToDate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, err := w.db.Exec(w.ctx, `create table millrace_dead_letter (
		id bigint generated always as identity, processor text not null, stream text not null, entry_id text not null, digest bytea not null,
		deliveries integer not null, reason text not null, entry jsonb not null, failed_at timestamptz not null default now(),
		constraint millrace_dead_letter_pkey primary key (id),
		constraint millrace_dead_letter_entry unique (processor, stream, entry_id, digest));
		insert into millrace_dead_letter (processor, stream, entry_id, digest, deliveries, reason, entry)
		values ('telemetry', 's', '1-1', '\x00', 3, 'old', '[{"name":"payload","value":"{}"}]')`)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := pipeline.Migrate(w.ctx, w.db, w.config()); err != nil {
			t.Fatal(err)
		}
	}
	// As the first release does, twice.
	for range 2 {
		_, err = w.db.Exec(w.ctx, `insert into millrace_dead_letter (processor, stream, entry_id, digest, deliveries, reason, entry)
			values ('telemetry', 's', '1-2', '\x00', 3, 'new', '[]') on conflict on constraint millrace_dead_letter_entry do nothing`)
		if err != nil {
			t.Fatal(err)
		}
	}
	if n := w.count("select count(*) from millrace_dead_letter where branch = ''"); n != 2 {
		t.Errorf("%d dead letters, want 2", n)
	}
}
