package pipeline

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/millrace-dev/millrace/bench/build"
)

//go:embed configs/benthos.yaml
var benthosConfig []byte

//go:embed configs/millrace.yaml
var millraceConfig string

// Systems are all that is measured, the product first.
func Systems() []*System {
	return []*System{
		{Name: "millrace", Build: buildProcessor, Command: millraceCommand, Cannot: able},
		benthos("connect"),
		benthos("bento"),
		{Name: "watermill", Build: peer("watermill"), Command: watermillCommand, Cannot: watermillCannot},
	}
}

func able(string) string { return "" }

func millraceCommand(m Member) (args, env []string, err error) {
	text := strings.NewReplacer("${STREAM}", streamName, "${GROUP}", m.Group).Replace(millraceConfig)
	if m.BatchRows > 0 {
		text += fmt.Sprintf("batch: {maxRows: %d}\n", m.BatchRows)
	}
	file := filepath.Join(m.Dir, "processor.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, nil, err
	}
	return []string{"-config", file, "-listen", "127.0.0.1:0", "-member", m.Name},
		[]string{"MILLRACE_REDIS_URL=" + m.RedisURL, "MILLRACE_SINK_DATABASE_URL=" + m.DSN}, nil
}

// benthos is Redpanda Connect or Bento, whose common ancestor was called so. They read the same configuration.
func benthos(name string) *System {
	return &System{Name: name, Build: peer(name), Cannot: able, Command: func(m Member) (args, env []string, err error) {
		file := filepath.Join(m.Dir, "config.yaml")
		if err := os.WriteFile(file, benthosConfig, 0o600); err != nil {
			return nil, nil, err
		}
		const rows = 3000
		args = []string{"run", file}
		if name == "bento" {
			args = []string{"-c", file}
		}
		return args, environment(m, rows), nil
	}}
}

func watermillCommand(m Member) (args, env []string, err error) {
	const subscribers = "256"
	return nil, append(environment(m, 0), "SUBSCRIBERS="+subscribers), nil
}

func watermillCannot(work string) string {
	if strings.HasPrefix(work, "batch-") {
		return "its batches are as large as it has subscribers"
	}
	return ""
}

func buildProcessor(ctx context.Context, log func(string)) (string, error) {
	return build.Program(ctx, log, "processor", ".", "./cmd/processor")
}

func peer(name string) func(context.Context, func(string)) (string, error) {
	return func(ctx context.Context, log func(string)) (string, error) {
		return build.Program(ctx, log, name, filepath.Join("bench", "peers", name), ".")
	}
}
