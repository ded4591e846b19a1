package tools

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// meter shows how far a build is: one line refreshed in place on a terminal, and a line now and then elsewhere.
type meter struct {
	out      io.Writer
	name     string
	terminal bool
	begin    time.Time
	quit     chan struct{}
	stopped  sync.WaitGroup

	mu    sync.Mutex
	verb  string
	done  int
	total int // zero: not known
}

// The times between two lines: on a terminal often enough to look alive, in a log rarely enough to read.
const (
	terminalInterval = 200 * time.Millisecond
	logInterval      = 20 * time.Second
)

func startMeter(out io.Writer, name string) *meter {
	m := &meter{out: out, name: name, begin: time.Now(), quit: make(chan struct{}), verb: "looking"}
	interval := logInterval
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		m.terminal, interval = true, terminalInterval
	}
	m.stopped.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				m.show()
			case <-m.quit:
				return
			}
		}
	})
	return m
}

// fetch runs go list, which downloads modules and names the packages that have to be compiled.
func (m *meter) fetch(cmd *exec.Cmd) error {
	m.phase("fetching modules", 0)
	stale := 0
	cmd.Stdout = &lineWriter{each: func(line string) {
		if line != "" {
			stale++
		}
	}}
	err := m.run(cmd, "go: downloading ")
	m.phase("compiling packages", stale)
	return err
}

// compile runs go build -v, which names each package when it is compiled.
func (m *meter) compile(cmd *exec.Cmd) error { return m.run(cmd, "") }

// run counts the lines with the prefix on standard error, and returns the others when the command fails.
func (m *meter) run(cmd *exec.Cmd, prefix string) error {
	var other []string
	cmd.Stderr = &lineWriter{each: func(line string) {
		if strings.HasPrefix(line, prefix) && !strings.Contains(strings.TrimPrefix(line, prefix), ": ") {
			m.mu.Lock()
			m.done++
			m.mu.Unlock()
			return
		}
		if other = append(other, line); len(other) > 40 {
			other = other[1:]
		}
	}}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args[:2], " "), err, strings.Join(other, "\n"))
	}
	return nil
}

func (m *meter) phase(verb string, total int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.verb, m.total, m.done = verb, total, 0
}

func (m *meter) show() {
	m.mu.Lock()
	defer m.mu.Unlock()
	count := ""
	switch {
	case m.total > 0 && m.done >= m.total:
		count = ", linking"
	case m.total > 0:
		count = fmt.Sprintf(" %d of %d", m.done, m.total)
	case m.done > 0:
		count = fmt.Sprintf(" %d", m.done)
	}
	m.line(fmt.Sprintf("building %s: %s%s, %s", m.name, m.verb, count, m.elapsed()))
}

// stop ends the meter with one line that stays.
func (m *meter) stop(err error) {
	close(m.quit)
	m.stopped.Wait()
	if err != nil {
		m.line(fmt.Sprintf("building %s failed after %s", m.name, m.elapsed()))
	} else {
		m.line(fmt.Sprintf("built %s in %s", m.name, m.elapsed()))
	}
	if m.terminal {
		fmt.Fprintln(m.out)
	}
}

func (m *meter) elapsed() time.Duration { return time.Since(m.begin).Round(time.Second) }

func (m *meter) line(text string) {
	if m.terminal {
		fmt.Fprintf(m.out, "\r\x1b[K%s", text)
	} else {
		fmt.Fprintln(m.out, text)
	}
}

// lineWriter hands on whole lines.
type lineWriter struct {
	each func(line string)
	rest string
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest += string(p)
	for {
		line, rest, whole := strings.Cut(w.rest, "\n")
		if !whole {
			return len(p), nil
		}
		w.each(line)
		w.rest = rest
	}
}
