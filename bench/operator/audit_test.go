package operator

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTheAuditLogIsCountedAsItGrows(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	write := func(text string) {
		t.Helper()
		f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString(text); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"verb":"get","objectRef":{"resource":"secrets"}}` + "\n" + `{"verb":"patch","objectRef":{"resou`)
	a, err := openAudit(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.file.Close()
	first, err := a.read()
	if err != nil || len(first) != 1 || first[request{"get", "secrets"}] != 1 {
		t.Fatalf("the first reading is %v, %v", first, err)
	}
	write(`rce":"streams","subresource":"status"}}` + "\n" + `{"verb":"update","objectRef":{"resource":"leases"}}` + "\n")
	second, err := a.read()
	if err != nil {
		t.Fatal(err)
	}
	added := since(first, second)
	if len(added) != 2 || added[request{"patch", "streams/status"}] != 1 || sum(added, request.writes) != 1 || sum(added, request.lease) != 1 {
		t.Errorf("added was %v", added)
	}
}
