package report

import (
	"bufio"
	"fmt"
	"math"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// Machine describes this machine in words, without its name: "2 cores, Intel Xeon Gold 6338, 24 GiB".
func Machine() string {
	words := []string{fmt.Sprintf("%d cores", runtime.NumCPU())}
	if model := procField("/proc/cpuinfo", "model name"); model != "" {
		words = append(words, strings.Join(strings.Fields(strings.NewReplacer("(R)", "", "(TM)", "", "(tm)", "").Replace(model)), " "))
	} else {
		words = append(words, runtime.GOARCH)
	}
	// The kernel keeps a part for itself, so the total is a little less than what was bought.
	if kib, err := strconv.ParseFloat(strings.TrimSuffix(procField("/proc/meminfo", "MemTotal"), " kB"), 64); err == nil {
		words = append(words, fmt.Sprintf("%.0f GiB", math.Ceil(kib/(1<<20))))
	}
	return strings.Join(words, ", ")
}

// procField is the first value of a name in a file of "name: value" lines, or nothing where there is no such file.
func procField(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if key, value, found := strings.Cut(lines.Text(), ":"); found && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}
