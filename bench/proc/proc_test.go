package proc

import "testing"

func TestParseStat(t *testing.T) {
	pid, parent, own, ended, err := parseStat("4711 (postgres: a (b) c) S 42 4711 4711 0 -1 4194560 100 200 0 0 30 12 7 5 20 0 1 0 99 1 2 3")
	if err != nil || pid != 4711 || parent != 42 || own != 42 || ended != 12 {
		t.Errorf("got pid %d, parent %d, own %d, ended %d, %v", pid, parent, own, ended, err)
	}
	for _, line := range []string{"", "1 (", "1 (x) S 2", "x (y) S 42 1 1 0 -1 1 1 2 0 0 30 12 7 5 20 0"} {
		if _, _, _, _, err := parseStat(line); err == nil {
			t.Errorf("no error for %q", line)
		}
	}
}
