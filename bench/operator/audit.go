package operator

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

// Where the chart is installed, and as what the manager comes to the API server.
const (
	systemNamespace = "millrace-system"
	release         = "millrace"
	managerUser     = "system:serviceaccount:" + systemNamespace + ":" + release
)

// auditPolicy makes the API server write down every request of the manager, and nobody else's.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
- level: Metadata
  users: ["` + managerUser + `"]
- level: None
`

// request is one kind of request: a verb and a resource, such as "patch streams/status".
type request struct{ verb, resource string }

func (r request) String() string { return r.verb + " " + r.resource }

// writes says whether the request changes something in the cluster. Leases are the leader's heartbeat and counted apart.
func (r request) writes() bool {
	switch r.verb {
	case "get", "list", "watch":
		return false
	}
	return !r.lease() && !strings.HasSuffix(r.resource, "reviews") // tokenreviews are questions
}

func (r request) lease() bool { return r.resource == "leases" }

// audit counts the manager's requests from the API server's audit log.
type audit struct {
	file   *os.File
	reader *bufio.Reader
	rest   string // the beginning of a line whose end is not written yet
	counts map[request]int
}

func openAudit(path string) (*audit, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return &audit{file: f, reader: bufio.NewReaderSize(f, 1<<20), counts: map[request]int{}}, nil
}

// read returns how often each request was made until now.
func (a *audit) read() (map[request]int, error) {
	for {
		line, err := a.reader.ReadString('\n')
		a.rest += line
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		var event struct {
			Verb      string `json:"verb"`
			ObjectRef struct {
				Resource    string `json:"resource"`
				Subresource string `json:"subresource"`
			} `json:"objectRef"`
		}
		if err := json.Unmarshal([]byte(a.rest), &event); err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
		a.rest = ""
		r := request{event.Verb, event.ObjectRef.Resource}
		if r.resource == "" {
			r.resource = "discovery"
		}
		if event.ObjectRef.Subresource != "" {
			r.resource += "/" + event.ObjectRef.Subresource
		}
		a.counts[r]++
	}
	now := make(map[request]int, len(a.counts))
	for r, n := range a.counts {
		now[r] = n
	}
	return now, nil
}

// since returns what was added to an earlier reading.
func since(before, now map[request]int) map[request]int {
	added := map[request]int{}
	for r, n := range now {
		if n > before[r] {
			added[r] = n - before[r]
		}
	}
	return added
}

// sum counts the requests that pass.
func sum(counts map[request]int, pass func(request) bool) (n int) {
	for r, k := range counts {
		if pass(r) {
			n += k
		}
	}
	return n
}
