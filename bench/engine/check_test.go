package engine

import (
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		received [][]int
		want     string // part of the error; nothing: passes
	}{
		"passes when each came once, whoever got it":   {[][]int{{10, 12}, {13, 11}}, ""},
		"notices a message that is missing":            {[][]int{{10, 11}, {13}}, "1 missing (the first: number 12)"},
		"notices a message that came to both":          {[][]int{{10, 11, 12}, {12, 13}}, "1 more than once"},
		"notices a message that came again":            {[][]int{{10, 11, 12, 13, 10}}, "1 more than once"},
		"is not fooled when one stands in for another": {[][]int{{10, 10, 12, 13}}, "1 missing (the first: number 11), 1 more than once"},
		"notices a message of the warm-up":             {[][]int{{10, 11, 12, 13, warmFirst}}, "1 from elsewhere"},
		"notices that nothing came":                    {nil, "4 missing"},
	} {
		t.Run(name, func(t *testing.T) {
			var tallies []*tally
			for _, numbers := range c.received {
				tallies = append(tallies, &tally{numbers: numbers})
			}
			err := check(10, 4, tallies)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("fails: %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("says %v, want something with %q", err, c.want)
			}
		})
	}
}
