package pipeline

import (
	"encoding/json"
	"testing"
)

func TestBacklog(t *testing.T) {
	for name, spread := range map[string]bool{"copies of what was near": false, "copies of anything": true} {
		t.Run(name, func(t *testing.T) {
			const n = 50_000
			b := NewBacklog(n, 0, spread)
			if len(b.Entries) != n || b.Distinct < n*94/100 || b.Distinct > n*96/100 {
				t.Fatalf("%d entries, %d distinct", len(b.Entries), b.Distinct)
			}
			var farthest, sum, bytes int64
			seen := map[int64]bool{}
			for i, e := range b.Entries {
				if !seen[e.Seq] {
					seen[e.Seq] = true
					sum += e.Seq
				}
				farthest = max(farthest, int64(i)-e.Seq)
				bytes += int64(len(e.JSON()))
			}
			if len(seen) != b.Distinct || sum != b.Sum {
				t.Errorf("%d distinct with the sum %d, said to be %d with %d", len(seen), sum, b.Distinct, b.Sum)
			}
			if spread != (farthest > 3*near) { // a copy of a copy may be farther than near
				t.Errorf("the farthest copy is %d entries away", farthest)
			}
			if mean := bytes / n; mean < normalBytes-10 || mean > normalBytes+10 {
				t.Errorf("a document has %d bytes", mean)
			}
		})
	}
	e := NewBacklog(1, 1000, false).Entries[0]
	if n := len(e.JSON()); !json.Valid([]byte(e.JSON())) || n < 950 || n > 1050 {
		t.Errorf("a document of a thousand bytes has %d", n)
	}
}
