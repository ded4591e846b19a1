package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/millrace-dev/millrace/test/scenario"
)

// The times between two looks: every second on a terminal, rarely enough to read in a log.
const (
	terminalInterval = time.Second
	logInterval      = 5 * time.Second
)

// watch shows the demo until the producing context ends. Looks are taken under the other one, so that the last is whole.
func watch(producing, looking context.Context, set settings, ns *scenario.Namespace, l load) error {
	m, err := openMeters(looking, ns)
	if err != nil {
		return err
	}
	defer m.close(looking)

	interval, show := logInterval, showLine
	if term.IsTerminal(int(os.Stdout.Fd())) {
		interval, show = terminalInterval, newScreen(os.Stdout).show
	}
	began := time.Now()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	previous, previousAt := reading{}, began
	for {
		select {
		case <-producing.Done():
			return nil
		case <-tick.C:
		}
		now, err := m.read(looking)
		if err != nil {
			return fmt.Errorf("look at the rows: %w", err)
		}
		seen, err := observe(looking, ns)
		if err != nil {
			return err
		}
		at := time.Now()
		show(frame{
			at: at.Sub(began), set: set, seen: seen, produced: l,
			positions: now.positions, positionRate: rate(previous.positions, now.positions, at.Sub(previousAt)),
			orders: now.orders, orderRate: rate(previous.orders, now.orders, at.Sub(previousAt)),
		})
		previous, previousAt = now, at
	}
}

func rate(before, after flow, elapsed time.Duration) int64 {
	return int64(float64(after.rows-before.rows) / elapsed.Seconds())
}

// frame is what is shown at one moment.
type frame struct {
	at                      time.Duration
	set                     settings
	produced                load
	positions, orders       flow
	positionRate, orderRate int64
	seen                    *observation
}

// showLine is the form for logs.
func showLine(f frame) {
	ready := 0
	for _, r := range f.seen.resources {
		if r.ready() {
			ready++
		}
	}
	line := func(what string, f flow, rate int64) string {
		return fmt.Sprintf("%s %7s rows %6s/s lag %4s pending %4s", what, thousands(f.rows), thousands(rate), thousands(f.lag), thousands(f.pending))
	}
	fmt.Printf("%s  %s   %s   %d of %d Ready, %d pods\n", clock(f.at),
		line("positions", f.positions, f.positionRate), line("orders", f.orders, f.orderRate), ready, len(f.seen.resources), len(f.seen.pods))
}

// text is the form for terminals.
func (f frame) text() string {
	until := "Ctrl-C ends it"
	if !f.set.hold {
		until = "of " + clock(f.set.length) + "; Ctrl-C ends it earlier"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "Millrace  %s %s\n\n", clock(f.at), until)
	const row = "%-36s %10s %10s %8s %8s %8s\n"
	line := func(what string, produced int, f flow, rate int64) {
		fmt.Fprintf(&b, row, what, thousands(int64(produced)), thousands(f.rows), thousands(rate), thousands(f.lag), thousands(f.pending))
	}
	fmt.Fprintf(&b, row, "FROM -> TO", "PRODUCED", "ROWS", "ROWS/S", "LAG", "PENDING")
	line("Redis telemetry:t -> table positions", f.produced.positions.Entries(), f.positions, f.positionRate)
	line("Stream orders -> table orders", f.produced.orders.Rows(), f.orders, f.orderRate)
	fmt.Fprintf(&b, "\n%s\n%s", f.seen.resourceTable(), f.seen.podTable())
	return b.String()
}

// screen draws each frame over the last one.
type screen struct {
	out   io.Writer
	size  func() (width, height int)
	lines int // of the last frame
}

func newScreen(out *os.File) *screen {
	return &screen{out: out, size: func() (int, int) {
		width, height, err := term.GetSize(int(out.Fd()))
		if err != nil {
			return 80, 24
		}
		return width, height
	}}
}

func (s *screen) show(f frame) { s.draw(f.text()) }

// draw replaces the last frame. What does not fit is cut off: a wrapped or scrolled line could not be drawn over.
func (s *screen) draw(text string) {
	width, height := s.size()
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) > height-1 {
		lines = lines[:max(0, height-1)]
	}
	var b strings.Builder
	if s.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", s.lines)
	}
	for _, line := range lines {
		if runes := []rune(line); len(runes) > width {
			line = string(runes[:width])
		}
		b.WriteString("\r" + line + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	s.lines = len(lines)
	_, _ = io.WriteString(s.out, b.String())
}

// clock writes 75 seconds as 01:15.
func clock(d time.Duration) string {
	seconds := int(d.Round(time.Second).Seconds())
	return fmt.Sprintf("%02d:%02d", seconds/60, seconds%60)
}

// thousands writes 12345 as 12,345.
func thousands(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
