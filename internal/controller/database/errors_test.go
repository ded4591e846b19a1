package database

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

const secretDSN = "postgres://app:hush-hush@db.example.com:5433/orders"

func TestClassifyGivesEveryErrorItsHandling(t *testing.T) {
	d, err := NewRegistry(Options{}).Get(secretDSN)
	if err != nil {
		t.Fatal(err)
	}
	server := func(code string) error {
		return fmt.Errorf("describe stream: %w", &pgconn.PgError{Code: code, Message: "server says"})
	}
	for _, c := range []struct {
		name        string
		err         error
		reason      string
		stalled     bool
		unreachable bool
	}{
		{"wrong password", server("28P01"), v1alpha1.ReasonAuthenticationFailed, true, false},
		{"no entry in pg_hba.conf", server("28000"), v1alpha1.ReasonAuthenticationFailed, true, false},
		{"no such database", server("3D000"), v1alpha1.ReasonDatabaseNotFound, true, false},
		{"no privilege", server("42501"), v1alpha1.ReasonPermissionDenied, true, false},
		{"a standby", server("25006"), v1alpha1.ReasonDatabaseReadOnly, false, false},
		{"no connection left", server("53300"), v1alpha1.ReasonDatabaseUnreachable, false, true},
		{"shutting down", server("57P01"), v1alpha1.ReasonDatabaseUnreachable, false, true},
		{"starting up", server("57P03"), v1alpha1.ReasonDatabaseUnreachable, false, true},
		{"a lock that did not come", server("55P03"), v1alpha1.ReasonProgressing, false, false},
		{"a statement that took too long", server("57014"), v1alpha1.ReasonProgressing, false, false},
		{"no answer", context.DeadlineExceeded, v1alpha1.ReasonDatabaseUnreachable, false, true},
		{"anything else is left as it is", errors.New("bug"), "", false, false},
		{"what has a handling keeps it", phase.Stall(v1alpha1.ReasonConflict, errors.New("x")), v1alpha1.ReasonConflict, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := unreachable(c.err); got != c.unreachable {
				t.Errorf("unreachable is %t", got)
			}
			err := d.classify(c.err)
			if phase.Reason(err, "") != c.reason || phase.IsStalled(err) != c.stalled {
				t.Errorf("%s, stalled %t: %v", phase.Reason(err, ""), phase.IsStalled(err), err)
			}
			if strings.Contains(err.Error(), "hush") {
				t.Errorf("the password is in %q", err)
			}
		})
	}
}

// While a database is restored or used as a template, it may take no connection at all. That passes.
func TestADatabaseThatTakesNoConnectionIsUnreachable(t *testing.T) {
	dsn := postgres.NewDatabase(t)
	config, err := pgx.ParseConfig(dsn)
	if err != nil {
		t.Fatal(err)
	}
	name := config.Database
	config.Database = "postgres"
	admin, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close(context.WithoutCancel(t.Context()))
	if _, err := admin.Exec(t.Context(), "alter database "+pgx.Identifier{name}.Sanitize()+" allow_connections false"); err != nil {
		t.Fatal(err)
	}
	d, err := NewRegistry(Options{}).Get(dsn)
	if err != nil {
		t.Fatal(err)
	}
	_, err = pgx.Connect(t.Context(), dsn)
	if !unreachable(err) {
		t.Errorf("not unreachable: %v", err)
	}
	if err := d.classify(err); phase.Reason(err, "") != v1alpha1.ReasonDatabaseUnreachable || phase.IsStalled(err) {
		t.Errorf("%s, stalled %t: %v", phase.Reason(err, ""), phase.IsStalled(err), err)
	}
}

// D4: nothing of a connection string that cannot be read is repeated.
func TestABadConnectionStringIsNotRepeated(t *testing.T) {
	for _, dsn := range []string{"", "hush-hush", "postgres://app:hush-hush@h:99999/d", "host=h password=hush-hush sslmode=nonsense"} {
		_, err := NewRegistry(Options{}).Get(dsn)
		if err == nil {
			t.Errorf("%q is accepted", dsn)
			continue
		}
		if strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "write postgres://") {
			t.Errorf("%v", err)
		}
	}
}

func TestOnePoolPerConnectionString(t *testing.T) {
	r := NewRegistry(Options{})
	a, _ := r.Get(secretDSN)
	b, _ := r.Get(secretDSN)
	c, _ := r.Get(strings.Replace(secretDSN, "app:", "other:", 1))
	if a != b || a == c || !a.SameAs(c) {
		t.Error("databases are not told apart by their connection string")
	}
	if strings.Contains(a.String()+string(a.ID()), "hush") {
		t.Error("the password is in the name")
	}
}
