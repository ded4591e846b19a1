//go:build !linux

package process

import (
	"bufio"
	"bytes"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// Other systems have no death signal; there, a killed test leaves its servers running.
func setDeathSignal(*syscall.SysProcAttr, syscall.Signal) {}

// Children returns the ids of the direct children of a process.
func Children(parent int) ([]int, error) {
	list, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var children []int
	for lines := bufio.NewScanner(bytes.NewReader(list)); lines.Scan(); {
		var pid, ppid int
		if n, _ := fmt.Sscan(lines.Text(), &pid, &ppid); n == 2 && ppid == parent {
			children = append(children, pid)
		}
	}
	return children, nil
}

// Frozen tells whether the process does nothing more until it is continued: it has been stopped, or has ended. A signal says only that it will be.
func Frozen(pid int) bool {
	state, _ := exec.Command("ps", "-o", "state=", "-p", strconv.Itoa(pid)).Output() // an error when there is no such process
	text := strings.TrimSpace(string(state))
	return text == "" || text[0] == 'T' || text[0] == 'Z'
}

// gone tells whether the process has ended.
func gone(pid int) bool { return syscall.Kill(pid, 0) != nil }
