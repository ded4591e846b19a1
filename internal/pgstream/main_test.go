package pgstream_test

import (
	"os"
	"testing"

	"github.com/millrace-dev/millrace/test/env/postgres"
)

func TestMain(m *testing.M) { os.Exit(postgres.Main(m, postgres.Options{})) }
