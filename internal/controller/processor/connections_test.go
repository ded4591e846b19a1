package processor

import (
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/types"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/lag"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// A server with 100 connections for everybody, of which a stranger uses 20, our pods 14, and another processor 7.
func TestFreeConnections(t *testing.T) {
	all := func(n int64) database.Counts { return database.Counts{Server: n, Database: n, Role: n} }
	none := database.Counts{Server: 100, Database: -1, Role: -1}
	for _, c := range []struct {
		name   string
		max    database.Counts
		have   int64 // that our pods may have
		others map[types.UID]claim
		want   int64
		bound  string
	}{
		{"what others use is gone, what we use is ours", none, 14, nil, 100 - 20 - 7, "max_connections"},
		{"the name of ours counts for what we can have", none, 7, nil, 100 - 20 - 7 - 7, "max_connections"},
		{"what another has been promised is gone", none, 14, map[types.UID]claim{"o": {"db:5432", "millrace/other", 28}}, 100 - 20 - 28, "max_connections"},
		{"what another has already is counted once", none, 14, map[types.UID]claim{"o": {"db:5432", "millrace/other", 7}}, 100 - 20 - 7, "max_connections"},
		{"another server is another matter", none, 14, map[types.UID]claim{"o": {"else:5432", "millrace/other", 70}}, 100 - 20 - 7, "max_connections"},
		{"our last promise is not somebody else's", none, 14, map[types.UID]claim{"p": {"db:5432", "millrace/sink", 70}}, 100 - 20 - 7, "max_connections"},
		{"the database may take fewer", database.Counts{Server: 100, Database: 50, Role: -1}, 14, nil, 50 - 27, "the limit of the database"},
		{"or the role", database.Counts{Server: 100, Database: 50, Role: 40}, 14, nil, 40 - 27, "the limit of the role"},
		{"nothing is left", database.Counts{Server: 10, Database: -1, Role: -1}, 0, nil, 0, "max_connections"},
	} {
		m := &memory{claims: c.others}
		use := database.Connections{Max: c.max, Used: all(41), By: map[string]database.Counts{"": all(20), "millrace/sink": all(14), "millrace/other": all(7)}}
		if free, bound := m.free("p", claim{"db:5432", "millrace/sink", c.have}, use); free != c.want || bound != c.bound {
			t.Errorf("%s: %d by %s, want %d by %s", c.name, free, bound, c.want, c.bound)
		}
		m.keep("p", history{}, 77)
		if m.claims["p"].connections != 77 {
			t.Errorf("%s: the promise is not kept: %+v", c.name, m.claims)
		}
		if m.forget("p"); len(m.claims) > len(c.others) || len(m.histories) != 0 {
			t.Errorf("%s: something is left of a Processor that is gone", c.name)
		}
	}
}

func TestConnectionsOfAPod(t *testing.T) {
	const here, there = "postgres://a:b@here/x", "postgres://c:d@there/x"
	file := func(variable, name string) secretFile {
		return secretFile{variable: variable, ref: v1alpha1.SecretKeyReference{Name: name, Key: "dsn"}}
	}
	source := file(config.EnvSourceDatabaseURL, "source")
	for _, c := range []struct {
		name   string
		files  []secretFile
		logins map[string]login
		want   int64
	}{
		{"one database for both ends", []secretFile{source, file(config.EnvSinkDatabaseURL, "source")}, nil, 7 + 1},
		{"no sink in a database", []secretFile{source}, nil, 7 + 1},
		{"a sink elsewhere", []secretFile{source, file(config.EnvSinkDatabaseURL, "sink")}, map[string]login{config.EnvSinkDatabaseURL: loginOf(there)}, 7 + 1},
		{"a sink on the same server", []secretFile{source, file(config.EnvSinkDatabaseURL, "sink")}, map[string]login{config.EnvSinkDatabaseURL: loginOf(here)}, 14 + 1},
		{"notifications past a pooler", []secretFile{source}, map[string]login{config.EnvSourceListenURL: loginOf(there)}, 7},
	} {
		in := inputs{secrets: c.files, logins: map[string]login{config.EnvSourceDatabaseURL: loginOf(here)}}
		for variable, l := range c.logins {
			in.logins[variable] = l
		}
		p := &v1alpha1.Processor{Spec: v1alpha1.ProcessorSpec{Batch: v1alpha1.Batch{Writers: 3}}}
		if n := in.connections(p); n != c.want {
			t.Errorf("%s: %d, want %d", c.name, n, c.want)
		}
	}
}

func TestReadingOf(t *testing.T) {
	figures := lag.Figures{Known: true, Lag: 100, InFlight: 5, Oldest: midday.Add(-time.Hour), At: midday, Active: midday.Add(-time.Minute), Rates: &lag.Rates{Published: 10}}
	r := readingOf(figures, midday)
	if want := (reading{lag: 100, inFlight: 5, age: time.Hour, rate: 10, idle: time.Minute}); r != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
	// The oldest fails again and again. What waits is as old as its number and rate say.
	figures.Deliveries = 4
	if r := readingOf(figures, midday); r.age != 10*time.Second {
		t.Errorf("with a message that fails, what waits is %s old", r.age)
	}
	figures.Paused = true
	if !readingOf(figures, midday).paused {
		t.Error("paused is lost")
	}
	if r := readingOf(lag.Figures{Lag: 7}, midday); r.unknown == "" || r.lag != 0 {
		t.Errorf("not measured: %+v", r)
	}
}

func TestDeletionCosts(t *testing.T) {
	cost := deletionCosts([]lag.Holder{{Name: "a", Messages: 5, Partitions: "0-3"}, {Name: "b", Partitions: "4"}, {Name: "c", Messages: 2}})
	if cost["a"] != 6 || cost["b"] != 1 || cost["c"] != 2 || cost["d"] != 0 {
		t.Errorf("%v", cost)
	}
}
