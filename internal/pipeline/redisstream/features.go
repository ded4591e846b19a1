package redisstream

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/redis/rueidis"
)

// Version is a server's version, such as 7.0.15. What a server can do is decided by it and never by the text of errors.
type Version struct{ Major, Minor, Patch int }

var (
	minVersion = Version{Major: 6, Minor: 2} // has XAUTOCLAIM
	hasCounts  = Version{Major: 7}           // counts the entries ever added, and remembers what was deleted
	hasClaim   = Version{Major: 8, Minor: 4} // has XREADGROUP … CLAIM
	hasNack    = Version{Major: 8, Minor: 8} // has XNACK
)

// AtLeast compares versions.
func (v Version) AtLeast(o Version) bool {
	if v.Major != o.Major {
		return v.Major > o.Major
	}
	if v.Minor != o.Minor {
		return v.Minor > o.Minor
	}
	return v.Patch >= o.Patch
}

// String writes the version with dots.
func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// serverInfo reads a server's version and mode from INFO.
func serverInfo(ctx context.Context, client rueidis.Client) (v Version, mode string, err error) {
	ctx, cancel := call(ctx)
	defer cancel()
	info, err := client.Do(ctx, client.B().Info().Section("server").Build()).ToString()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "NOPERM") {
		return minVersion, "", nil
	}
	if err != nil {
		return Version{}, "", err
	}
	if mode = infoValue(info, "redis_mode"); mode == "" {
		mode = infoValue(info, "server_mode") // Valkey
	}
	return parseVersion(info), mode, nil
}

// infoValue finds one line of INFO.
func infoValue(info, name string) string {
	for line := range strings.Lines(info) {
		if text, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(text)
		}
	}
	return ""
}

// parseVersion reads the version of Redis that the server is compatible with. Valkey says 7.2.4 there, whatever its own
// version is, so none of the commands is used that later versions of Redis have added to streams.
func parseVersion(info string) Version {
	text := infoValue(info, "redis_version")
	if text == "" {
		return minVersion
	}
	var v Version
	for i, part := range strings.SplitN(text, ".", 3) {
		n, _ := strconv.Atoi(part)
		*[]*int{&v.Major, &v.Minor, &v.Patch}[i] = n
	}
	return v
}
