package database

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	labels        = []string{"server", "database"}
	descReachable = prometheus.NewDesc("millrace_database_reachable",
		"1 while the last call to a database got an answer, 0 while it did not.", labels, nil)
	descMaintained = prometheus.NewDesc("millrace_database_maintained_timestamp_seconds",
		"When the upkeep of a database (retention, ledgers) last ran to its end.", labels, nil)
)

// Describe is prometheus.Collector's.
func (r *Registry) Describe(ch chan<- *prometheus.Desc) {
	ch <- descReachable
	ch <- descMaintained
}

// Collect is prometheus.Collector's. It asks no database. Several connection strings may lead to one: it is reachable when all of them are.
func (r *Registry) Collect(ch chan<- prometheus.Metric) {
	type place struct{ server, database string }
	type state struct {
		reachable  bool
		maintained time.Time
	}
	all := map[place]state{}
	for _, d := range r.Active() {
		p := place{d.host, d.name}
		s, seen := all[p]
		s.reachable = d.Reachable() && (s.reachable || !seen)
		if at := d.maintainedAt(); at.After(s.maintained) {
			s.maintained = at
		}
		all[p] = s
	}
	for p, s := range all {
		value := 0.0
		if s.reachable {
			value = 1
		}
		ch <- prometheus.MustNewConstMetric(descReachable, prometheus.GaugeValue, value, p.server, p.database)
		if !s.maintained.IsZero() {
			ch <- prometheus.MustNewConstMetric(descMaintained, prometheus.GaugeValue, float64(s.maintained.Unix()), p.server, p.database)
		}
	}
}
