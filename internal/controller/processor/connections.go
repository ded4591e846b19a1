package processor

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/jackc/pgx/v5"
	"k8s.io/apimachinery/pkg/types"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// claim is what an autoscaled Processor may come to use of the connections of a server: pods that have just been asked for have not
// connected yet. There is one from the first time that pods were added.
type claim struct {
	server, application string
	connections         int64
}

// login is where a connection string of the pods leads, and as whom.
type login struct{ server, user string }

// loginOf reads a connection string that Check has accepted.
func loginOf(dsn string) login {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return login{}
	}
	return login{server: fmt.Sprintf("%s:%d", cfg.Host, cfg.Port), user: cfg.User}
}

// connections is how many connections one pod may open to the server of its source.
func (in *inputs) connections(p *v1alpha1.Processor) int64 {
	c := configOf(p, *in)
	c.Defaults()
	pool := int64(c.PoolConnections())
	source := in.logins[config.EnvSourceDatabaseURL]
	n := pool
	if listen, ok := in.logins[config.EnvSourceListenURL]; !ok || listen.server == source.server {
		n++ // for notifications
	}
	file := func(variable string) string {
		i := slices.IndexFunc(in.secrets, func(f secretFile) bool { return f.variable == variable })
		if i < 0 {
			return ""
		}
		return in.secrets[i].path()
	}
	// One connection string for both ends is one pool.
	if sink := file(config.EnvSinkDatabaseURL); sink != "" && sink != file(config.EnvSourceDatabaseURL) &&
		in.logins[config.EnvSinkDatabaseURL].server == source.server {
		n += pool
	}
	return n
}

// room is how many pods the server of the source has connections for, as it says itself: what it takes, less what others use or will use
// once the pods that other Processors have asked for are there, and less those of one pod more for a rolling update. Room that is not
// known is none.
func (r *Reconciler) room(ctx context.Context, sc *scope, replicas int32) limit {
	p, perPod := sc.processor, sc.inputs.connections(sc.processor)
	l := limit{replicas: replicas, reason: v1alpha1.ReasonConnections, soft: true}
	unknown := func(err error) limit {
		l.message = fmt.Sprintf("it is not known how many connections are free: %v", err)
		return l
	}
	stream, err := r.streamOf(ctx, sc.inputs.group)
	if err != nil {
		return unknown(err)
	}
	db, err := r.Databases.Resolve(ctx, stream.Namespace, stream.Spec.DatabaseSecretRef)
	if err != nil {
		return unknown(err)
	}
	use, err := db.Connections(ctx, sc.inputs.logins[config.EnvSourceDatabaseURL].user)
	if err != nil {
		return unknown(err)
	}
	c := claim{server: db.Server(), application: config.ApplicationName(p.Name), connections: int64(replicas) * perPod}
	free, bound := r.memory.free(p.UID, c, use)
	l.replicas = int32(min(max(free/perPod-1, 0), math.MaxInt32))
	l.message = fmt.Sprintf("%s has %d connections for all these pods, by %s; a pod may open %d, and a rolling update needs one pod more. "+
		"Raise that limit, or write maxConnections when a pooler stands between", db, free, bound, perPod)
	return l
}

// free is how many connections are left for the pods of one Processor, those that they have included, and which limit says so. c is what they
// have at most at present.
func (m *memory) free(uid types.UID, c claim, use database.Connections) (int64, string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var coming int64
	for other, o := range m.claims {
		if other != uid && o.server == c.server {
			coming += max(o.connections-use.By[o.application].Server, 0)
		}
	}
	if m.claims == nil {
		m.claims = map[types.UID]claim{}
	}
	m.claims[uid] = c
	own := use.By[c.application]
	free, bound := int64(math.MaxInt64), ""
	for _, l := range []struct {
		name           string
		max, used, own int64
	}{
		{"max_connections", use.Max.Server, use.Used.Server + coming, own.Server},
		{"the limit of the database", use.Max.Database, use.Used.Database, own.Database},
		{"the limit of the role", use.Max.Role, use.Used.Role, own.Role},
	} {
		// To the server, Processors of one name in several namespaces are one.
		if left := max(l.max-l.used+min(l.own, c.connections), 0); l.max >= 0 && left < free {
			free, bound = left, l.name
		}
	}
	return free, bound
}
