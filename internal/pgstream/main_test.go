package pgstream_test

import (
	"os"
	"testing"

	"github.com/millrace-dev/millrace/test/env/postgres"
)

// Prepared transactions are off in PostgreSQL unless they are asked for, and publishing takes part in them.
func TestMain(m *testing.M) {
	os.Exit(postgres.Main(m, postgres.Options{Settings: map[string]string{"max_prepared_transactions": "20"}}))
}
