package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progress says on the way how far the tests are: one line that is written anew on a terminal, a line now and then in a log.
type progress struct {
	w        io.Writer
	terminal bool

	mu           sync.Mutex
	total, ended int
	last         string
	failed       int
	began        time.Time
	stopped      chan struct{}
	wait         sync.WaitGroup
}

// How often a log gets a line, and a terminal its line anew.
const (
	logInterval      = 10 * time.Second
	terminalInterval = 200 * time.Millisecond
)

func (p *progress) start(tests []*test) {
	p.total, p.began, p.stopped = len(tests), time.Now(), make(chan struct{})
	interval := logInterval
	if p.terminal {
		interval = terminalInterval
	}
	p.wait.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-p.stopped:
				return
			case <-tick.C:
				p.show()
			}
		}
	})
}

func (p *progress) done(t *test) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended++
	p.last = t.name
	if t.result != passed {
		p.failed++
	}
}

func (p *progress) show() {
	p.mu.Lock()
	defer p.mu.Unlock()
	line := fmt.Sprintf("seeds: %d of %d tests after %d s", p.ended, p.total, int(time.Since(p.began).Seconds()))
	if p.failed > 0 {
		line += fmt.Sprintf(", %d failed", p.failed)
	}
	if p.last != "" {
		line += ", last " + p.last
	}
	if p.terminal {
		fmt.Fprintf(p.w, "\r\033[K%s", line)
		return
	}
	fmt.Fprintln(p.w, line)
}

func (p *progress) stop() {
	close(p.stopped)
	p.wait.Wait()
	if p.terminal {
		fmt.Fprint(p.w, "\r\033[K")
	}
}
