package database

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// readOnlyRetry is how soon a database is asked again that answers and takes no writes: no breaker is open for it, and a failover ends at any time.
const readOnlyRetry = 10 * time.Second

// migrationError marks a failure of the migration that precedes the first call.
type migrationError struct{ err error }

func (e *migrationError) Error() string { return "bring the schema to this version: " + e.err.Error() }
func (e *migrationError) Unwrap() error { return e.err }

// unreachable says whether an error is about reaching the server at all, so that every other call would meet it too.
func unreachable(err error) bool {
	if err == nil {
		return false
	}
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch {
		case strings.HasPrefix(pgErr.Code, "08"), strings.HasPrefix(pgErr.Code, "57P"), pgErr.Code == "53300", refusesAll(pgErr, err):
			return true
		}
		return false
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err) || pgconn.SafeToRetry(err)
}

// refusesAll says whether the database exists and takes no connection from anybody, as while it is made from a template or restored.
func refusesAll(e *pgconn.PgError, err error) bool {
	_, connecting := errors.AsType[*pgconn.ConnectError](err)
	return connecting && e.Code == "55000"
}

// classify gives an error its handling and a text for a person. Server messages about a connection are kept, because they
// name user and database and never a password; errors of the client library are replaced, because they may quote more.
func (d *Database) classify(err error) error {
	if err == nil || isPhase(err) {
		return err
	}
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		return d.classifyServer(pgErr, err)
	}
	if unreachable(err) {
		return phase.Wait(v1alpha1.ReasonDatabaseUnreachable, breakerFirst, d.unreachableMessage(err))
	}
	return err
}

func (d *Database) classifyServer(e *pgconn.PgError, err error) error {
	switch {
	case e.Code == "28P01" || e.Code == "28000":
		return phase.Stallf(v1alpha1.ReasonAuthenticationFailed,
			"%s refuses user %q: %s. Correct user and password in the Secret, or the server's pg_hba.conf", d, d.user, e.Message)
	case e.Code == "3D000":
		return phase.Stallf(v1alpha1.ReasonDatabaseNotFound,
			"the server at %s has no database %q. Create it, or correct the connection string in the Secret", d.host, d.name)
	case e.Code == "42501":
		return phase.Stallf(v1alpha1.ReasonPermissionDenied,
			"%s: user %q lacks a privilege: %s. Grant it, for example: GRANT CREATE, CONNECT ON DATABASE %q TO %q",
			d, d.user, e.Message, d.name, d.user)
	case e.Code == "25006", e.Code == "MR003" && strings.Contains(e.Message, "standby"): // the engine's own word for it
		return phase.Waitf(v1alpha1.ReasonDatabaseReadOnly, readOnlyRetry,
			"%s is read-only, perhaps a standby. Point the Secret at the primary, or wait for the failover to end", d)
	case e.Code == "53300":
		return phase.Waitf(v1alpha1.ReasonDatabaseUnreachable, breakerFirst,
			"%s has no connection left (%s). Raise max_connections or use fewer clients", d, e.Message)
	case strings.HasPrefix(e.Code, "08"), strings.HasPrefix(e.Code, "57P"), refusesAll(e, err):
		return phase.Waitf(v1alpha1.ReasonDatabaseUnreachable, breakerFirst, "%s is not available: %s", d, e.Message)
	case e.Code == "55P03":
		return phase.Waitf(v1alpha1.ReasonProgressing, 2*time.Second,
			"%s: a lock did not come within %s; trying again", d, d.registry.opts.LockTimeout)
	case e.Code == "57014":
		return phase.Waitf(v1alpha1.ReasonProgressing, 10*time.Second,
			"%s: a statement did not end within %s; trying again", d, d.registry.opts.StatementTimeout)
	case strings.HasPrefix(e.Code, "42P01"), strings.HasPrefix(e.Code, "42883"), strings.HasPrefix(e.Code, "3F000"):
		// A table, function or schema of the engine is gone: dropped by hand, or the database was restored.
		d.forgetSchema()
	}
	return err
}

// refused is the answer of an open breaker.
func (d *Database) refused(after time.Duration, cause error) error {
	if cause == nil {
		return phase.Again(after, fmt.Errorf("%s: the first connection is being made", d))
	}
	if pgErr, ok := errors.AsType[*pgconn.PgError](cause); ok {
		return phase.Waitf(v1alpha1.ReasonDatabaseUnreachable, after, "%s is not available: %s", d, pgErr.Message)
	}
	return phase.Wait(v1alpha1.ReasonDatabaseUnreachable, after, d.unreachableMessage(cause))
}

func busy(d *Database) error {
	return phase.Again(time.Second, fmt.Errorf("%s: every connection is busy", d))
}

// unreachableMessage says what failed on the way to the server, in words that are the same each time, so that a repeat is
// not a new message.
func (d *Database) unreachableMessage(err error) error {
	what := "the connection broke"
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		what = "its host name cannot be resolved"
	case strings.Contains(err.Error(), "connection refused"):
		what = "connection refused"
	case strings.Contains(err.Error(), "no route to host"):
		what = "no route to host"
	case strings.Contains(err.Error(), "tls"), strings.Contains(err.Error(), "certificate"):
		what = "TLS could not be set up; see sslmode in the connection string"
	case errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err):
		what = "no answer in time"
	}
	return fmt.Errorf("cannot reach %s: %s. Check that the server runs, that host and port in the Secret are right, "+
		"and that network policies let the manager connect", d, what)
}

func isPhase(err error) bool {
	return phase.Reason(err, "") != "" || phase.IsAgain(err)
}
