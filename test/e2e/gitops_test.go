package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/millrace-dev/millrace/test/env/source"
	"github.com/millrace-dev/millrace/test/scenario"
)

// example reads a file below examples/gitops.
func example(t *testing.T, path string) string {
	t.Helper()
	root, err := source.Root()
	must(t, err)
	text, err := os.ReadFile(filepath.Join(root, "examples", "gitops", path))
	must(t, err)
	return string(text)
}

// replaced is text with one string in place of another, which has to be there.
func replaced(t *testing.T, text, old, with string) string {
	t.Helper()
	if !strings.Contains(text, old) {
		t.Fatalf("%q is not in\n%s", old, text)
	}
	return strings.Replace(text, old, with, 1)
}

// shop are the files of examples/gitops/orders, with a database that is there.
func shop(t *testing.T, dsn string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, name := range []string{"secret.yaml", "stream.yaml", "consumergroup.yaml", "processor.yaml"} {
		files["orders/"+name] = example(t, "orders/"+name)
	}
	files["orders/secret.yaml"] = replaced(t, files["orders/secret.yaml"], "postgres://app:change-me@app-db.shop.svc:5432/app?sslmode=require", dsn)
	return files
}

// beside is the DSN of another database of the server, which may not exist yet.
func beside(ns *scenario.Namespace, database string) string {
	return strings.Replace(ns.DSN, "/"+ns.Name, "/"+database, 1)
}

// query reads one number.
func query(ctx context.Context, t *testing.T, dsn, sql string) (n int) {
	t.Helper()
	conn, err := pgx.Connect(ctx, dsn)
	must(t, err)
	defer conn.Close(context.WithoutCancel(ctx))
	must(t, conn.QueryRow(ctx, sql).Scan(&n))
	return n
}

// ordersAreGone waits until no resource of ours is left in a namespace, and says what is left in the database of examples/gitops/orders: the
// stream with its messages, because it is retained, and no group, because it is deleted.
func ordersAreGone(ctx context.Context, t *testing.T, ns *scenario.Namespace, dsn string, messages int) {
	t.Helper()
	eventually(ctx, t, time.Minute, "an empty namespace", func(ctx context.Context) error {
		out, err := ns.Kubectl(ctx, "get", "millrace", "--output=name")
		if err == nil && out != "" {
			err = fmt.Errorf("there are %s", out)
		}
		return err
	})
	if got := query(ctx, t, dsn, "select count(*) from millrace.orders"); got != messages {
		t.Errorf("the Stream with deletionPolicy Retain has %d messages, want the %d that were published", got, messages)
	}
	if got := query(ctx, t, dsn, "select count(*) from millrace.stats('orders')"); got != 0 {
		t.Error("the ConsumerGroup with deletionPolicy Delete is still in the database")
	}
}

// publishOneOrder publishes a message and waits for its row.
func publishOneOrder(ctx context.Context, t *testing.T, dsn string) {
	t.Helper()
	execute(ctx, t, dsn, `select millrace.publish('orders', '{"order_id": "o-1", "amount": 12.50}')`)
	awaitInvoices(ctx, t, dsn, 1)
}

// awaitInvoices waits until every message is a row.
func awaitInvoices(ctx context.Context, t *testing.T, dsn string, want int) {
	t.Helper()
	eventually(ctx, t, time.Minute, "invoices", func(ctx context.Context) error {
		n, err := rows(ctx, dsn, "invoices")
		if err == nil && n != want {
			err = fmt.Errorf("there are %d, want %d", n, want)
		}
		return err
	})
}

// step is a subtest without which those after it make no sense.
func step(t *testing.T, name string, f func(t *testing.T)) {
	t.Helper()
	if !t.Run(name, f) {
		t.FailNow()
	}
}
