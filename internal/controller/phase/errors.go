package phase

import (
	"errors"
	"fmt"
	"time"
)

// class of an error: who has to act.
type class int

const (
	classWait  class = iota // another object, or time
	classStall              // a person
	classAgain              // nobody: there is no verdict yet
)

// failure is an error that carries its handling.
type failure struct {
	class  class
	reason string
	// after is when to look again; zero means that a watch will wake the resource, and then the next verification.
	after time.Duration
	err   error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// Stall says that a person has to act, with a reason from api/v1alpha1. The resource is looked at again when it or something
// it refers to changes, and at the next verification, since what a person repairs may be in the database, which wakes nobody.
func Stall(reason string, err error) error {
	return &failure{class: classStall, reason: reason, err: err}
}

// Wait says that another object or the database has to act, and when to look again: with zero, a watch wakes the resource.
func Wait(reason string, after time.Duration, err error) error {
	return &failure{class: classWait, reason: reason, after: after, err: err}
}

// Again asks for another reconcile and leaves status as it is: for what is neither progress nor failure of this resource,
// such as waiting for a turn.
func Again(after time.Duration, err error) error {
	return &failure{class: classAgain, after: after, err: err}
}

// Stallf is Stall with a formatted message.
func Stallf(reason, format string, args ...any) error {
	return Stall(reason, fmt.Errorf(format, args...))
}

// Waitf is Wait with a formatted message.
func Waitf(reason string, after time.Duration, format string, args ...any) error {
	return Wait(reason, after, fmt.Errorf(format, args...))
}

// IsStalled says whether a person has to act.
func IsStalled(err error) bool {
	f, ok := errors.AsType[*failure](err)
	return ok && f.class == classStall
}

// IsAgain says whether the error asks for another reconcile and nothing else.
func IsAgain(err error) bool {
	f, ok := errors.AsType[*failure](err)
	return ok && f.class == classAgain
}

// Reason returns the reason that an error carries; fallback when it carries none.
func Reason(err error, fallback string) string {
	if f, ok := errors.AsType[*failure](err); ok && f.reason != "" {
		return f.reason
	}
	return fallback
}
