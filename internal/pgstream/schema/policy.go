package schema

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Policy says what Apply may do to a database whose schema is not this binary's.
type Policy string

// Policies.
const (
	CreateOrUpdate Policy = "create-or-update" // make it, or bring it to this binary's version
	Create         Policy = "create"           // make it where there is none, and leave any other as it is
	None           Policy = "none"             // only look
	Recreate       Policy = "recreate"         // drop everything, with all messages, and make it anew
)

// ParsePolicy reads the name of a policy that loses nothing, as flags and settings have it.
func ParsePolicy(name string) (Policy, error) {
	switch p := Policy(name); p {
	case CreateOrUpdate, Create, None:
		return p, nil
	}
	return "", fmt.Errorf("there is no migration policy %q: write %s, %s or %s", name, CreateOrUpdate, Create, None)
}

// ErrGuarded means that Apply with Recreate was not allowed to drop anything, and the message says why.
var ErrGuarded = errors.New("nothing was dropped")

// State is how the schema of a database compares with this binary's.
type State struct {
	Version int      // of the database; 0: it has no Millrace schema
	Missing []string // the names of the migrations that it lacks, in order
	// Functions is true when the database has all migrations, and functions or grants of another build.
	Functions bool

	role string
}

// Current says whether there is nothing to do.
func (s State) Current() bool { return s.Version == Version() && !s.Functions }

func (s State) String() string {
	switch {
	case s.Version == 0:
		return fmt.Sprintf("there is no Millrace schema; this program's has version %d", Version())
	case s.Version > Version():
		return fmt.Sprintf("the schema has version %d, which is newer than this program's %d", s.Version, Version())
	case s.Version < Version():
		return fmt.Sprintf("the schema has version %d, and lacks %s of version %d", s.Version, strings.Join(s.Missing, ", "), Version())
	case s.Functions:
		return fmt.Sprintf("the schema has version %d, and functions or grants that are not this program's", s.Version)
	}
	return fmt.Sprintf("the schema has version %d", s.Version)
}

// Compare looks at the schema of a database and changes nothing.
func Compare(ctx context.Context, db queryer, opts Options) (State, error) {
	current, err := version(ctx, db)
	if err != nil {
		return State{}, fmt.Errorf("read the schema version: %w", err)
	}
	s := State{Version: current, Missing: missing(current), role: opts.RuntimeRole}
	if current == 0 {
		return s, nil
	}
	if s.role, err = runtimeRole(ctx, db, opts); err != nil {
		return s, fmt.Errorf("read the runtime role: %w", err)
	}
	if current == Version() {
		same, err := upToDate(ctx, db, opts)
		if err != nil {
			return s, fmt.Errorf("compare the functions: %w", err)
		}
		s.Functions = !same
	}
	return s, nil
}

// StateOf is the state of a database of some version, for whoever has none at hand.
func StateOf(version int, opts Options) (State, error) {
	if version < 0 || version > Version() {
		return State{}, fmt.Errorf("there is no version %d: this program knows those up to %d", version, Version())
	}
	return State{Version: version, Missing: missing(version), Functions: version == Version(), role: opts.RuntimeRole}, nil
}

// Anew is the state of the same database after its schema was dropped.
func (s State) Anew() State { return State{Missing: missing(0), role: s.role} }

// missing lists the migrations above a version.
func missing(current int) []string {
	var names []string
	for _, m := range migrations() {
		if m.version > current {
			names = append(names, m.name)
		}
	}
	return names
}

// SQL returns what Migrate would run on such a database, for review or for those who apply it by other means. Run it in one transaction.
func (s State) SQL() string {
	if s.Version > Version() || s.Current() {
		return ""
	}
	var b strings.Builder
	if s.Version == 0 {
		b.WriteString(bootstrap)
	}
	for _, m := range migrations() {
		if m.version > s.Version {
			fmt.Fprintf(&b, "\n%s\ninsert into millrace_engine.schema_version (version) values (%d);\n", m.sql, m.version)
		}
	}
	for _, f := range functions() {
		b.WriteString("\n" + f)
	}
	b.WriteString("\n" + listTemplates + ";\n\n" + installRings + ";\n")
	if s.role != "" {
		b.WriteString("\n" + strings.Join(grants(s.role), ";\n") + ";\n")
		fmt.Fprintf(&b, "insert into millrace_engine.setting (name, value) values ('runtime_role', %s)\n    on conflict (name) do update set value = excluded.value;\n",
			"'"+strings.ReplaceAll(s.role, "'", "''")+"'")
	}
	if s.Version > 0 {
		b.WriteString("\n" + copyTemplates + ";\n")
	}
	fmt.Fprintf(&b, "\nupdate millrace_engine.schema_version set functions = '%s' where version = %d;\n", installed(s.role), Version())
	return b.String()
}

// Apply brings a database as near to this binary's version as the policy lets it. It returns how the database was before, and the versions that it applied.
// It returns ErrNewer, and changes nothing, when the database is newer than the binary. Whether what a policy left alone will do is for Check to say.
//
// Recreate drops the schemas millrace and millrace_engine with every message, and whatever of other schemas depends on them. confirm has to be the name of
// the database, and no stream may belong to a Kubernetes resource; ErrGuarded otherwise. It keeps the runtime role. The other policies do not look at confirm.
func Apply(ctx context.Context, conn *pgx.Conn, policy Policy, confirm string, opts Options) (before State, applied []int, err error) {
	before, err = Compare(ctx, conn, opts)
	switch {
	case err != nil:
		return before, nil, err
	case before.Version > Version():
		return before, nil, newer(before.Version)
	case policy == None, policy == Create && before.Version > 0:
		return before, nil, nil
	case policy == Recreate:
		applied, err = recreate(ctx, conn, confirm, before.role)
	default:
		applied, err = Migrate(ctx, conn, opts)
	}
	return before, applied, err
}

// Report says what Apply has done, in a sentence.
func Report(before State, policy Policy) string {
	switch {
	case policy == Recreate:
		return fmt.Sprintf("everything was dropped, and the schema has version %d now", Version())
	case before.Current():
		return fmt.Sprintf("the schema has version %d already", before.Version)
	case policy == None:
		return before.String()
	case policy == Create && before.Version > 0:
		return before.String() + "; it is left as it is"
	}
	return fmt.Sprintf("the schema has version %d now", Version())
}

// recreate drops and migrates in one transaction, so that whatever goes wrong leaves everything as it was.
func recreate(ctx context.Context, conn *pgx.Conn, confirm, role string) (applied []int, err error) {
	err = locked(ctx, conn, func(tx pgx.Tx) error {
		var database string
		if err := tx.QueryRow(ctx, "select current_database()").Scan(&database); err != nil {
			return err
		}
		if confirm != database {
			return fmt.Errorf("%w: this would remove every stream with its messages. Confirm it with the name of the database, which is %q", ErrGuarded, database)
		}
		current, err := version(ctx, tx)
		if err != nil {
			return err
		}
		if current > 0 {
			var owned string
			err := tx.QueryRow(ctx, "select coalesce(string_agg(s.name, ', ' order by s.name), '') from millrace_engine.stream s where s.owner is not null").Scan(&owned)
			if err != nil {
				return err
			}
			if owned != "" {
				return fmt.Errorf("%w: Kubernetes resources own these streams: %s. Delete the resources first", ErrGuarded, owned)
			}
		}
		for _, schema := range []string{"millrace", "millrace_engine"} {
			if _, err := tx.Exec(ctx, "drop schema if exists "+schema+" cascade"); err != nil {
				return fmt.Errorf("drop the schema %s: %w", schema, err)
			}
		}
		applied, err = install(ctx, tx, 0, Options{RuntimeRole: role})
		return err
	})
	return applied, err
}
