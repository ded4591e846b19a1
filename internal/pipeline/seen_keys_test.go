package pipeline

import (
	"math/rand/v2"
	"testing"
)

// A seen key is never taken for a new one, until a whole generation has come after it; a new one rarely for a seen one.
func TestSeenKeys(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	s := newSeenKeys()
	const n = seenGeneration
	hashes := make([]uint64, n)
	mistaken := 0
	for i := range hashes {
		hashes[i] = random.Uint64()
		if s.add(hashes[i]) {
			mistaken++
		}
	}
	if mistaken > n/50 {
		t.Errorf("%d of %d new keys were taken for seen ones", mistaken, n)
	}
	for _, h := range hashes {
		if !s.add(h) {
			t.Fatal("a seen key was taken for a new one")
		}
	}
	for range 2 * n {
		s.add(random.Uint64())
	}
	if s.count >= seenGeneration {
		t.Errorf("the younger generation has %d keys", s.count)
	}
	remembered := 0
	for _, h := range hashes[:1000] {
		if s.add(h) {
			remembered++
		}
	}
	if remembered > 200 {
		t.Errorf("%d of 1000 keys are still remembered after two generations", remembered)
	}
}
