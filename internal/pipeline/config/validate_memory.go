package config

import "time"

// maxKeepCompleted is what the engine takes, and more than a Duration can be a multiple of.
const maxKeepCompleted = Duration(100 * 365 * 24 * time.Hour)

func (c *Config) validateMemory(ps *Problems) {
	m := c.Memory
	if m == nil {
		return
	}
	if !engineName.MatchString(m.Name) {
		ps.add("memory.name", "%q is not a name; write a lower-case letter followed by up to 47 letters, digits or underscores", m.Name)
	}
	switch {
	case c.Source.ConsumerGroup == nil:
		ps.add("memory", "belongs to a consumer group, whose ack is in the transaction that writes a state; leave it out, or read from a consumer group")
	case c.Sink.SQL == nil && c.Sink.HTTP == nil:
		ps.add("memory", "belongs to a sql or http sink; leave it out")
	case c.Sink.HTTP != nil && c.Sink.HTTP.Mode == HTTPBatch:
		ps.add("sink.http.mode", "with a memory each event has a request of its own; write Single")
	case c.Sink.SQL != nil && m.Subject != "":
		ps.add("memory.subject", "a statement names its subjects itself, by mapped columns; leave it out")
	}
	if m.Subject != "" {
		c.validateExpression(ps, "memory.subject", m.Subject, asText)
	}
	oneOf(ps, "memory.create", m.Create, CreateNever, CreateIfMissing)
	if m.Create == CreateNever {
		if m.Table != "" {
			ps.add("memory.table", "belongs to create: IfMissing; leave it out")
		}
		if m.KeepCompleted != 0 {
			ps.add("memory.keepCompleted", "belongs to create: IfMissing; leave it out, or set it with millrace.create_memory")
		}
	}
	if m.KeepCompleted != 0 {
		between(ps, "memory.keepCompleted", m.KeepCompleted, Duration(time.Second), maxKeepCompleted)
	}
}
