package pipeline

import (
	"sort"
	"strings"
	"sync"
)

// Health is what the readiness endpoint shows: not ready while anything stands against it.
type Health struct {
	mu       sync.Mutex
	problems map[string]string // part of the pipeline to what is wrong with it
}

// NewHealth returns a Health that is not ready because it has not started.
func NewHealth() *Health {
	return &Health{problems: map[string]string{"start": "starting"}}
}

// Set records a problem of one part. It reports whether that is news.
func (h *Health) Set(part, problem string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, ok := h.problems[part]
	h.problems[part] = problem
	return !ok || old != problem
}

// Clear removes the problem of a part. It reports whether there was one.
func (h *Health) Clear(part string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.problems[part]
	delete(h.problems, part)
	return ok
}

// Ready reports whether nothing is wrong, and otherwise what is, one line per part.
func (h *Health) Ready() (bool, string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.problems) == 0 {
		return true, "ready"
	}
	lines := make([]string, 0, len(h.problems))
	for part, problem := range h.problems {
		lines = append(lines, part+": "+problem)
	}
	sort.Strings(lines)
	return false, strings.Join(lines, "\n")
}
