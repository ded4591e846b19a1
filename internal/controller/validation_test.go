package controller_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/yaml"
)

func clientKey(w *world, name string) client.ObjectKey {
	return types.NamespacedName{Namespace: w.namespace, Name: name}
}

// manifest creates a resource from a manifest, as a user would write it.
func (w *world) manifest(text string) (*unstructured.Unstructured, error) {
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
		w.Fatal(err)
	}
	o.SetAPIVersion("millrace.dev/v1alpha1")
	o.SetNamespace(w.namespace)
	return o, suite.client.Create(w.Context(), o)
}

// processor is a manifest of one.
func processor(source, mapping, sink string) string {
	return `{kind: Processor, metadata: {name: a}, spec: {source: ` + source + `, ` + mapping + `, sink: ` + sink + `}}`
}

// What the API server refuses, it refuses with words that say what to write instead.
func TestTheAPIServerSaysWhatToWrite(t *testing.T) {
	const mapping = `codec: {type: JSON}, mapping: {columns: [{name: a, path: a, type: text}]}`
	const redis = `redis: {urlSecretRef: {name: r, key: url}, streams: [s]}`
	for _, c := range []struct{ name, manifest, want string }{
		{"a table cannot have this name", `{kind: Stream, metadata: {name: 1st}, spec: {}}`, "set spec.name to lower-case letters"},
		{"nor this one", `{kind: Stream, metadata: {name: a}, spec: {name: Orders}}`, "for example orders_eu"},
		{"an age in days", `{kind: Stream, metadata: {name: a}, spec: {retention: {maxAge: 7d}}}`, "days are written in hours"},
		{"no bytes", `{kind: Stream, metadata: {name: a}, spec: {retention: {maxBytes: "0"}}}`, "leave maxBytes out for no limit"},
		{"messages too large", `{kind: Stream, metadata: {name: a}, spec: {maxMessageBytes: 1Gi}}`, "write a size from 1 to 64Mi"},
		{"no partition", `{kind: Stream, metadata: {name: a}, spec: {partitions: 0}}`, "greater than or equal to 1"},
		{"a policy that does not exist", `{kind: Stream, metadata: {name: a}, spec: {deletionPolicy: Drop}}`, `"Retain", "Delete", "DeleteIfEmpty"`},
		{"a position without from", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, start: {position: 5}}}`, "position and from: Position belong together"},
		{"from Time without time", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, start: {from: Time}}}`, "time and from: Time belong together"},
		{"a failure policy of a shared group", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, failurePolicy: Skip}}`, "failurePolicy belongs to mode: Ordered"},
		{"Skip that never skips", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, mode: Ordered, failurePolicy: Skip, maxAttempts: 0}}`, "maxAttempts of 1 or more"},
		{"a backoff that shrinks", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, backoff: {initial: 10m}}}`, "raise max or lower initial"},
		{"a dedupe window in days", `{kind: Stream, metadata: {name: a}, spec: {dedupeWindow: 2d}}`, "such as 30s, 2m or 24h"},
		{"a dedupe window of years", `{kind: Stream, metadata: {name: a}, spec: {dedupeWindow: 8761h}}`, "at most 8760h; 0s switches it off"},
		{"an age that no clock can hold", `{kind: Stream, metadata: {name: a}, spec: {retention: {maxAge: 99999999h}}}`, "spec.retention.maxAge"},
		{"no priority", `{kind: Stream, metadata: {name: a}, spec: {priorities: 0}}`, "greater than or equal to 1"},
		{"versions with priorities", `{kind: Stream, metadata: {name: a}, spec: {versions: true, priorities: 2}}`, "versions need payloadType: JSON and one priority"},
		{"frames with versions", `{kind: Stream, metadata: {name: a}, spec: {versions: true, frames: {}}}`, "frames need a Stream without versions and with one priority"},
		{"a ttl of no time", `{kind: Stream, metadata: {name: a}, spec: {frames: {bestEffort: {ttl: 0s}}}}`, "write a duration from 1ms to 24h"},
		{"an alpha above one", `{kind: Stream, metadata: {name: a}, spec: {frames: {bestEffort: {alpha: "1.1"}}}}`, "write a number from 0.001 to 1 in quotes"},
		{"lengths the wrong way round", `{kind: Stream, metadata: {name: a}, spec: {frames: {bestEffort: {minLength: 9, maxLength: 8}}}}`, "minLength cannot be above maxLength"},
		{"a summary's ttl in days", `{kind: Stream, metadata: {name: a}, spec: {frames: {summaryTTL: 7d}}}`, "0s keeps summaries for ever"},
		{"tenants with a limit", `{kind: Stream, metadata: {name: a}, spec: {versions: true, tenants: [acme], retention: {maxAge: 1h}}}`, "tenants need versions: true and no limits of retention"},
		{"tenants without versions", `{kind: Stream, metadata: {name: a}, spec: {tenants: [acme]}}`, "tenants need versions: true"},
		{"a tenant that no key can name", `{kind: Stream, metadata: {name: a}, spec: {versions: true, tenants: [a/b]}}`, "spec.tenants"},
		{"an inline projection without versions", `{kind: Stream, metadata: {name: a}, spec: {projections: [{name: p, function: f}]}}`, "a projection without a group runs inside the append"},
		{"a document id without documents", `{kind: Stream, metadata: {name: a}, spec: {versions: true, projections: [{name: p, function: f, documentId: [a]}]}}`, "write the table of documents too"},
		{"two projections of one name", `{kind: Stream, metadata: {name: a}, spec: {versions: true, projections: [{name: p, function: f}, {name: p, function: g}]}}`, "Duplicate value"},
		{"a projection of a Redis stream", processor(`{`+redis+`}`, `mapping: {}`, `{projection: {}}`), "sink.projection takes the messages of a consumerGroup"},
		{"a projection with a mapping", processor(`{consumerGroup: {name: g}}`, mapping, `{projection: {}}`), "sink.projection takes the messages of a consumerGroup"},
		{"too many priorities", `{kind: Stream, metadata: {name: a}, spec: {priorities: 9}}`, "less than or equal to 8"},
		{"parking in a shared group", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, failurePolicy: Park}}`, "failurePolicy belongs to mode: Ordered"},
		{"a queue policy in order", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, mode: Ordered, queuePolicy: Singleton}}`, "queuePolicy belongs to mode: Shared"},
		{"a queue policy that does not exist", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, queuePolicy: Long}}`, `"Standard", "Short", "Singleton", "Stately"`},
		{"unrouted messages in order", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, mode: Ordered, filter: {unrouted: true}}}`, "filter.unrouted belongs to mode: Shared"},
		{"a warning of nothing", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, warningSize: 0}}`, "greater than or equal to 1"},
		{"a filter for nothing", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, filter: {}}}`, "at least 1 properties"},
		{"a filter with another part", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, filter: {keyprefix: a}}}`, "at least 1 properties"},
		{"a filter for no key", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, filter: {keys: []}}}`, "at least 1 items"},
		{"a filter for a key twice", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, filter: {keys: [a, a]}}}`, "Duplicate value"},
		{"a lapse that never comes", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, lapse: {}}}`, "write lapse.after, lapse.lag or both"},
		{"a lapse at once", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, lapse: {after: 0s}}}`, "write a duration of 1s or more"},
		{"a lapse with no lag", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, lapse: {lag: 0}}}`, "greater than or equal to 1"},
		{"two sources", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `, consumerGroup: {name: g}}, ` + mapping + `, sink: {table: {name: t, key: [a]}}}}`, "write exactly one source"},
		{"no source", `{kind: Processor, metadata: {name: a}, spec: {source: {}, ` + mapping + `, sink: {table: {name: t, key: [a]}}}}`, "write exactly one source"},
		{"Redis without a key", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, ` + mapping + `, sink: {table: {name: t}}}}`, "sink.table.key is needed"},
		{"no sink", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, ` + mapping + `, sink: {}}}`, "write exactly one sink"},
		{"a column twice", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, mapping: {columns: [{name: a, path: a, type: text}, {name: a, path: b, type: text}]}, sink: {table: {name: t, key: [a]}}}}`, "Duplicate value"},
		{"a reserved variable", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, ` + mapping + `, sink: {table: {name: t, key: [a]}}, pod: {env: [{name: MILLRACE_REDIS_URL, value: x}]}}}`, "MILLRACE_ are reserved"},
		{"an endless drain", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, ` + mapping + `, sink: {table: {name: t, key: [a]}}, drain: {timeout: 1h}}}`, "from 1s to 10m"},
		{"a field of a codec without", `{kind: Processor, metadata: {name: a}, spec: {source: {` + redis + `}, codec: {type: Fields, field: p}, mapping: {columns: [{name: a, path: a, type: text}]}, sink: {table: {name: t, key: [a]}}}}`, "does not belong to type: Fields"},
		{"a number of pods and an autoscaler", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, replicas: 2, autoscaling: {maxReplicas: 3, backlogPerReplica: 5}`), "write replicas or autoscaling, not both"},
		{"a memory for Redis", processor(`{`+redis+`}`, mapping, `{sql: {statement: from batch}}, memory: {name: m}`), "memory needs a consumerGroup source"},
		{"a memory for a table", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, memory: {name: m}`), "memory belongs to a sql or http sink"},
		{"a memory for batches", processor(`{consumerGroup: {name: g}}`, mapping, `{http: {url: "https://a", mode: Batch}}, memory: {name: m}`), "write sink.http.mode: Single"},
		{"a subject of a statement", processor(`{consumerGroup: {name: g}}`, mapping, `{sql: {statement: from batch}}, memory: {name: m, subject: key}`), "memory.subject belongs to an http sink"},
		{"a memory elsewhere", processor(`{consumerGroup: {name: g}}`, mapping, `{sql: {statement: from batch, databaseSecretRef: {name: s, key: k}}}, memory: {name: m}`), "memory is in the database of the source"},
		{"a memory with a name that is none", processor(`{consumerGroup: {name: g}}`, mapping, `{sql: {statement: from batch}}, memory: {name: my-memory}`), "should match"},
		{"a memory's table that nobody makes", processor(`{consumerGroup: {name: g}}`, mapping, `{sql: {statement: from batch}}, memory: {name: m, table: t}`), "belong to create: IfMissing"},
		{"no time to keep", processor(`{consumerGroup: {name: g}}`, mapping, `{sql: {statement: from batch}}, memory: {name: m, create: IfMissing, keepCompleted: 30d}`), "write a duration from 1s"},
		{"an autoscaler for Redis", processor(`{`+redis+`}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {maxReplicas: 3, backlogPerReplica: 5}`), "the manager does not connect to Redis"},
		{"an autoscaler without a target", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {maxReplicas: 3}`), "backlogPerReplica, maxAge, ratePerReplica, or several"},
		{"a minimum above the maximum", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {minReplicas: 4, maxReplicas: 3, backlogPerReplica: 5}`), "raise maxReplicas or lower minReplicas"},
		{"a default minimum is within", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {maxReplicas: 0, backlogPerReplica: 5}`), "greater than or equal to 1"},
		{"no age", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {maxReplicas: 3, maxAge: 0s}`), "write a duration from 1s to 24h"},
		{"a cooldown in days", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, key: [a]}}, autoscaling: {maxReplicas: 3, backlogPerReplica: 5, cooldown: 1d}`), "write a duration from 0s to 168h"},
		{"two sinks", processor(`{`+redis+`}`, mapping, `{table: {name: t, key: [a]}, sql: {statement: select from batch}}`), "write exactly one sink: table, stream, sql, projection, http or fanOut"},
		{"no sink in a branch", processor(`{`+redis+`}`, mapping, `{fanOut: [{name: a}]}`), "write exactly one sink in a branch"},
		{"a branch twice", processor(`{`+redis+`}`, mapping, `{fanOut: [{name: a, sql: {statement: from batch}}, {name: a, sql: {statement: from batch}}]}`), "Duplicate value"},
		{"a branch without a key", processor(`{`+redis+`}`, mapping, `{fanOut: [{name: a, table: {name: t}}]}`), "each table of a fanOut needs a key with a redis source"},
		{"a ledger of a group", processor(`{consumerGroup: {name: g}}`, mapping, `{table: {name: t, idempotency: Ledger}}`), "idempotency: Ledger belongs to a redis source"},
		{"a table without columns", processor(`{`+redis+`}`, `mapping: {filter: doc.a}`, `{table: {name: t, key: [a]}}`), "mapping.columns is needed with a table or sql sink"},
		{"a branch without columns", processor(`{`+redis+`}`, `mapping: {}`, `{fanOut: [{name: a, sql: {statement: from batch}}]}`), "a table or sql branch of a fanOut needs mapping.columns"},
		{"path and expression", processor(`{`+redis+`}`, `mapping: {columns: [{name: a, path: a, expression: doc.a, type: text}]}`, `{table: {name: t, key: [a]}}`), "write exactly one of path and expression"},
		{"neither path nor expression", processor(`{`+redis+`}`, `mapping: {columns: [{name: a, type: text}]}`, `{table: {name: t, key: [a]}}`), "write exactly one of path and expression"},
		{"protobuf without description", processor(`{`+redis+`}`, `codec: {type: Protobuf}, mapping: {columns: [{name: a, path: a, type: text}]}`, `{table: {name: t, key: [a]}}`), "codec.protobuf and type: Protobuf belong together"},
		{"a description of nothing", processor(`{`+redis+`}`, `codec: {type: Protobuf, protobuf: {message: a.B}}, mapping: {columns: [{name: a, path: a, type: text}]}`, `{table: {name: t, key: [a]}}`), "write exactly one of descriptorSet"},
		{"newer without its action", processor(`{`+redis+`}`, mapping, `{table: {name: t, key: [a], conflict: {newer: a}}}`), "conflict.newer and action: UpdateIfNewer belong together"},
		{"UpdateIfNewer without newer", processor(`{`+redis+`}`, mapping, `{table: {name: t, key: [a], conflict: {action: UpdateIfNewer}}}`), "conflict.newer and action: UpdateIfNewer belong together"},
		{"a mismatch of what is updated", processor(`{`+redis+`}`, mapping, `{table: {name: t, key: [a], conflict: {action: Update, detectMismatch: true}}}`), "detectMismatch belongs to action: Nothing"},
		{"stream and route", processor(`{`+redis+`}`, mapping, `{stream: {stream: s, route: "'s'"}}`), "write exactly one of stream, a name, and route"},
		{"a statement that ignores the batch", processor(`{`+redis+`}`, mapping, `{sql: {statement: "insert into batches select 1"}}`), "reads nothing of the batch"},
		{"no URL", processor(`{`+redis+`}`, mapping, `{http: {mode: Batch}}`), "write exactly one of url, urlSecretRef and sidecar"},
		{"a URL of no web server", processor(`{`+redis+`}`, mapping, `{http: {url: "ftp://example.org"}}`), "write the address of a web server"},
		{"a URL with a password", processor(`{`+redis+`}`, mapping, `{http: {url: "https://a:b@example.org/x"}}`), "credentials do not belong into spec"},
		{"a sidecar at the processor's port", processor(`{`+redis+`}`, mapping, `{http: {sidecar: {image: i, port: 8080}}}`), "8080 is the processor's own port"},
		{"Secrets for one of two servers", processor(`{`+redis+`}`, mapping, `{fanOut: [{name: a, http: {url: "https://a", authorizationSecretRef: {name: s, key: k}}}, {name: b, http: {url: "https://b"}}]}`), "has to be the only http branch"},
		{"a name too long for pods", `{kind: Processor, metadata: {name: ` + strings.Repeat("a", 53) + `}, spec: {source: {` + redis + `}, ` + mapping + `, sink: {table: {name: t, key: [a]}}}}`, "at most 52"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			_, err := w.manifest(c.manifest)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the API server says: %v", err)
			}
		})
	}
}

// What cannot change is refused with the way to do it. A rule that removing an optional field would bypass is tried that way too.
func TestWhatCannotChangeIsRefused(t *testing.T) {
	const stream = `{kind: Stream, metadata: {name: a-b}, spec: {name: a_b, partitions: 8, priorities: 2, retention: {segments: 6}}}`
	const group = `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, mode: Ordered, start: {from: Position, position: 5}}}`
	for _, c := range []struct{ name, manifest, change, want string }{
		{"the name", stream, `{spec: {name: other}}`, "create another Stream with the new name"},
		{"the payload type", stream, `{spec: {payloadType: Bytes}}`, "payloadType cannot change from JSON to Bytes"},
		{"fewer partitions", stream, `{spec: {partitions: 7}}`, "partitions only grow"},
		{"the default number of segments, by removing them", stream, `{spec: {retention: null}}`, "retention.segments only grows"},
		{"fewer priorities, by removing them", stream, `{spec: {priorities: null}}`, "priorities only grow"},
		{"no versions any more", `{kind: Stream, metadata: {name: a}, spec: {versions: true}}`, `{spec: {versions: null}}`, "versions cannot be taken back"},
		{"versions of bytes", `{kind: Stream, metadata: {name: a}, spec: {payloadType: Bytes}}`, `{spec: {versions: true}}`, "versions need payloadType: JSON"},
		{"no frames any more", `{kind: Stream, metadata: {name: a}, spec: {frames: {}}}`, `{spec: {frames: null}}`, "frames cannot be taken back"},
		{"priorities of frames", `{kind: Stream, metadata: {name: a}, spec: {frames: {}}}`, `{spec: {priorities: 2}}`, "frames need a Stream without versions and with one priority"},
		{"the stream of a group", group, `{spec: {streamRef: {name: t}}}`, "create another ConsumerGroup for t"},
		{"the mode", group, `{spec: {mode: Shared}}`, "mode cannot change from Ordered to Shared"},
		{"the default mode, by removing it", group, `{spec: {mode: null}}`, "mode cannot change"},
		{"the start, by removing it", group, `{spec: {start: null}}`, "start cannot change"},
		{"the queue policy", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}}}`, `{spec: {queuePolicy: Short}}`, "queuePolicy cannot change"},
		{"a group for unrouted messages", `{kind: ConsumerGroup, metadata: {name: a}, spec: {streamRef: {name: s}, filter: {unrouted: true}}}`,
			`{spec: {filter: null}}`, "filter.unrouted cannot change"},
		{"the name of a group", group, `{spec: {name: b}}`, "create another ConsumerGroup with the new name"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			o, err := w.manifest(c.manifest)
			if err != nil {
				t.Fatal(err)
			}
			patch, err := yaml.YAMLToJSON([]byte(c.change))
			if err != nil {
				t.Fatal(err)
			}
			err = suite.client.Patch(t.Context(), o, client.RawPatch(types.MergePatchType, patch))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the API server says: %v", err)
			}
		})
	}
}

func TestWhatCanChangeIsAccepted(t *testing.T) {
	w := newWorld(t)
	o, err := w.manifest(`{kind: Stream, metadata: {name: a-b}, spec: {name: a_b}}`)
	if err != nil {
		t.Fatal(err)
	}
	// The name that was there by default all along.
	for i, change := range []string{`{"spec":{"name":null}}`, `{"spec":{"partitions":16}}`, `{"spec":{"retention":{"segments":8,"maxAge":"168h"}}}`, `{"spec":{"databaseSecretRef":{"name":"x","key":"y"}}}`,
		`{"spec":{"priorities":3,"dedupeWindow":"0s"}}`, `{"spec":{"dedupeWindow":"8760h"}}`} {
		if err := suite.client.Patch(t.Context(), o, client.RawPatch(types.MergePatchType, []byte(change))); err != nil {
			t.Errorf("change %d: %v", i, err)
		}
	}
}

// The API server and every client carry each CRD around; etcd and last-applied annotations have limits.
func TestCRDsAreSmall(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "..", "config", "crd", "bases", "*.yaml"))
	if err != nil || len(files) != 3 {
		t.Fatalf("found %v, %v", files, err)
	}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() >= 256<<10 {
			t.Errorf("%s has %d bytes", f, info.Size())
		}
	}
}
