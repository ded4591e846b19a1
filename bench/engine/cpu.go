package engine

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of /proc/<pid>/stat: Linux reports hundredths to programs on every architecture.
const ticksPerSecond = 100

// watchCPU measures how many processors the server keeps busy in each of so many parts of time, from now on. The function that it
// returns waits for the end; it returns nothing when the server's processes are not visible from here.
func (b *bed) watchCPU(ctx context.Context, part time.Duration, parts int) func() ([]float64, error) {
	if b.postmaster == 0 {
		return func() ([]float64, error) { return nil, nil }
	}
	type outcome struct {
		cores []float64
		err   error
	}
	done := make(chan outcome, 1)
	go func() {
		var o outcome
		defer func() { done <- o }()
		before, err := serverTicks(b.postmaster)
		start := time.Now()
		for i := 1; i <= parts && err == nil; i++ {
			if err = sleep(ctx, time.Until(start.Add(time.Duration(i)*part))); err != nil {
				break
			}
			var now int64
			now, err = serverTicks(b.postmaster)
			o.cores = append(o.cores, float64(now-before)/ticksPerSecond/part.Seconds())
			before = now
		}
		o.err = err
	}()
	return func() ([]float64, error) {
		o := <-done
		return o.cores, o.err
	}
}

// ticks is the processor time that the server has used so far, zero when its processes are not visible from here.
func (b *bed) ticks() (int64, error) {
	if b.postmaster == 0 {
		return 0, nil
	}
	return serverTicks(b.postmaster)
}

// serverTicks is the processor time of the postmaster, of its children, and of those children that have ended.
func serverTicks(postmaster int) (int64, error) {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	var sum int64
	found := false
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		pid, parent, own, ended, err := parseStat(string(text))
		switch {
		case err != nil:
			return 0, fmt.Errorf("read %s: %w", path, err)
		case pid == postmaster:
			found = true
			sum += own + ended
		case parent == postmaster:
			sum += own
		}
	}
	if !found {
		return 0, fmt.Errorf("process %d, the server, has ended", postmaster)
	}
	return sum, nil
}

// parseStat reads a line of /proc/<pid>/stat: own time, and that of children that have ended, in ticks.
func parseStat(line string) (pid, parent int, own, ended int64, err error) {
	// The command's name is in parentheses and may hold anything.
	open, end := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 1 || end < open {
		return 0, 0, 0, 0, fmt.Errorf("no process: %q", line)
	}
	fields := strings.Fields(line[end+1:]) // from the third field on: state, parent, …
	if len(fields) < 15 {
		return 0, 0, 0, 0, fmt.Errorf("no process: %q", line)
	}
	var numbers [6]int64
	for i, field := range []string{strings.TrimSpace(line[:open]), fields[1], fields[11], fields[12], fields[13], fields[14]} {
		if numbers[i], err = strconv.ParseInt(field, 10, 64); err != nil {
			return 0, 0, 0, 0, err
		}
	}
	return int(numbers[0]), int(numbers[1]), numbers[2] + numbers[3], numbers[4] + numbers[5], nil
}
