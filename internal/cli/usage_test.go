package cli_test

import (
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/millrace-dev/millrace/internal/pgstream/schema"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// The error is what is read: it stands above one line of usage, and is not scrolled away by a page of flags.
func TestWrongUsageShowsUsage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for args, want := range map[string]string{
		"tail --bogus":                 "error: unknown flag: --bogus\n\nUsage:\n  millrace tail STREAM [flags]\n\nmillrace tail --help has its flags and examples.\n",
		"tail":                         "error: STREAM is missing\n",
		"receive orders":               "error: GROUP is missing\n",
		"tail orders more":             "error: \"more\" is one argument too many\n",
		"bogus":                        "error: unknown command \"bogus\" for \"millrace\"\n",
		"lga":                          "error: unknown command \"lga\" for \"millrace\"\n\nDid you mean this?\n\tlag\n\nUsage:\n  millrace [command]\n\nmillrace --help has the commands.\n",
		"migrate":                      "error: a command is missing\n\nUsage:\n  millrace migrate [command]\n\nmillrace migrate --help has the commands.\n",
		"receive o g --delay 5":        "error: --delay \"5\" is no duration: write a number with a unit, as in 90s, 15m or 24h\n",
		"migrate bogus":                "error: there is no command \"bogus\"\n",
		"migrate run --policy force":   "error: there is no policy \"force\": write create-or-update, create, none or recreate\n",
		"lag -o yaml":                  "error: there is no output \"yaml\": write table, wide or json\n",
		"reset orders billing":         "error: --to is missing",
		"trim orders":                  "error: what to trim is missing",
		"receive o g --ack --nack":     "error: ",
		"publish o {} -H nothing":      "error: --header \"nothing\" is no header: write name=value\n",
		"migrate sql --from 1000":      "error: --from: there is no version 1000",
		"publish o {} --at tomorrow":   "error: --at \"tomorrow\" is no time",
		"publish o {} --skip 1":        "error: PAYLOAD is the message",
		"inspect orders billing extra": "error: \"extra\" is one argument too many\n",
	} {
		r := w.millrace(strings.Fields(args)...)
		if r.code != 2 || r.out != "" || !strings.HasPrefix(r.err, want) || !strings.Contains(r.err, "\nUsage:\n  millrace") {
			t.Errorf("millrace %s: exit code %d\n%s%s", args, r.code, r.out, r.err)
		}
	}
}

func TestWrongNamesAreAnsweredWithThoseThatExist(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.want(1, `error: stream "orders" does not exist. There are no streams. A Stream in Kubernetes makes one, or select millrace.create_stream(name)`, "tail", "orders")
	w.run("select millrace.create_stream('orders'), millrace.create_stream('shipments'), millrace.create_group('orders', 'billing')")
	w.want(1, `error: stream "oders" does not exist. Did you mean "orders"? There are these streams: orders, shipments`, "tail", "oders")
	w.want(1, `error: stream "customers" does not exist. There are these streams: orders, shipments`, "publish", "customers", "{}")
	w.want(1, `error: consumer group "biling" of stream "orders" does not exist. Did you mean "billing"? There are these groups: billing`, "reset", "orders", "biling", "--to", "latest")
	w.want(1, `error: consumer group "x" of stream "shipments" does not exist. There are no groups. A ConsumerGroup in Kubernetes makes one, or select millrace.create_group(stream, name)`,
		"inspect", "shipments", "x")
}

func TestConnectionErrorsNameTheServerAndNoPassword(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const secret = "s3cret-word"
	u, err := url.Parse(w.dsn)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(u.User.Username(), secret)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	elsewhere := *mustParse(t, w.dsn)
	elsewhere.Path = "/elsewhere"
	for database, want := range map[string]string{
		elsewhere.String(): `error: database "elsewhere" at … does not exist: create it, or name another`,
		"postgres://me:" + secret + "@/app?port=7&host=" + t.TempDir():                      `error: cannot reach database "app" at …: no server has a socket for port 7 there. For one elsewhere set MILLRACE_DATABASE_URL, or PGHOST`,
		"postgres://me:" + secret + "@127.0.0.1:1/app":                                      `error: cannot reach database "app" at 127.0.0.1:1: connection refused`,
		"postgres://me:" + secret + "@" + silent.Addr().String() + "/app?connect_timeout=1": `error: cannot reach database "app" at ` + silent.Addr().String() + `: no answer within 1s`,
		"postgres://me:" + secret + "@nowhere.invalid/app":                                  `error: cannot reach database "app" at nowhere.invalid:5432: its host name cannot be resolved`,
		"postgres://me:" + secret + "@127.0.0.1:port/app":                                   "error: the connection string is not one of PostgreSQL; …",
		u.String(): `error: database … refuses user "postgres": password authentication failed for user "postgres" (SQLSTATE 28P01)`,
	} {
		r := w.millrace("lag", "--database-url", database)
		if r.code != 1 || strings.Contains(r.err, secret) || !like(r.err, want) {
			t.Errorf("exit code %d: %swant\n%s", r.code, r.err, want)
		}
	}
	w.env = append(w.env, "MILLRACE_DATABASE_URL=", "PGHOST=", "PGDATABASE=", "PGSERVICE=", "PGPORT=", "PGUSER=")
	w.want(1, "error: no database is named. Set MILLRACE_DATABASE_URL …", "lag")
	password, _ := mustParse(t, w.dsn).User.Password()
	w.env = append(w.env, "PGHOST="+mustParse(t, w.dsn).Hostname(), "PGPORT="+mustParse(t, w.dsn).Port(), "PGDATABASE="+strings.TrimPrefix(u.Path, "/"),
		"PGUSER="+u.User.Username(), "PGPASSWORD="+password)
	w.want(0, "there are no consumer groups", "lag")
}

func mustParse(t *testing.T, dsn string) *url.URL {
	t.Helper()
	u, err := url.Parse(dsn)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run("select millrace.create_stream('orders'), millrace.create_stream('shipments'), millrace.create_group('orders', 'billing')")
	for shell, needs := range map[string]string{"bash": "__start_millrace", "zsh": "#compdef millrace", "fish": "complete -c millrace"} {
		script := w.ok("completion", shell)
		if !strings.Contains(script, needs) {
			t.Errorf("%s: there is no %q in the script", shell, needs)
		}
		program, err := exec.LookPath(shell)
		if err != nil && shell == "bash" {
			t.Fatal(err) // every machine that builds this has it
		}
		if err != nil {
			continue // not every machine has all shells
		}
		check := exec.CommandContext(w.ctx, program, "-n")
		check.Stdin = strings.NewReader(script)
		if out, err := check.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s does not take the script: %v\n%s", shell, err, out)
		}
	}
	for args, want := range map[string]string{
		"tail|":                 "orders\nshipments\n:4\n",
		"receive|orders|":       "billing\n:4\n",
		"migrate|run|--policy|": "create-or-update\ncreate\nnone\nrecreate\n:4\n",
	} {
		if out := w.ok(append([]string{"__complete"}, strings.Split(args, "|")...)...); out != want {
			t.Errorf("%s is completed by\n%swant\n%s", args, out, want)
		}
	}
}

func TestMigratePolicies(t *testing.T) {
	t.Parallel()
	w := worldOn(t, postgres.NewDatabase(t))
	w.want(3, "there is no Millrace schema; this program's has version …", "migrate", "run", "--policy", "none")
	w.want(1, "error: the database has no Millrace schema: the manager makes it for the first Stream of this database, or you with millrace migrate run", "lag")
	dry := w.ok("migrate", "run", "--dry-run")
	if !strings.HasPrefix(dry, "begin;\ncreate schema") || !strings.HasSuffix(dry, "commit;\n") {
		t.Errorf("--dry-run prints %d bytes that begin with %.40q", len(dry), dry)
	}
	w.want(3, "there is no Millrace schema; …", "migrate", "run", "--policy", "none")
	w.want(0, "the schema has version … now", "migrate", "run", "--policy", "create")
	w.want(0, "the schema has version … already", "migrate", "run")
	w.want(0, "the schema has version …; --policy create-or-update would run nothing", "migrate", "run", "--dry-run")
	w.run("select millrace.create_stream('orders')")
	name := one[string](w, "select current_database()")
	w.want(1, `error: nothing was dropped: … which is "`+name+`". See --confirm`, "migrate", "run", "--policy", "recreate")
	w.want(0, "everything was dropped, and the schema has version … now", "migrate", "run", "--policy", "recreate", "--confirm", name)
	if n := one[int](w, "select count(*) from millrace_engine.stream"); n != 0 {
		t.Errorf("%d streams are left", n)
	}
	w.run("update millrace_engine.schema_version set functions = 'others'")
	w.want(3, `{"version":…,"before":…,"wanted":…,"missing":[],"current":false}`, "migrate", "run", "--policy", "none", "-o", "json")
	w.want(0, `{"version":…,"current":true}`, "migrate", "run", "-o", "json")
	w.run("insert into millrace_engine.schema_version (version) values (1000)")
	w.want(1, "error: the database schema is newer than this binary: …", "migrate", "run")
	if sql := w.ok("migrate", "sql"); sql != schema.SQL() {
		t.Error("migrate sql is not the schema")
	}
}

// The database that a printed schema makes is the same as one that was migrated.
func TestPrintedSQLMakesTheDatabase(t *testing.T) {
	t.Parallel()
	w := worldOn(t, postgres.NewDatabase(t))
	if _, err := w.Exec(w.ctx, w.ok("migrate", "run", "--dry-run")); err != nil {
		t.Fatal(err)
	}
	w.want(0, "the schema has version … already", "migrate", "run", "--policy", "none")
}

func TestTheProgramIsAPluginOfKubectl(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cmd := exec.CommandContext(w.ctx, w.dir+"/kubectl-millrace", "tail")
	cmd.Env = append(os.Environ(), w.env...)
	out, _ := cmd.CombinedOutput() // its exit code is 2
	if !strings.Contains(string(out), "Usage:\n  kubectl millrace tail STREAM") {
		t.Errorf("it does not know its name:\n%s", out)
	}
}
