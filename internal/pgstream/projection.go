package pgstream

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ProjectionSpec is the desired state of one projection of a stream.
type ProjectionSpec struct {
	Name string `json:"name"` // [a-z][a-z0-9_-]{0,62}
	// Function is its name without arguments: function(document jsonb, payload jsonb, headers jsonb) returns jsonb with documents, and
	// function(stream, key, version, position, payload, headers) without.
	Function   string   `json:"function"`
	Documents  string   `json:"documents,omitempty"`   // table, made when it is missing
	DocumentID []string `json:"document_id,omitempty"` // path in the payload that names the document; empty: the key
	Group      string   `json:"group,omitempty"`       // consumer group that runs it; empty: it runs inside the append
	Revision   string   `json:"revision,omitempty"`    // another one makes the documents anew
}

// ProjectionInfo is what the database says about one projection.
type ProjectionInfo struct {
	Name         string
	Documents    string
	Group        string
	Live         bool   // false until its documents are there for the first time
	Declared     bool   // by the resource of the stream
	Rebuilt      *int64 // up to where a rebuild has got; nil when none is under way
	LastPosition int64  // of the stream
}

// ProjectionProblem is why one projection cannot be as it is wanted.
type ProjectionProblem struct {
	Name    string
	Missing bool // what it names does not exist, such as its function or its group; it may come
	Text    string
}

// PlanProjections compares the projections that the resource of a stream declares with those in the database, and writes nothing. A projection with a problem
// has no step.
func PlanProjections(ctx context.Context, db DB, stream string, wanted []ProjectionSpec) ([]Step, []ProjectionProblem, error) {
	rows, _ := db.Query(ctx, "select name, summary, statement, problem, problem_code from millrace_engine.plan_projections($1, $2)", stream, orEmpty(wanted))
	var steps []Step
	var problems []ProjectionProblem
	var name string
	var summary, statement, problem, code *string
	_, err := pgx.ForEachRow(rows, []any{&name, &summary, &statement, &problem, &code}, func() error {
		if problem != nil {
			problems = append(problems, ProjectionProblem{Name: name, Missing: code != nil && *code == codeNotFound, Text: *problem})
			return nil
		}
		steps = append(steps, Step{Summary: *summary, SQL: *statement})
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("inspect the projections of stream %q: %w", stream, translate(err))
	}
	return steps, problems, nil
}

// orEmpty makes an empty JSON array of a nil slice.
func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// ApplyProjections runs the steps that PlanProjections has returned. What has documents goes live when RebuildStep has finished.
func ApplyProjections(ctx context.Context, db DB, stream string, steps []Step) error {
	for _, step := range steps {
		if _, err := db.Exec(ctx, step.SQL); err != nil {
			return fmt.Errorf("%s of stream %q: %w", step.Summary, stream, translate(err))
		}
	}
	return nil
}

// Projections lists the projections of a stream.
func Projections(ctx context.Context, db DB, stream string) ([]ProjectionInfo, error) {
	rows, _ := db.Query(ctx, `select name, coalesce(documents, ''), coalesce("group", ''), live, declared, rebuilt, last_position from millrace.projections($1)`, stream)
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[ProjectionInfo])
	if err != nil {
		return nil, fmt.Errorf("list the projections of stream %q: %w", stream, translate(err))
	}
	return all, nil
}

// RebuildStep projects at most limit messages more beside the live documents, and begins when no rebuild is under way. It reports true when the new documents have replaced
// the old ones.
func RebuildStep(ctx context.Context, db DB, stream, projection string, limit int) (finished bool, err error) {
	err = db.QueryRow(ctx, "select finished from millrace.rebuild_step($1, $2, $3)", stream, projection, limit).Scan(&finished)
	if err != nil {
		return false, fmt.Errorf("rebuild projection %q of stream %q: %w", projection, stream, translate(err))
	}
	return finished, nil
}

// IsFunctionError says whether it was a function of the user's that failed, and what it has said. Repeating the call is no use until somebody has changed the function or
// the message.
func IsFunctionError(err error) (message string, ok bool) {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || len(pg.Code) < 2 {
		return "", false
	}
	switch pg.Code[:2] {
	case "P0", "22", "23", "42", "21", "38", "39":
		return pg.Message, true
	}
	return "", false
}
