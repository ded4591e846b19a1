package eventstore

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/millrace-dev/millrace/bench/engine"
	"github.com/millrace-dev/millrace/test/env/dirs"
	"github.com/millrace-dev/millrace/test/env/source"
)

// emmett is emmett-postgresql, run by Node with a pool of its own (peers/emmett/main.mjs). bench/peers.sh fetches it.
type emmett struct{}

func (emmett) Name() string { return "emmett" }

func (emmett) Cannot(work string) string {
	if isFrames(work) {
		return "has no frames or summaries; its consumers look for events every 50 ms"
	}
	return ""
}

// emmettDir is where its modules are.
func emmettDir() (string, error) {
	dir, err := dirs.Cache("emmett")
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "node_modules")); err != nil {
		return "", engine.Unavailable("is not on this machine; bench/peers.sh fetches it with npm")
	}
	if _, err := exec.LookPath("node"); err != nil {
		return "", engine.Unavailable("needs Node 20")
	}
	return dir, nil
}

// EmmettVersions are those of Emmett, of its driver and of Node; none when they are not on this machine.
func EmmettVersions(ctx context.Context) map[string]string {
	dir, err := emmettDir()
	if err != nil {
		return nil
	}
	versions := map[string]string{}
	for name, module := range map[string]string{"emmett-postgresql": "@event-driven-io/emmett-postgresql", "node-postgres": "pg"} {
		var m struct {
			Version string `json:"version"`
		}
		text, err := os.ReadFile(filepath.Join(dir, "node_modules", module, "package.json"))
		if err == nil && json.Unmarshal(text, &m) == nil {
			versions[name] = m.Version
		}
	}
	if text, err := exec.CommandContext(ctx, "node", "--version").Output(); err == nil {
		versions["node"] = strings.TrimPrefix(strings.TrimSpace(string(text)), "v")
	}
	return versions
}

func (emmett) Open(ctx context.Context, place Place) (Store, error) {
	dir, err := emmettDir()
	if err != nil {
		return nil, err
	}
	root, err := source.Root()
	if err != nil {
		return nil, err
	}
	file, err := os.CreateTemp("", "millrace-bench-bodies-*.json")
	if err != nil {
		return nil, err
	}
	all := make([]json.RawMessage, len(bodies))
	for i, body := range bodies {
		all[i] = append([]byte("{"), body...)
	}
	p := &emmettProcess{bodies: file.Name()}
	if err := errors.Join(json.NewEncoder(file).Encode(all), file.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(p.bodies))
	}
	p.cmd = exec.CommandContext(ctx, "node", filepath.Join(root, "bench", "peers", "emmett", "main.mjs"))
	p.cmd.Env = append(os.Environ(), "NODE_ENV=production", "PEER="+dir, "DSN="+place.DSN, "BODIES="+p.bodies, "CONNECTIONS="+strconv.Itoa(place.Connections))
	p.cmd.Stderr = &p.noise
	if err := p.start(); err != nil {
		return nil, errors.Join(err, os.Remove(p.bodies))
	}
	var ready struct{}
	if err := p.hear(&ready); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// emmettProcess is Node working for one database.
type emmettProcess struct {
	cmd    *exec.Cmd
	bodies string // a file
	tasks  io.WriteCloser
	lines  *bufio.Reader
	noise  strings.Builder
}

func (p *emmettProcess) start() (err error) {
	if p.tasks, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	p.lines = bufio.NewReader(out)
	return p.cmd.Start()
}

// hear reads the next line into answer. The process has ended when there is none.
func (p *emmettProcess) hear(answer any) error {
	line, err := p.lines.ReadBytes('\n')
	if err != nil {
		_ = p.cmd.Wait()
		return fmt.Errorf("node ended: %w\n%s", err, p.noise.String())
	}
	var failed struct {
		Error string `json:"error"`
	}
	if err := json.Unmarshal(line, &failed); err != nil {
		return err
	}
	if failed.Error != "" {
		return errors.New(failed.Error)
	}
	return json.Unmarshal(line, answer)
}

func (p *emmettProcess) Perform(_ context.Context, t Task) (Outcome, error) {
	var o Outcome
	if err := json.NewEncoder(p.tasks).Encode(t); err != nil {
		return o, err
	}
	return o, p.hear(&o)
}

func (p *emmettProcess) History() string {
	return `select stream_id, stream_position, (message_data ->> 'n')::bigint from emt_messages order by stream_id, stream_position`
}

func (p *emmettProcess) Close() error {
	defer os.RemoveAll(p.bodies)
	_ = p.tasks.Close()
	if p.cmd.ProcessState != nil {
		return nil // it has failed, and has said why
	}
	if _, err := io.Copy(io.Discard, p.lines); err != nil {
		return err
	}
	return p.cmd.Wait()
}
