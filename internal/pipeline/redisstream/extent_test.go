package redisstream

import "testing"

// What a stream shows of itself against what is remembered of it: an entry 7-50 among 50.
func TestSight_Continues(t *testing.T) {
	t.Parallel()
	const digest = 4711
	past := Extent{Top: "7-50", Added: 50, Mark: Mark{ID: "7-50", Digest: digest}}
	early := Extent{Top: "7-50", Added: -1, Mark: past.Mark} // of Redis 6.2
	is := map[string]int64{"7-50": digest}
	isnt := map[string]int64{"7-50": digest + 1}
	for name, c := range map[string]struct {
		now  Sight
		past Extent
		want bool
	}{
		"the same":                       {Sight{Extent: Extent{Top: "7-50", Added: 50}, Length: 50, First: "7-1", Deleted: "0-0", Entries: is}, past, true},
		"more entries":                   {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 60, First: "7-1", Deleted: "0-0", Entries: is}, past, true},
		"another content":                {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 60, First: "7-1", Deleted: "0-0", Entries: isnt}, past, false},
		"a smaller top":                  {Sight{Extent: Extent{Top: "7-49", Added: 60}, Length: 60, First: "7-1", Deleted: "7-50"}, past, false},
		"fewer added":                    {Sight{Extent: Extent{Top: "8-1", Added: 49}, Length: 49, First: "8-1", Deleted: "0-0"}, past, false},
		"no stream":                      {Sight{Extent: Extent{Top: "0-0", Added: -1}}, past, false},
		"trimmed further":                {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 1, First: "8-1", Deleted: "0-0"}, past, true},
		"trimmed to nothing":             {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 0, First: "0-0", Deleted: "0-0"}, past, true},
		"deleted":                        {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 20, First: "7-1", Deleted: "7-50"}, past, true},
		"deleted with later ones":        {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 20, First: "7-1", Deleted: "8-0"}, past, true},
		"gone, and only others deleted":  {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 20, First: "7-1", Deleted: "7-49"}, past, false},
		"gone, and nothing deleted":      {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 20, First: "7-1", Deleted: "0-0"}, past, false},
		"6.2: the same":                  {Sight{Extent: Extent{Top: "8-1", Added: -1}, Length: 60, Entries: is}, early, true},
		"6.2: another content":           {Sight{Extent: Extent{Top: "8-1", Added: -1}, Length: 60, Entries: isnt}, early, false},
		"6.2: a smaller top":             {Sight{Extent: Extent{Top: "7-49", Added: -1}, Length: 49}, early, false},
		"6.2: gone, nobody knows why":    {Sight{Extent: Extent{Top: "8-1", Added: -1}, Length: 20}, early, true},
		"7 has loaded it from 6.2: gone": {Sight{Extent: Extent{Top: "8-1", Added: 20}, Length: 20, First: "7-1", Deleted: "0-0"}, early, true},
		"nothing is remembered":          {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 60, First: "7-1", Deleted: "0-0"}, Extent{Top: "0-0", Added: -1}, true},
		"no mark is remembered":          {Sight{Extent: Extent{Top: "8-1", Added: 60}, Length: 60, First: "7-1", Deleted: "0-0"}, Extent{Top: "7-50", Added: 50}, true},
	} {
		if got := c.now.Continues(c.past); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
