package engine

import "fmt"

// tally is the numbers of the messages that one consumer has received, in the order of receiving.
type tally struct {
	numbers []int
}

func (t *tally) add(payloads [][]byte) error {
	for _, p := range payloads {
		n, err := number(p)
		if err != nil {
			return err
		}
		t.numbers = append(t.numbers, n)
	}
	return nil
}

// check tells whether the consumers have received the n messages numbered from first, each of them once.
func check(first, n int, tallies []*tally) error {
	seen := make([]bool, n)
	received, twice, strange := 0, 0, 0
	for _, t := range tallies {
		for _, number := range t.numbers {
			received++
			switch i := number - first; {
			case i < 0 || i >= n:
				strange++
			case seen[i]:
				twice++
			default:
				seen[i] = true
			}
		}
	}
	missing, example := 0, 0
	for i := n - 1; i >= 0; i-- {
		if !seen[i] {
			missing++
			example = first + i
		}
	}
	if missing+twice+strange == 0 {
		return nil
	}
	return fmt.Errorf("published %d messages and received %d: %d missing (the first: number %d), %d more than once, %d from elsewhere",
		n, received, missing, example, twice, strange)
}
