package processor

import (
	"strings"
	"testing"
)

// What is rotated changes nothing, and what leads elsewhere does.
func TestAnAddressIsWhatIsLeftWithoutCredentials(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, before, after string
		same                bool
	}{
		{"a password", "postgres://app:old@db:5432/app?sslmode=require", "postgres://app:new@db:5432/app?sslmode=require", true},
		{"a user", "postgres://app:old@db/app", "postgres://app2:new@db/app", true},
		{"a password with an @", "redis://:p@ss@redis:6379/0", "redis://:other@redis:6379/0", true},
		{"a password in a parameter", "postgres://db/app?user=a&password=old", "postgres://db/app?user=b&password=new", true},
		{"Sentinels' password", "redis+sentinel://s1,s2/main?sentinel_password=old", "redis+sentinel://s1,s2/main?sentinel_password=new", true},
		{"keywords", "host=db user=app password=old dbname=app", "host=db user=app password='it\\'s new' dbname=app", true},
		{"a host", "postgres://app:old@db:5432/app", "postgres://app:old@other:5432/app", false},
		{"a database", "postgres://app:old@db/app", "postgres://app:old@db/app2", false},
		{"a setting", "postgres://app:old@db/app?sslmode=require", "postgres://app:old@db/app?sslmode=verify-full", false},
		{"a host among keywords", "host=db user=app", "host=other user=app", false},
		{"the scheme", "redis://redis:6379", "rediss://redis:6379", false},
	} {
		before, after := withoutCredentials(c.before), withoutCredentials(c.after)
		if (before == after) != c.same {
			t.Errorf("%s: %q and %q", c.name, before, after)
		}
		for _, secret := range []string{"old", "new", "p@ss"} {
			if strings.Contains(before+after, secret) {
				t.Errorf("%s: %q and %q hold a secret", c.name, before, after)
			}
		}
	}
}
