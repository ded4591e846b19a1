package lag

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	groupLabels = []string{"namespace", "name"}

	descLag = prometheus.NewDesc("millrace_group_lag_messages",
		"Messages of a ConsumerGroup that no member has been given yet.", groupLabels, nil)
	descInFlight = prometheus.NewDesc("millrace_group_in_flight_messages",
		"Messages of a ConsumerGroup that members hold.", groupLabels, nil)
	descRetrying = prometheus.NewDesc("millrace_group_retrying_messages",
		"Messages of a ConsumerGroup that wait for another delivery.", groupLabels, nil)
	descDead = prometheus.NewDesc("millrace_group_dead_letters",
		"Messages of a ConsumerGroup that were set aside.", groupLabels, nil)
	descOldest = prometheus.NewDesc("millrace_group_oldest_age_seconds",
		"Age of the oldest message of a ConsumerGroup that is not settled; 0 when there is none.", groupLabels, nil)
	descMembers = prometheus.NewDesc("millrace_group_members",
		"Processes in a ConsumerGroup.", groupLabels, nil)
	descKnown = prometheus.NewDesc("millrace_group_lag_known",
		"1 while the figures of a ConsumerGroup are measurements, 0 while they are not: they are then left out.", groupLabels, nil)
)

// Describe is prometheus.Collector's.
func (p *Poller) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descLag, descInFlight, descRetrying, descDead, descOldest, descMembers, descKnown} {
		ch <- d
	}
}

// Collect is prometheus.Collector's. It serves the last readings and asks no database.
func (p *Poller) Collect(ch chan<- prometheus.Metric) {
	for f, v := range p.All() {
		gauge := func(d *prometheus.Desc, value float64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, f.Namespace, f.Name)
		}
		if !v.Known {
			gauge(descKnown, 0)
			continue
		}
		age := 0.0
		if !v.Oldest.IsZero() {
			age = max(time.Since(v.Oldest).Seconds(), 0)
		}
		gauge(descKnown, 1)
		gauge(descLag, float64(v.Lag))
		gauge(descInFlight, float64(v.InFlight))
		gauge(descRetrying, float64(v.Retrying))
		gauge(descDead, float64(v.DeadLetters))
		gauge(descOldest, age)
		gauge(descMembers, float64(v.Members))
	}
}
