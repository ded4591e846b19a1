package process

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"syscall"
)

func setDeathSignal(a *syscall.SysProcAttr, s syscall.Signal) { a.Pdeathsig = s }

// Children returns the ids of the direct children of a process.
func Children(parent int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var children []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		// It may have ended meanwhile, and then there is no stat.
		if stat := stat(pid); len(stat) > 1 && stat[1] == strconv.Itoa(parent) {
			children = append(children, pid)
		}
	}
	return children, nil
}

// gone tells whether the process has ended. One that its parent has not asked about yet (a zombie) has ended: it holds
// no files, memory or ports.
func gone(pid int) bool {
	stat := stat(pid)
	return len(stat) == 0 || stat[0] == "Z"
}

// Frozen tells whether the process does nothing more until it is continued: it has been stopped, or has ended. A signal says only that it will be.
func Frozen(pid int) bool {
	stat := stat(pid)
	return len(stat) == 0 || stat[0] == "T" || stat[0] == "Z"
}

// stat returns the state, the parent and what follows them in /proc/<pid>/stat.
func stat(pid int) []string {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil
	}
	// The program's name stands in parentheses and may itself hold any character, so fields count from the last one.
	return strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
}
