package database

import (
	"testing"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/phase"
)

// A connection string that no Secret holds any more is forgotten: with its old password, the server would see failed logins from
// scouts and upkeep.
func TestTheOldConnectionStringOfASecretIsForgotten(t *testing.T) {
	t.Parallel()
	r := NewRegistry(Options{})
	old, fresh := get(t, r, "postgres://a:old@h/d"), get(t, r, "postgres://a:new@h/d")
	resolver := &Resolver{Registry: r}
	one, two := secretKey{"n", "one", "dsn"}, secretKey{"n", "two", "dsn"}
	resolver.leads(one, old, "1")
	resolver.leads(two, old, "1")
	resolver.leads(one, fresh, "1")
	if len(r.Active()) != 2 {
		t.Errorf("%d databases while one Secret holds the old string, want 2", len(r.Active()))
	}
	resolver.leads(two, fresh, "1")
	if active := r.Active(); len(active) != 1 || active[0] != fresh {
		t.Errorf("%d databases when no Secret holds the old string, want the new one", len(active))
	}
	if err := old.Do(t.Context(), ping); phase.Reason(err, "") != v1alpha1.ReasonDatabaseUnreachable {
		t.Errorf("who still follows the old string is told %v", err)
	}
}
