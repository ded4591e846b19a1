package lag

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	groupLabels = []string{"namespace", "name"}

	descLag = prometheus.NewDesc("millrace_group_lag_messages",
		"Messages of a ConsumerGroup that no member has been given yet.", groupLabels, nil)
	descQueued = prometheus.NewDesc("millrace_group_queued_messages",
		"Messages of a ConsumerGroup that wait for a delivery, the first or another; of a group with a filter those that it takes.", groupLabels, nil)
	descInFlight = prometheus.NewDesc("millrace_group_in_flight_messages",
		"Messages of a ConsumerGroup that members hold.", groupLabels, nil)
	descRetrying = prometheus.NewDesc("millrace_group_retrying_messages",
		"Messages of a ConsumerGroup that wait for another delivery.", groupLabels, nil)
	descDead = prometheus.NewDesc("millrace_group_dead_letters",
		"Messages of a ConsumerGroup that were set aside.", groupLabels, nil)
	descOldest = prometheus.NewDesc("millrace_group_oldest_age_seconds",
		"Age of the oldest message of a ConsumerGroup that is not settled; 0 when there is none.", groupLabels, nil)
	descDeliveries = prometheus.NewDesc("millrace_group_deliveries",
		"Deliveries of the unsettled message of a ConsumerGroup that was handed out most often; 0 when none is held or waits for another.", groupLabels, nil)
	descPublished = prometheus.NewDesc("millrace_group_published_messages_per_second",
		"Messages that came into the stream of a ConsumerGroup, over the last minute.", groupLabels, nil)
	descSettled = prometheus.NewDesc("millrace_group_settled_messages_per_second",
		"Messages that a ConsumerGroup was done with, over the last minute: settled, set aside, or removed by retention.", groupLabels, nil)
	descMembers = prometheus.NewDesc("millrace_group_members",
		"Processes in a ConsumerGroup.", groupLabels, nil)
	descPaused = prometheus.NewDesc("millrace_group_paused",
		"1 while a ConsumerGroup is paused and hands out no message.", groupLabels, nil)
	descLapsed = prometheus.NewDesc("millrace_group_lapsed",
		"1 while a ConsumerGroup has lapsed: it receives nothing until it is reset.", groupLabels, nil)
	descStreamMessages = prometheus.NewDesc("millrace_stream_messages",
		"Messages that a Stream holds; an upper bound.", groupLabels, nil)
	descStreamBytes = prometheus.NewDesc("millrace_stream_bytes",
		"Size of a Stream on disk, with its indexes.", groupLabels, nil)
	descStreamDelayed = prometheus.NewDesc("millrace_stream_delayed_messages",
		"Messages of a Stream that wait for their time to be delivered.", groupLabels, nil)
	descStreamPublished = prometheus.NewDesc("millrace_stream_published_messages_per_second",
		"Messages that came into a Stream, over the last minute.", groupLabels, nil)
	descStreamSegments = prometheus.NewDesc("millrace_stream_segments_used_ratio",
		"Segments of a Stream that hold messages, of all it has: at 1 retention cannot free any, and the stream grows.", groupLabels, nil)
	descStreamHeld = prometheus.NewDesc("millrace_stream_horizon_held_seconds",
		"For how long an open transaction has kept what was published to a Stream from being read; 0 when there is none.", groupLabels, nil)
	descKnown = prometheus.NewDesc("millrace_group_lag_known",
		"1 while the figures of a ConsumerGroup are measurements, 0 while they are not: they are then left out.", groupLabels, nil)
)

// Describe is prometheus.Collector's.
func (p *Poller) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descLag, descQueued, descInFlight, descRetrying, descDead, descOldest, descDeliveries, descPublished, descSettled, descMembers, descPaused,
		descLapsed, descKnown,
		descStreamMessages, descStreamBytes, descStreamDelayed, descStreamHeld, descStreamPublished, descStreamSegments} {
		ch <- d
	}
}

// Collect is prometheus.Collector's. It serves the last readings and asks no database.
func (p *Poller) Collect(ch chan<- prometheus.Metric) {
	groups, streams := p.All()
	for f, v := range streams {
		for d, value := range map[*prometheus.Desc]float64{
			descStreamMessages: float64(v.Messages), descStreamBytes: float64(v.Bytes), descStreamDelayed: float64(v.Delayed), descStreamHeld: v.HeldFor.Seconds(),
			descStreamPublished: v.PublishedPerSecond, descStreamSegments: v.SegmentsUsed,
		} {
			ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, f.Namespace, f.Name)
		}
	}
	for f, v := range groups {
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
		gauge(descQueued, float64(v.Queued))
		gauge(descInFlight, float64(v.InFlight))
		gauge(descRetrying, float64(v.Retrying))
		gauge(descDead, float64(v.DeadLetters))
		gauge(descOldest, age)
		gauge(descDeliveries, float64(v.Deliveries))
		if v.Rates != nil {
			gauge(descPublished, v.Rates.Published)
			gauge(descSettled, v.Rates.Settled)
		}
		gauge(descMembers, float64(v.Members))
		gauge(descPaused, oneIf(v.Paused))
		gauge(descLapsed, oneIf(v.Lapsed != ""))
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
