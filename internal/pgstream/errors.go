package pgstream

import (
	"errors"
	"fmt"
	"net"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var (
	// ErrNotFound means that the stream, group or memory does not exist.
	ErrNotFound = errors.New("not found")
	// ErrOwned means that another owner holds the stream or group.
	ErrOwned = errors.New("owned by another resource")
	// ErrRefused means that the change or the argument is not possible, and the message says what to do instead.
	ErrRefused = errors.New("refused")
	// ErrFenced means that the caller's claim has ended: it expired and was taken over, or was settled already.
	ErrFenced = errors.New("fenced")
	// ErrNotEmpty means that a drop with onlyIfEmpty found messages.
	ErrNotEmpty = errors.New("not empty")
	// ErrOutOfRange means that a position was asked for that has been removed.
	ErrOutOfRange = errors.New("position out of range")
	// ErrLapsed means that the group was too far behind and keeps nothing any more: messages may have been removed unseen. ResetGroup ends it.
	ErrLapsed = errors.New("the group has lapsed")
	// ErrLockEnded means that a lock of a workflow is no longer the caller's: it was given up, or expired and somebody else has locked the workflow.
	ErrLockEnded = errors.New("the lock has ended")
	// ErrLocked means that somebody else has locked a workflow. The same call may succeed later.
	ErrLocked = errors.New("locked by somebody else")
)

// The engine's SQLSTATEs, as the functions in schema/functions raise them.
const (
	codeFenced   = "MR001"
	codeNotFound = "MR002"
	codeRefused  = "MR004"
	codeNotEmpty = "MR005"
	codeOwned    = "MR007"
	codeRange    = "MR008"
	codeLapsed   = "MR010"
	codeVersion  = "MR011"
	codeIsolated = "MR003"
	codeLockLost = "MR012"
	codeLocked   = "MR013"
)

// translate is the one place that turns SQLSTATEs of our class into the errors above. The server's message and hint are kept; they
// never contain payloads or connection strings.
func translate(err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	text := pg.Message
	if pg.Hint != "" {
		text += ". " + pg.Hint
	}
	switch pg.Code {
	case codeFenced:
		return fmt.Errorf("%w: %s", ErrFenced, text)
	case codeNotFound:
		return fmt.Errorf("%w: %s", ErrNotFound, text)
	case codeOwned:
		return fmt.Errorf("%w: %s", ErrOwned, text)
	case codeRefused:
		return fmt.Errorf("%w: %s", ErrRefused, text)
	case codeRange:
		return fmt.Errorf("%w: %s", ErrOutOfRange, text)
	case codeLapsed:
		return fmt.Errorf("%w: %s", ErrLapsed, text)
	case codeLockLost:
		return fmt.Errorf("%w: %s", ErrLockEnded, text)
	case codeLocked:
		return fmt.Errorf("%w: %s", ErrLocked, text)
	case codeVersion:
		present, _ := strconv.ParseInt(pg.Detail, 10, 64) // 0 when it is no number, as for a key without messages
		return fmt.Errorf("%w: %s", &VersionError{Present: present}, text)
	case "26000", "42P05": // invalid_sql_statement_name, duplicate_prepared_statement
		return fmt.Errorf("%w. If the connection goes through a transaction-pooling proxy, add default_query_exec_mode=cache_describe "+
			"to its connection string", err)
	case "23502", "23514", "22P02", "22023", "54000": // a value that a constraint or a type refuses, or that does not fit into an index
		return fmt.Errorf("%w: %s", ErrRefused, text)
	}
	return err
}

// isIsolation tells that a function needs another isolation level, or the primary.
func isIsolation(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && pg.Code == codeIsolated
}

// IsTransient says whether the same call may succeed later without anybody changing anything: connection trouble, a server that starts or
// stops, a deadlock, a lock that was not free, full disks and connection slots.
func IsTransient(err error) bool {
	if err == nil {
		return false
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch {
		case pg.Code == "57014": // canceled by statement_timeout
			return true
		case len(pg.Code) == 5 && (pg.Code[:2] == "08" || pg.Code[:2] == "53" || pg.Code[:3] == "57P" || pg.Code[:2] == "58"):
			return true
		case pg.Code == "40001" || pg.Code == "40P01" || pg.Code == "55P03":
			return true
		}
		return false
	}
	var connect *pgconn.ConnectError
	var network net.Error
	return errors.As(err, &connect) || errors.As(err, &network) || pgconn.Timeout(err) || pgconn.SafeToRetry(err) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, pgx.ErrTxClosed)
}
