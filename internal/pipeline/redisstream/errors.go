package redisstream

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/redis/rueidis"
)

// IsConfiguration says whether an error is an answer of Redis that will not go away by itself: a person has to change the
// password, the permissions or the key's type.
func IsConfiguration(err error) bool {
	var re *rueidis.RedisError
	if !errors.As(err, &re) {
		return false
	}
	for _, code := range []string{"NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE", "unknown command", "AUTH "} {
		if hasPrefix(re.Error(), code) {
			return true
		}
	}
	return false
}

// hasPrefix looks at an error as the client writes it: without the ERR that Redis puts before errors that have no code.
func hasPrefix(text, prefix string) bool { return strings.HasPrefix(text, prefix) }

// tooOldError says that the server lacks what a Member needs.
type tooOldError struct{ version Version }

func (e *tooOldError) Error() string {
	return "Redis " + e.version.String() + " is too old; use " + minVersion.String() + " or later"
}

// IsUnusable says whether an error of Connect will not go away by trying again.
func IsUnusable(err error) bool {
	var old *tooOldError
	var bad *urlError
	return errors.As(err, &bad) || errors.As(err, &old) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || IsConfiguration(err)
}
