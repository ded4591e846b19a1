package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/spf13/cobra"

	"github.com/millrace-dev/millrace/internal/pgstream"
	"github.com/millrace-dev/millrace/internal/pgstream/schema"
)

// envDatabaseURL is the variable that holds the connection string, as for the other programs.
const envDatabaseURL = "MILLRACE_DATABASE_URL"

// connectTimeout bounds an attempt to connect, unless the connection string does.
const connectTimeout = 10 * time.Second

// connection is where the database is.
type connection struct {
	databaseURL, address                   string
	stream, namespace, kubeconfig, context string
}

func (c *connection) flags(root *cobra.Command) {
	f := root.PersistentFlags()
	f.StringVar(&c.databaseURL, "database-url", "", "connection string of the database (default: the variable "+envDatabaseURL+")")
	f.StringVar(&c.stream, "stream", "", "name of a Kubernetes Stream: its database is found by its Secret")
	f.StringVar(&c.address, "address", "", "reach the database at this host:port instead, for example through kubectl port-forward")
	f.StringVarP(&c.namespace, "namespace", "n", "", "namespace of --stream (default: that of the kubeconfig's context)")
	f.StringVar(&c.kubeconfig, "kubeconfig", "", "kubeconfig file for --stream")
	f.StringVar(&c.context, "context", "", "context of the kubeconfig for --stream")
}

// database is a connected database.
type database struct {
	*pgxpool.Pool
	config *pgxpool.Config
	stream string // in the database, of the Kubernetes Stream that was named; empty when none was
}

// connect connects to a database whose schema this program can use.
func (a *app) connect(ctx context.Context) (*database, error) {
	d, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	if err := schema.Check(ctx, d); err != nil {
		d.Close()
		return nil, explain(err)
	}
	return d, nil
}

// open connects to a database, whatever is in it.
func (a *app) open(ctx context.Context) (*database, error) {
	url, stream, reach, err := a.connection.find(ctx)
	if err != nil {
		return nil, err
	}
	config, err := parse(url)
	if err != nil {
		return nil, err
	}
	if err := moveTo(config, a.connection.address); err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, unreachable(config, err)
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		err = unreachable(config, err)
		if reach != "" && a.connection.address == "" && !refused(err) {
			err = fmt.Errorf("%w\n%s", err, reach)
		}
		return nil, err
	}
	return &database{Pool: pool, config: config, stream: stream}, nil
}

// find returns the connection string, and of a Kubernetes Stream its name in the database and how to reach that from outside of the cluster.
func (c *connection) find(ctx context.Context) (url, stream, reach string, err error) {
	if c.stream != "" {
		found, err := findStream(ctx, c)
		if err != nil {
			return "", "", "", err
		}
		if c.databaseURL != "" { // the database is known, and only the stream's name was wanted
			return c.databaseURL, found.stream, "", nil
		}
		url, err := found.secret(ctx)
		return url, found.stream, found.portForward(url), err
	}
	if c.databaseURL != "" {
		return c.databaseURL, "", "", nil
	}
	if url := strings.TrimSpace(os.Getenv(envDatabaseURL)); url != "" {
		return url, "", "", nil
	}
	for _, name := range []string{"PGHOST", "PGSERVICE", "PGDATABASE", "PGPORT", "PGUSER"} {
		if os.Getenv(name) != "" {
			return "", "", "", nil // an empty connection string means these variables
		}
	}
	return "", "", "", fmt.Errorf("no database is named. Set %s to its connection string, or PGHOST and the other variables of psql, or name a Kubernetes Stream with --stream",
		envDatabaseURL)
}

// parse reads a connection string. Its error says nothing of the value, which may hold a password.
func parse(url string) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		if url == "" {
			return nil, fmt.Errorf("the PG variables do not name a database: %w", err)
		}
		return nil, errors.New("the connection string is not one of PostgreSQL; write postgres://user:password@host:5432/database, with special characters in the " +
			"password percent-encoded")
	}
	c := config.ConnConfig
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = connectTimeout
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "millrace"
	}
	config.MaxConns = 10 // a tail of eight priorities may read all of them at once
	pgstream.FitProxies(config)
	return config, nil
}

// moveTo makes a configuration connect elsewhere. What TLS compares with the certificate stays the host of the connection string.
func moveTo(config *pgxpool.Config, address string) error {
	if address == "" {
		return nil
	}
	host, text, err := net.SplitHostPort(address)
	port, portErr := strconv.ParseUint(text, 10, 16)
	if err != nil || portErr != nil || port == 0 {
		return fmt.Errorf("--address %q is no address: write host:port", address)
	}
	config.ConnConfig.Host, config.ConnConfig.Port = host, uint16(port)
	for _, f := range config.ConnConfig.Fallbacks {
		f.Host, f.Port = host, uint16(port)
	}
	return nil
}

// unreachable says in a person's words why there is no connection, and nothing of the password.
func unreachable(config *pgxpool.Config, err error) error {
	c := config.ConnConfig
	where := fmt.Sprintf("database %q at %s", c.Database, net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port))))
	if strings.HasPrefix(c.Host, "/") {
		where = fmt.Sprintf("database %q at %s", c.Database, c.Host)
	}
	var server *pgconn.PgError
	var dns *net.DNSError
	switch {
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &server) && server.Code == "3D000":
		return fmt.Errorf("%s does not exist: create it, or name another", where)
	case errors.As(err, &server):
		return fmt.Errorf("%s refuses user %q: %w", where, c.User, &serverError{server})
	case errors.As(err, &dns):
		return fmt.Errorf("cannot reach %s: its host name cannot be resolved", where)
	case strings.Contains(err.Error(), "connection refused"):
		return fmt.Errorf("cannot reach %s: connection refused", where)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("cannot reach %s: no server has a socket for port %d there. For one elsewhere set %s, or PGHOST", where, c.Port, envDatabaseURL)
	case errors.Is(err, context.DeadlineExceeded) || pgconn.Timeout(err):
		return fmt.Errorf("cannot reach %s: no answer within %s", where, c.ConnectTimeout)
	case strings.Contains(err.Error(), "tls"), strings.Contains(err.Error(), "certificate"), strings.Contains(err.Error(), "TLS"):
		return fmt.Errorf("cannot reach %s: TLS could not be set up; see sslmode in the connection string", where)
	}
	return fmt.Errorf("cannot reach %s: the connection broke", where)
}

// refused says whether a server has answered.
func refused(err error) bool {
	var e *serverError
	return errors.As(err, &e)
}

// serverError is an answer of PostgreSQL, in its words.
type serverError struct{ *pgconn.PgError }

func (e *serverError) Error() string {
	text := e.Message
	if e.Hint != "" {
		text += ". " + e.Hint
	}
	return text + " (SQLSTATE " + e.Code + ")"
}

func (e *serverError) Unwrap() error { return e.PgError }

// explain says what to do about an error that is about the installation and not about the command.
func explain(err error) error {
	var server *pgconn.PgError
	switch {
	case errors.As(err, &server) && server.Code == "42501":
		return fmt.Errorf("%w. The role needs what millrace migrate run --runtime-role grants, or is not the owner that this needs", err)
	}
	return err
}
