package processor

import (
	"fmt"

	"github.com/millrace-dev/millrace/api/v1alpha1"
)

// branches are the sinks of a Processor in one form: those of a fan-out, or the only one as a branch without a name.
func branches(p *v1alpha1.Processor) []v1alpha1.Branch {
	s := &p.Spec.Sink
	if len(s.FanOut) > 0 {
		return s.FanOut
	}
	if s.Projection != nil {
		return []v1alpha1.Branch{{SQL: &v1alpha1.SQLSink{}}} // in the database of the source; configOf writes its statement
	}
	return []v1alpha1.Branch{{Table: s.Table, Stream: s.Stream, SQL: s.SQL, HTTP: s.HTTP}}
}

// databaseRef is where spec names, or could name, the database of a sink.
type databaseRef struct {
	at     string // of the field in spec
	ref    *v1alpha1.SecretKeyReference
	writes bool // whether the sink itself writes into the database
}

// databaseRefs has one entry per sink.
func databaseRefs(p *v1alpha1.Processor) []databaseRef {
	var refs []databaseRef
	for i, b := range branches(p) {
		at := "spec.sink."
		if len(p.Spec.Sink.FanOut) > 0 {
			at = fmt.Sprintf("spec.sink.fanOut[%d].", i)
		}
		add := func(kind string, ref *v1alpha1.SecretKeyReference, writes bool) {
			refs = append(refs, databaseRef{at: at + kind + ".databaseSecretRef", ref: ref, writes: writes})
		}
		if b.Table != nil {
			add("table", b.Table.DatabaseSecretRef, true)
		}
		if b.Stream != nil {
			add("stream", b.Stream.DatabaseSecretRef, true)
		}
		if b.SQL != nil {
			add("sql", b.SQL.DatabaseSecretRef, true)
		}
		if b.HTTP != nil {
			add("http", b.HTTP.DatabaseSecretRef, false)
		}
	}
	return refs
}

// httpSinks are those of a Processor's sinks that post. At most one of them has Secrets or a sidecar, which the API server checks.
func httpSinks(p *v1alpha1.Processor) []*v1alpha1.HTTPSink {
	var sinks []*v1alpha1.HTTPSink
	for _, b := range branches(p) {
		if b.HTTP != nil {
			sinks = append(sinks, b.HTTP)
		}
	}
	return sinks
}
