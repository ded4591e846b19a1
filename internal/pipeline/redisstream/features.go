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

// minVersion has XAUTOCLAIM.
var minVersion = Version{Major: 6, Minor: 2}

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

// Connect opens a client for a URL such as redis://user:password@host:6379/0 and checks the server. Its errors never
// hold the URL.
func Connect(ctx context.Context, url, name string) (rueidis.Client, Version, error) {
	opt, err := rueidis.ParseURL(strings.TrimSpace(url))
	if err != nil || len(opt.InitAddress) == 0 {
		// The parser's error repeats the URL, password included.
		return nil, Version{}, errURL
	}
	opt.ClientName = strings.Map(nameRune, name)
	opt.DisableCache = true
	opt.Dialer.Timeout = callTimeout
	// A processor reads on one connection per stream and sends few other commands, so that small buffers are enough.
	opt.PipelineMultiplex = -1
	opt.RingScaleEachConn = 8
	opt.ReadBufferEachConn = 256 << 10
	opt.WriteBufferEachConn = 64 << 10
	opt.ConnWriteTimeout = 2 * callTimeout
	client, err := rueidis.NewClient(opt)
	if err != nil {
		return nil, Version{}, fmt.Errorf("connect to Redis at %s: %w", strings.Join(opt.InitAddress, ", "), err)
	}
	version, err := serverVersion(ctx, client)
	if err == nil && !version.AtLeast(minVersion) {
		err = &tooOldError{version}
	}
	if err != nil {
		client.Close()
		return nil, Version{}, fmt.Errorf("connect to Redis at %s: %w", strings.Join(opt.InitAddress, ", "), err)
	}
	return client, version, nil
}

// serverVersion reads INFO. A server that refuses INFO is taken for the oldest supported one.
func serverVersion(ctx context.Context, client rueidis.Client) (Version, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	info, err := client.Do(ctx, client.B().Info().Section("server").Build()).ToString()
	if re, ok := rueidis.IsRedisErr(err); ok && hasPrefix(re.Error(), "NOPERM") {
		return minVersion, nil
	}
	if err != nil {
		return Version{}, err
	}
	return parseVersion(info), nil
}

func parseVersion(info string) Version {
	for line := range strings.Lines(info) {
		text, ok := strings.CutPrefix(strings.TrimSpace(line), "redis_version:")
		if !ok {
			continue
		}
		var v Version
		for i, part := range strings.SplitN(text, ".", 3) {
			n, _ := strconv.Atoi(part)
			*[]*int{&v.Major, &v.Minor, &v.Patch}[i] = n
		}
		return v
	}
	return minVersion
}

// nameRune replaces what CLIENT SETNAME refuses.
func nameRune(r rune) rune {
	if r <= ' ' || r > '~' {
		return '-'
	}
	return r
}
