package processor

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// asker bounds how long a pod may take to answer, and follows it nowhere else.
var asker = &http.Client{
	Timeout:       time.Second,
	Transport:     &http.Transport{DisableKeepAlives: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// whyNotReady returns what the pod says of why it is not ready: it is the only one that knows, and a person should not need its log. Where a network policy
// keeps the manager from the pods, there is no answer.
func whyNotReady(ctx context.Context, ip string) string {
	words, err := readiness(ctx, net.JoinHostPort(ip, strconv.Itoa(httpPort)))
	if err != nil {
		return ""
	}
	return words
}

// readiness reads the answer of /readyz: empty when the pod is ready.
func readiness(ctx context.Context, address string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		return "", err
	}
	resp, err := asker.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return "", nil
	}
	if resp.StatusCode != http.StatusServiceUnavailable {
		return "", fmt.Errorf("%s answers %s", address, resp.Status)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, 4*saidMax))
	return shorten(strings.TrimSpace(string(text))), err
}
