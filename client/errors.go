package client

import (
	"errors"
	"fmt"
	"time"

	"github.com/millrace-dev/millrace/internal/pgstream"
)

// What callers decide upon, with errors.Is. The text of an error that wraps one says what to do instead.
var (
	// ErrNotFound means that the stream or the group does not exist.
	ErrNotFound = pgstream.ErrNotFound
	// ErrRefused means that an argument or an option is not possible; the call was not made, or changed nothing.
	ErrRefused = pgstream.ErrRefused
	// ErrClaimLost means that the messages are not this consumer's any more: its lease ran out, or the group was reset. They are delivered again, so
	// whatever was not committed must be given up.
	ErrClaimLost = pgstream.ErrFenced
	// ErrOutOfRange means that what was asked for has been removed by retention.
	ErrOutOfRange = pgstream.ErrOutOfRange
	// ErrLapsed means that the group was too far behind and keeps nothing any more. millrace.reset_group says where it goes on.
	ErrLapsed = pgstream.ErrLapsed
	// ErrLocked means that somebody else has locked a workflow.
	ErrLocked = pgstream.ErrLocked
	// ErrLockEnded means that a lock of a workflow is not the caller's any more: it was given up, or expired and somebody else has locked the workflow.
	ErrLockEnded = pgstream.ErrLockEnded
	// ErrStopTimeout means that handlers were still at work when ConsumeOptions.StopTimeout was over. Their messages are delivered again.
	ErrStopTimeout = errors.New("handlers did not end in time")
	// ErrStopping is the cause of a handler's context that ends because of ConsumeOptions.StopTimeout.
	ErrStopping = errors.New("the consumer stops")
)

// VersionError means that Append expected another version than the key has, or Memory.Write another than the workflow has. Nothing was written.
type VersionError struct {
	In       string // the stream or the memory
	Key      string // the entity's key or the workflow's subject
	Expected int64  // as it was asked for
	Present  int64  // of the newest event or write; 0 when there is none

	err error
}

func (e *VersionError) Error() string { return e.err.Error() }

// Unwrap returns the server's error.
func (e *VersionError) Unwrap() error { return e.err }

// versioned makes a VersionError of an error that says so.
func versioned(err error, in, key string, expected int64) error {
	if present, ok := pgstream.IsVersionError(err); ok {
		return &VersionError{In: in, Key: key, Expected: expected, Present: present, err: err}
	}
	return err
}

// IsTransient says whether the same call may succeed later without anybody changing anything: connection trouble, a server that starts or stops, a deadlock, a
// call that took longer than Options.CallTimeout. Whether a call that failed like that has happened is not known: publish with a dedupe key, and append with
// an expected version, to repeat it safely.
func IsTransient(err error) bool { return pgstream.IsTransient(err) }

// permanentError is what Permanent returns.
type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent makes an error of a handler final: its message becomes a dead letter at once, with the error's text as the reason. nil stays nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// retryError is what RetryAfter returns.
type retryError struct {
	err   error
	delay time.Duration
}

func (e *retryError) Error() string { return e.err.Error() }
func (e *retryError) Unwrap() error { return e.err }

// RetryAfter makes the message of a handler's error come again after the delay instead of the group's backoff. It counts as an attempt like any other. nil
// stays nil.
func RetryAfter(err error, delay time.Duration) error {
	if err == nil {
		return nil
	}
	return &retryError{err, max(delay, 0)}
}

// panicError is the error of a handler that panicked.
type panicError struct {
	value any
	stack string
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }
