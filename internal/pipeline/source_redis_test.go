package pipeline_test

import (
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// Upkeep that keeps failing while entries are read and written, such as a trim without the right to it, is not silent.
func TestRedisUpkeepThatIsRefusedIsReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	user := "untrimming-" + strings.ToLower(w.stream[len(w.stream)-8:])
	w.do(w.redis.B().Arbitrary("ACL", "SETUSER").Args(user, "on", ">secret", "~*", "&*", "+@all", "-xtrim").Build())
	t.Cleanup(func() { w.do(w.redis.B().Arbitrary("ACL", "DELUSER").Args(user).Build()) })
	w.add(position(1, 1))
	p := w.start("one", w.configText("reclaimAfter: 1s", "reclaimAfter: 1s, afterAck: Trim"),
		config.EnvRedisURL+"="+strings.Replace(w.redisURL, "redis://", "redis://"+user+":secret@", 1))
	p.ready()
	eventually(t, func() (bool, string) {
		for _, l := range p.messages() {
			if l["level"] == "WARN" && strings.HasPrefix(l.msg(), "upkeep of the Redis source failed") {
				return true, ""
			}
		}
		return false, p.tail(1000)
	})
	becomes(t, "rows", 1, func() int { return w.count("select count(*) from positions") })
}
