package scenario

import (
	"maps"
	"slices"
	"sync"
)

// Produced is what producers have put in. It grows while they run; all methods may be called at the same time.
type Produced struct {
	mu          sync.Mutex
	valid       map[string]sent     // by id of the row
	undecodable map[string]struct{} // Redis ids of entries that cannot become rows
	rolledBack  map[string]struct{} // ids that never happened
	entries     int
	rollbacks   int
}

// sent is what is known about one valid id.
type sent struct {
	times   int
	content string // of a column beside the key, as PostgreSQL prints it
}

// NewProduced returns an empty Produced.
func NewProduced() *Produced {
	return &Produced{valid: map[string]sent{}, undecodable: map[string]struct{}{}, rolledBack: map[string]struct{}{}}
}

// Rows is the number of rows that have to arrive.
func (p *Produced) Rows() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.valid)
}

// Entries is the number of entries or messages that were put in, with repeats and undecodable ones.
func (p *Produced) Entries() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.entries
}

// Undecodable is the number of entries that cannot become rows.
func (p *Produced) Undecodable() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.undecodable)
}

func (p *Produced) addValid(id, content string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entries++
	p.valid[id] = sent{times: p.valid[id].times + 1, content: content}
}

func (p *Produced) addUndecodable(entry string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.entries++
	p.undecodable[entry] = struct{}{}
}

func (p *Produced) addRolledBack(ids []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rollbacks++
	for _, id := range ids {
		p.rolledBack[id] = struct{}{}
	}
}

// snapshot is a Produced that does not grow.
func (p *Produced) snapshot() *Produced {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &Produced{
		valid: maps.Clone(p.valid), undecodable: maps.Clone(p.undecodable), rolledBack: maps.Clone(p.rolledBack),
		entries: p.entries, rollbacks: p.rollbacks,
	}
}

func sorted(ids map[string]struct{}) []string { return slices.Sorted(maps.Keys(ids)) }
