package controller_test

import (
	"encoding/base64"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/test/env/postgres"
)

// file waits for the configuration file of a Processor that fits its spec, and reads it as the processor does.
func (w *world) file(p *v1alpha1.Processor, fits func(*config.Config) bool) *config.Config {
	w.Helper()
	var c *config.Config
	w.eventually("the configuration file is written", func() error {
		var cm corev1.ConfigMap
		if err := suite.client.Get(w.Context(), clientKey(w, p.Name+"-processor"), &cm); err != nil {
			return err
		}
		var err error
		if c, err = config.Parse([]byte(cm.Data["processor.yaml"])); err != nil {
			return fmt.Errorf("the processor would refuse its file: %w\n%s", err, cm.Data["processor.yaml"])
		}
		if !fits(c) {
			return fmt.Errorf("not yet:\n%s", cm.Data["processor.yaml"])
		}
		return nil
	})
	return c
}

func anything(*config.Config) bool { return true }

// processor creates one from a manifest.
func (w *world) processor(name, spec string) *v1alpha1.Processor {
	w.Helper()
	if _, err := w.manifest("kind: Processor\nmetadata: {name: " + name + "}\nspec:\n" + spec); err != nil {
		w.Fatal(err)
	}
	return &v1alpha1.Processor{ObjectMeta: metav1.ObjectMeta{Namespace: w.namespace, Name: name}}
}

// Every setting of spec arrives in the file under the same name: the file is compared with what a person would write by hand.
func TestEverySettingReachesTheFile(t *testing.T) {
	w := newWorld(t)
	w.secret("r", "url", "rediss://default:redis-password-1234@redis:6379/0")
	w.secret("tls", "ca.crt", "certificate")
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	const shared = `
codec: {type: CloudEvents, field: event}
mapping:
  filter: doc.type == 'position'
  columns:
  - {name: device, path: data.device, type: text, required: true}
  - {name: ts, path: time, type: timestamptz, required: true, timeFormat: UnixMillis}
  - {name: speed, expression: double(doc.data.speed) * 3.6, type: double precision}
  - {name: tags, path: data.tags, type: "text[]", default: "[]"}
state: {key: device, time: ts, maxKeys: 7}
batch: {maxRows: 10, maxBytes: 2048, linger: 20ms, writers: 1}
errors: {maxDeliveries: 9, policy: DeadLetter}
drain: {timeout: 20s}
sink:
  fanOut:
  - name: latest
    table: {TABLE schema: s, name: latest, key: [device], create: IfMissing, conflict: {action: UpdateIfNewer, newer: ts}}
  - name: archive
    mapping: {filter: has(doc.data), columns: [{name: id, path: "@id", type: text}]}
    table: {name: archive, idempotency: Ledger, conflict: {action: Nothing}}
  - name: strict
    table: {name: strict, key: [device], conflict: {detectMismatch: true}}
  - name: totals
    sql: {statement: insert into totals select device from batch}
  - name: onward
    stream: {route: "'positions_' + doc.region", key: row.device, headers: {origin: "'redis'"}, payload: doc.data}
  - name: fixed
    stream: {stream: positions}
  - name: web
    http: {url: "https://example.org/events", mode: Batch, type: org.example.position, data: row, headers: {X-Tenant: acme}, timeout: 3s, maxConcurrent: 2}
`
	want, err := config.Parse([]byte("name: all\nsource: {redis: {streams: [a, b], group: g, start: Latest, reclaimAfter: 1m, afterAck: Trim, ownership: Exclusive}}" +
		strings.Replace(shared, "TABLE", "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	spec := "source: {redis: {urlSecretRef: {name: r, key: url}, tlsSecretRef: {name: tls}, streams: [a, b], group: g, start: Latest, reclaimAfter: 1m, afterAck: Trim, ownership: Exclusive}}" +
		strings.Replace(strings.Replace(shared, "TABLE", "databaseSecretRef: {name: app-db, key: dsn},", 1), "maxBytes: 2048", "maxBytes: 2Ki", 1)
	p := w.processor("all", indent(spec))
	if got := w.file(p, anything); !reflect.DeepEqual(got, want) {
		a, _ := got.Marshal()
		b, _ := want.Marshal()
		t.Errorf("the file is\n%s\nand should be\n%s", a, b)
	}

	pod := w.deployment(p).Spec.Template.Spec
	env := environment(pod.Containers[0])
	if env[config.EnvRedisURL+"_FILE"] != "/run/millrace/secrets/r/url" || env[config.EnvRedisTLSDir] != "/run/millrace/redis-tls" ||
		env[config.EnvSinkDatabaseURL+"_FILE"] != "/run/millrace/secrets/app-db/dsn" || len(env) != 3 {
		t.Errorf("the environment is %v", env)
	}
	w.wantNoLeak("redis-password-1234")
}

func indent(text string) string { return "  " + strings.ReplaceAll(text, "\n", "\n  ") }

func environment(c corev1.Container) map[string]string {
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	return env
}

const aColumn = "  mapping: {columns: [{name: id, path: id, type: text, required: true}]}\n"

// What spec leaves out is the same as what the file leaves out.
func TestDefaultsOfTheResourceAreThoseOfTheFile(t *testing.T) {
	w := newWorld(t)
	w.secret("r", "url", redisURL)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	const shared = `
mapping: {columns: [{name: id, path: id, type: text, required: true}]}
sink:
  fanOut:
  - {name: rows, table: {name: rows, key: [id]}}
  - {name: web, http: {url: "https://example.org", DATABASE}}
`
	want, err := config.Parse([]byte("name: least\nsource: {redis: {streams: [s], group: least}}" + strings.Replace(shared, ", DATABASE", "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	p := w.processor("least", indent("source: {redis: {urlSecretRef: {name: r, key: url}, streams: [s]}}"+
		strings.Replace(shared, "DATABASE", "databaseSecretRef: {name: app-db, key: dsn}", 1)))
	if got := w.file(p, anything); !reflect.DeepEqual(got, want) {
		a, _ := got.Marshal()
		b, _ := want.Marshal()
		t.Errorf("the file is\n%s\nand should be\n%s", a, b)
	}
}

func TestAMemoryReachesTheFile(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.create(newStream("orders"))
	w.create(newGroup("sink", "orders"))
	p := w.processor("flows", `
  source: {consumerGroup: {name: sink}}
  memory: {name: flows, subject: doc.order_id, create: IfMissing, table: public.flows, keepCompleted: 720h}
  sink: {http: {url: "https://example.org"}}
`)
	want := config.Memory{Name: "flows", Subject: "doc.order_id", Create: config.CreateIfMissing, Table: "public.flows", KeepCompleted: config.Duration(720 * time.Hour)}
	if c := w.file(p, anything); c.Memory == nil || *c.Memory != want {
		t.Errorf("the memory is %+v, not %+v", c.Memory, want)
	}
	wrong := w.processor("wrong", `
  source: {consumerGroup: {name: sink}}
  memory: {name: flows, subject: doc.}
  sink: {http: {url: "https://example.org"}}
`)
	w.wantNotReady(wrong, v1alpha1.ReasonInvalidConfiguration, "spec.memory.subject: ")
}

// The Secrets of an HTTP sink are files, and no part of the ConfigMap.
func TestHTTPSecretsAreFiles(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("hook-url", "url", "https://example.org/hook/secret-path-1234")
	w.secret("hook", "token", "Bearer secret-token-1234")
	w.secret("key", "key", "secret-key-1234")
	w.create(newStream("orders"))
	w.create(newGroup("sink", "orders"))
	p := w.processor("web", `
  source: {consumerGroup: {name: sink}}
  sink: {http: {urlSecretRef: {name: hook-url, key: url}, authorizationSecretRef: {name: hook, key: token}, signingKeySecretRef: {name: key, key: key}}}
`)
	if c := w.file(p, anything); c.Sink.HTTP.URL != "" || len(c.Mapping.Columns) != 0 {
		t.Errorf("the sink is %+v", c.Sink.HTTP)
	}
	env := environment(w.deployment(p).Spec.Template.Spec.Containers[0])
	for name, file := range map[string]string{
		config.EnvHTTPURL: "hook-url/url", config.EnvHTTPAuthorization: "hook/token", config.EnvHTTPSigningKey: "key/key",
	} {
		if got := env[name+"_FILE"]; got != "/run/millrace/secrets/"+file {
			t.Errorf("%s is in %q", name, got)
		}
	}
	w.wantNoLeak("secret-path-1234", "secret-token-1234", "secret-key-1234")

	w.secret("hook", "token", "Bearer a\nb")
	w.wantNotReady(p, v1alpha1.ReasonSecretInvalid, `Secret "hook", key "token"`, "on one line")
}

// A sidecar starts before the processor, ends after it, sees no Secret, and meets the restricted standard.
func TestAnHTTPSinkCanBeASidecar(t *testing.T) {
	w := newWorld(t)
	w.kubectl("label", "namespace", w.namespace, "pod-security.kubernetes.io/enforce=restricted")
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("rules", "", fromRedis, func(p *v1alpha1.ProcessorSpec) {
		p.Sink = v1alpha1.Sink{HTTP: &v1alpha1.HTTPSink{
			DatabaseSecretRef: ptr.To(appDB),
			Sidecar: &v1alpha1.Sidecar{Image: "docker.io/my/rules:1", Port: 9000, Path: "/events", Args: []string{"--strict"},
				Env: []v1alpha1.EnvVar{{Name: "MODE", Value: "fast"}}},
		}}
	})
	w.create(p)
	if c := w.file(p, anything); c.Sink.HTTP.URL != "http://127.0.0.1:9000/events" {
		t.Errorf("the sink posts to %s", c.Sink.HTTP.URL)
	}
	d := w.deployment(p)
	if n := len(d.Spec.Template.Spec.InitContainers); n != 1 {
		t.Fatalf("there are %d sidecars", n)
	}
	s := d.Spec.Template.Spec.InitContainers[0]
	if s.RestartPolicy == nil || *s.RestartPolicy != corev1.ContainerRestartPolicyAlways || s.Image != "docker.io/my/rules:1" ||
		!reflect.DeepEqual(s.Args, []string{"--strict"}) || environment(s)["MODE"] != "fast" {
		t.Errorf("the sidecar is %+v", s)
	}
	if len(s.VolumeMounts) != 0 || len(s.Env) != 1 {
		t.Errorf("the sidecar sees %v and %v", s.VolumeMounts, s.Env)
	}
	w.create(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "probe", Labels: d.Spec.Template.Labels},
		Spec:       d.Spec.Template.Spec,
	})
}

// A descriptor set in a ConfigMap becomes part of the file, after it has been looked into.
func TestADescriptorSetComesFromAConfigMap(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) {
		p.Codec = v1alpha1.Codec{Type: v1alpha1.CodecProtobuf, Protobuf: &v1alpha1.ProtobufCodec{
			Message: "telemetry.v1.Position", DescriptorSetRef: &v1alpha1.ConfigMapKeyReference{Name: "schemas", Key: "position.pb"},
		}}
	})
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonConfigMapMissing, `ConfigMap "schemas"`, "kubectl -n "+w.namespace+" create configmap schemas --from-file=position.pb")
	field := func(name string, number int32) *descriptorpb.FieldDescriptorProto {
		return &descriptorpb.FieldDescriptorProto{
			Name: &name, Number: &number, Type: new(descriptorpb.FieldDescriptorProto_TYPE_STRING), Label: new(descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL),
		}
	}
	set, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{{
		Name: new("position.proto"), Package: new("telemetry.v1"), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{Name: new("Order"), Field: []*descriptorpb.FieldDescriptorProto{field("order_id", 1), field("amount", 2)}}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	w.create(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "schemas"}, BinaryData: map[string][]byte{"position.pb": set}})
	w.wantNotReady(p, v1alpha1.ReasonInvalidConfiguration, "spec.codec.protobuf.message", "the descriptor set has no telemetry.v1.Position")
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Codec.Protobuf.Message = "telemetry.v1.Order" })
	c := w.file(p, anything)
	if c.Codec.Protobuf.DescriptorSet != base64.StdEncoding.EncodeToString(set) {
		t.Errorf("the codec is %+v", c.Codec.Protobuf)
	}
}

// A mistake in an expression is a condition and reaches no pod.
func TestAMistakeInAnExpressionIsACondition(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("telemetry-redis", "url", redisURL)
	p := newProcessor("telemetry", "", fromRedis, func(p *v1alpha1.ProcessorSpec) { p.Mapping.Filter = "doc.amount >" })
	w.create(p)
	w.wantNotReady(p, v1alpha1.ReasonInvalidConfiguration, "spec.mapping.filter: at character 13")
	update(w, p, func(p *v1alpha1.Processor) { p.Spec.Mapping.Filter = "doc.amount > 0" })
	w.file(p, func(c *config.Config) bool { return c.Mapping.Filter == "doc.amount > 0" })
}

func TestWhereADatabaseHasToBeNamed(t *testing.T) {
	w := newWorld(t)
	w.secret(appDB.Name, appDB.Key, postgres.NewDatabase(t))
	w.secret("other-db", "dsn", postgres.NewDatabase(t))
	w.secret("r", "url", redisURL)
	redis := "  source: {redis: {urlSecretRef: {name: r, key: url}, streams: [s]}}\n"
	two := w.processor("two", redis+aColumn+`  sink:
    fanOut:
    - {name: a, table: {name: a, key: [id], databaseSecretRef: {name: app-db, key: dsn}}}
    - {name: b, sql: {statement: insert into b select id from batch, databaseSecretRef: {name: other-db, key: dsn}}}
`)
	w.wantNotReady(two, v1alpha1.ReasonInvalidConfiguration, "spec.sink.fanOut[0].table.databaseSecretRef and spec.sink.fanOut[1].sql.databaseSecretRef name different Secret keys")
	letters := w.processor("letters", redis+`  sink: {http: {url: "https://example.org"}}`)
	w.wantNotReady(letters, v1alpha1.ReasonDatabaseSecretRefRequired, "spec.sink.http.databaseSecretRef is missing", "dead letters", "spec.errors.policy to Pending")
	update(w, letters, func(p *v1alpha1.Processor) { p.Spec.Errors.Policy = v1alpha1.ErrorPending })
	w.file(letters, func(c *config.Config) bool { return c.Errors.Policy == config.PolicyPending })
	if env := environment(w.deployment(letters).Spec.Template.Spec.Containers[0]); len(env) != 1 {
		t.Errorf("a processor without a database has %v", env)
	}
}
