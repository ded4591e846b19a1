package postgres

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace-dev/millrace/test/env/dirs"
)

// Majors are the versions that Millrace supports, the newest last.
var Majors = []int{15, 16, 17, 18}

// install is a set of server binaries.
type install struct {
	major int
	bin   string
	lib   string // libraries that the binaries need beside the system's; empty for the system's own
}

func (i install) env() []string {
	if i.lib == "" {
		return nil
	}
	return []string{"LD_LIBRARY_PATH=" + i.lib}
}

// findInstall looks where Debian and Ubuntu install, where make installs other versions, and what pg_config on the
// path tells.
func findInstall(major int) (install, error) {
	if major == 0 && os.Getenv("PG") != "" {
		n, err := strconv.Atoi(os.Getenv("PG"))
		if err != nil {
			return install{}, fmt.Errorf("PG=%q is not a major version; use one of %v", os.Getenv("PG"), Majors)
		}
		major = n
	}
	if major != 0 && !slices.Contains(Majors, major) {
		return install{}, fmt.Errorf("PostgreSQL %d is not supported; use one of %v", major, Majors)
	}
	for _, candidate := range slices.Backward(Majors) {
		if major != 0 && candidate != major {
			continue
		}
		for _, found := range candidates(candidate) {
			if isExecutable(filepath.Join(found.bin, "postgres")) && isExecutable(filepath.Join(found.bin, "initdb")) {
				return found, nil
			}
		}
	}
	if major == 0 {
		return install{}, fmt.Errorf("no PostgreSQL found; run: make deps  (on Debian and Ubuntu it installs the package postgresql)")
	}
	return install{}, fmt.Errorf("no PostgreSQL %d found; run: make postgres PG=%d  (or install the package postgresql-%d)", major, major, major)
}

func candidates(major int) []install {
	found := []install{{major: major, bin: fmt.Sprintf("/usr/lib/postgresql/%d/bin", major)}}
	if cached, err := dirs.Cache(fmt.Sprintf("postgres-%d", major)); err == nil {
		found = append(found, install{major: major, bin: filepath.Join(cached, "native", "bin"), lib: filepath.Join(cached, "native", "lib")})
	}
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		bin := strings.TrimSpace(string(out))
		if version, err := exec.Command(filepath.Join(bin, "postgres"), "--version").Output(); err == nil && majorOf(string(version)) == major {
			found = append(found, install{major: major, bin: bin})
		}
	}
	return found
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

// majorOf reads the output of postgres --version; zero when it says something else.
func majorOf(version string) int {
	match := versionPattern.FindStringSubmatch(version)
	if match == nil {
		return 0
	}
	n, _ := strconv.Atoi(match[1])
	return n
}

func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
