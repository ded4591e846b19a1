package cli

import (
	"fmt"
	"io"
	"time"
)

// How often progress is told: in place on a terminal, in lines of their own elsewhere.
const (
	progressInPlace = 100 * time.Millisecond
	progressInLines = 5 * time.Second
)

// progress tells on standard error how far long work is.
type progress struct {
	w        io.Writer
	terminal bool
	told     time.Time
	shown    bool
}

func (a *app) progress() *progress {
	_, is := terminal(a.Err)
	return &progress{w: a.Err, terminal: is, told: time.Now()}
}

// tell says how far the work is, if it was not said a moment ago.
func (p *progress) tell(format string, args ...any) {
	pause := progressInLines
	if p.terminal {
		pause = progressInPlace
	}
	if time.Since(p.told) < pause {
		return
	}
	p.told = time.Now()
	if p.terminal {
		p.shown = true
		fmt.Fprintf(p.w, "\r\x1b[K"+format, args...)
		return
	}
	fmt.Fprintf(p.w, format+"\n", args...)
}

// clear takes the line away before something else is printed.
func (p *progress) clear() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
