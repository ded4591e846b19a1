// Package proc reads what Linux says of running processes.
package proc

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of /proc/<pid>/stat: Linux reports hundredths to programs on every architecture.
const ticksPerSecond = 100

// CPU returns the processor time that a process and its children have used, ended children included.
func CPU(process int) (time.Duration, error) {
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
		case pid == process || parent == process:
			sum += own + ended
			found = found || pid == process
		}
	}
	if !found {
		return 0, fmt.Errorf("process %d has ended", process)
	}
	return time.Duration(sum) * time.Second / ticksPerSecond, nil
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

// ResidentMiB is the memory that a process has at present.
func ResidentMiB(pid int) (float64, error) { return memory(pid, "VmRSS:") }

// PeakMiB is the most memory that a process has had.
func PeakMiB(pid int) (float64, error) { return memory(pid, "VmHWM:") }

func memory(pid int, name string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, name); found {
			kib, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("process %d has ended", pid)
}
