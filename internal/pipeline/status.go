package pipeline

// Status is what a pipeline is doing at one moment, for people.
type Status struct {
	Readers                         []string // what it reads from
	InFlight, MaxInFlight           int      // entries
	InFlightBytes, MaxInFlightBytes int
	Writers                         []int // batches that wait, by writer
	Settling                        int   // batches that wait to be settled
	BreakerOpen                     bool
}

// Status looks at the pipeline. It disturbs nothing.
func (p *Pipeline) Status() Status {
	s := Status{MaxInFlight: p.permits.maxEntries, MaxInFlightBytes: p.permits.maxBytes, Settling: len(p.settled) + len(p.refused), BreakerOpen: p.breaker.isOpen()}
	s.InFlight, s.InFlightBytes = p.permits.inFlight()
	for _, r := range p.source.Readers() {
		s.Readers = append(s.Readers, r.Name())
	}
	for _, w := range p.writers {
		s.Writers = append(s.Writers, len(w))
	}
	return s
}
