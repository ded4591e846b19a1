package pipeline

import (
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// Class says who must act on an error. The place that fails knows the cause; everything else obeys the class.
type Class uint8

// Classes.
const (
	ClassTransient     Class = iota // nobody: the same again, after a pause
	ClassRow                        // the sender: at least one row of the batch cannot be written
	ClassConfiguration              // a person: nothing is written, acknowledged or read until it is repaired
	ClassFenced                     // nobody: another member has the items now
)

// String names the class as metrics and logs do.
func (c Class) String() string {
	return [...]string{"transient", "row", "configuration", "fenced"}[c]
}

// ConfigurationError is a problem that a person has to solve, with what to do about it.
type ConfigurationError struct{ message string }

// NewConfigurationError returns an error of class ClassConfiguration. Its message says what to do.
func NewConfigurationError(format string, args ...any) error {
	return &ConfigurationError{message: fmt.Sprintf(format, args...)}
}

// Error returns the message.
func (e *ConfigurationError) Error() string { return e.message }

// inDoubtError means that a transaction may or may not have been committed.
type inDoubtError struct{ err error }

// Error says what happened to the commit.
func (e *inDoubtError) Error() string { return "the commit's answer was lost: " + e.err.Error() }

// Unwrap returns what happened.
func (e *inDoubtError) Unwrap() error { return e.err }

// commitInDoubt says whether a transaction whose COMMIT failed like this may have been committed all the same. It was not
// when the server reports that it was rolled back, or an error of the transaction itself.
func commitInDoubt(err error) bool {
	if errors.Is(err, pgx.ErrTxCommitRollback) {
		return false
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || len(pg.Code) != 5 {
		return true
	}
	switch pg.Code[:2] {
	case "22", "23", "25", "27", "42", "44", "P0":
		return false
	case "40":
		return pg.Code == "40003" // statement_completion_unknown
	}
	return true // a shutdown can be reported after the commit, for example
}

// Classify returns the class of an error. What it does not know is transient: nothing is lost by trying again.
func Classify(err error) Class {
	var (
		conf    *ConfigurationError
		inDoubt *inDoubtError
		pg      *pgconn.PgError
		request *httpError
	)
	switch {
	case errors.As(err, &inDoubt), errors.Is(err, pgstream.ErrFenced):
		return ClassFenced
	case errors.As(err, &conf), errors.Is(err, pgstream.ErrNotFound), errors.Is(err, pgstream.ErrLapsed),
		errors.Is(err, schema.ErrNewer), redisstream.IsConfiguration(err):
		return ClassConfiguration
	case errors.Is(err, pgstream.ErrRefused):
		return ClassRow // a message that its stream does not take
	case errors.As(err, &pg):
		return classifyState(pg.Code)
	case errors.As(err, &request):
		return request.class
	}
	return ClassTransient
}

// classifyState knows the classes of SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html).
func classifyState(code string) Class {
	switch code {
	case "25006": // read_only_sql_transaction: a failover is under way and this is the old primary
		return ClassTransient
	case "0A000": // feature_not_supported: also "cached plan must not change result type", which the sink handles
		return ClassConfiguration
	case "21000": // cardinality_violation: two rows that are equal for the database and different for us
		return ClassRow
	}
	if len(code) != 5 {
		return ClassTransient
	}
	switch code[:2] {
	case "22", // data exception
		"23",       // integrity constraint violation
		"27",       // triggered data change violation
		"44",       // WITH CHECK OPTION violation
		"54",       // program limit exceeded, such as a key too long for its index
		"P0",       // raised in PL/pgSQL, as triggers do
		"38", "39": // external routines
		return ClassRow
	case "42", // syntax error or access rule violation: a column, table or privilege is missing
		"28", // invalid authorization
		"3D", // invalid catalog name: no such database
		"3F": // invalid schema name
		return ClassConfiguration
	}
	return ClassTransient
}

// reason is what may be shown of an error. It leaves out PostgreSQL's detail, which repeats the row.
func reason(err error) string {
	var b *branchError
	if errors.As(err, &b) {
		return clip("branch " + b.branch + ": " + reason(b.err))
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		text := pg.Message
		if pg.ConstraintName != "" && pg.Code != "23502" {
			text += " (constraint " + pg.ConstraintName + ")"
		}
		return clip(text + " (SQLSTATE " + pg.Code + ")")
	}
	return clip(err.Error())
}

// clip bounds a text that came from outside.
func clip(text string) string {
	const maxReason = 500
	if len(text) <= maxReason {
		return text
	}
	return text[:maxReason] + "…"
}
