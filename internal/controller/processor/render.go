package processor

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"path"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	appsac "k8s.io/client-go/applyconfigurations/apps/v1"
	coreac "k8s.io/client-go/applyconfigurations/core/v1"
	metaac "k8s.io/client-go/applyconfigurations/meta/v1"
	policyac "k8s.io/client-go/applyconfigurations/policy/v1"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

const (
	configPath = "/etc/millrace"
	configKey  = "processor.yaml"
	secretPath = "/run/millrace/secrets"   // <Secret>/<key>
	tlsPath    = "/run/millrace/redis-tls" // ca.crt, tls.crt, tls.key
	httpPort   = 8080
	container  = "processor"
	sidecar    = "sidecar"

	// graceMargin is how much longer than its drain a pod may take: for closing connections, and for a node that is slow.
	graceMargin = 15 * time.Second
	// progressDeadline is how long a rollout may stand still before the Deployment calls it failed.
	progressDeadline = 120

	// user of the image. Pods run as nobody in particular.
	user int64 = 65532
)

// objects are what a Processor becomes.
type objects struct {
	config         *coreac.ConfigMapApplyConfiguration
	serviceAccount *coreac.ServiceAccountApplyConfiguration // nil when spec names one
	deployment     *appsac.DeploymentApplyConfiguration
	budget         *policyac.PodDisruptionBudgetApplyConfiguration
}

// childName names every object of a Processor. Its suffix keeps it from meeting an application of the same name.
func childName(p *v1alpha1.Processor) string { return p.Name + "-processor" }

// selectorLabels match the pods of a Processor. They never change: a Deployment's selector cannot.
func selectorLabels(p *v1alpha1.Processor) map[string]string {
	return map[string]string{"app.kubernetes.io/name": "millrace-processor", v1alpha1.LabelProcessor: p.Name}
}

func labels(p *v1alpha1.Processor) map[string]string {
	l := selectorLabels(p)
	l["app.kubernetes.io/instance"] = p.Name
	l["app.kubernetes.io/managed-by"] = "millrace"
	return l
}

// render turns spec and inputs into objects. It is pure: equal input gives equal objects. Its error is a stall of the
// configuration, with every problem in it.
func render(p *v1alpha1.Processor, in inputs) (*objects, error) {
	file, err := renderConfig(p, in)
	if err != nil {
		return nil, err
	}
	name, reference := childName(p), ownerReference(p)
	o := &objects{}
	o.config = coreac.ConfigMap(name, p.Namespace).WithLabels(labels(p)).WithOwnerReferences(reference).
		WithData(map[string]string{configKey: string(file)})
	account := name
	if p.Spec.Pod != nil && p.Spec.Pod.ServiceAccountName != "" {
		account = p.Spec.Pod.ServiceAccountName
	} else {
		o.serviceAccount = coreac.ServiceAccount(name, p.Namespace).WithLabels(labels(p)).WithOwnerReferences(reference).
			WithAutomountServiceAccountToken(false)
	}
	selector := metaac.LabelSelector().WithMatchLabels(selectorLabels(p))
	o.budget = policyac.PodDisruptionBudget(name, p.Namespace).WithLabels(labels(p)).WithOwnerReferences(reference).
		WithSpec(policyac.PodDisruptionBudgetSpec().WithSelector(selector).WithMaxUnavailable(intstr.FromInt32(1)).
			// A pod that is not ready protects nothing, and must not keep a node from being drained.
			WithUnhealthyPodEvictionPolicy(policyv1.AlwaysAllow))
	spec := appsac.DeploymentSpec().
		WithSelector(selector).
		WithProgressDeadlineSeconds(progressDeadline).
		WithRevisionHistoryLimit(3).
		// One more before one less: claims are fenced, so old and new pods may work side by side.
		WithStrategy(appsac.DeploymentStrategy().WithType(appsv1.RollingUpdateDeploymentStrategyType).
			WithRollingUpdate(appsac.RollingUpdateDeployment().WithMaxSurge(intstr.FromInt32(1)).WithMaxUnavailable(intstr.FromInt32(0)))).
		WithTemplate(podTemplate(p, in, account, file))
	if in.replicas != nil {
		spec.WithReplicas(*in.replicas) // or an HPA on the Deployment owns the field
	}
	o.deployment = appsac.Deployment(name, p.Namespace).WithLabels(labels(p)).WithOwnerReferences(reference).WithSpec(spec)
	return o, nil
}

// renderConfig writes the file that the pods read, after it has passed the checks that the pods would make (C1).
func renderConfig(p *v1alpha1.Processor, in inputs) ([]byte, error) {
	c := configOf(p, in)
	c.Defaults()
	if err := c.Validate(); err != nil {
		return nil, invalid(err)
	}
	return c.Marshal()
}

// invalid tells every problem with its place in spec: the file has the shape of spec.
func invalid(err error) error {
	problems, ok := errors.AsType[config.Problems](err)
	if !ok {
		return err
	}
	lines := make([]string, 0, len(problems))
	for _, p := range problems {
		lines = append(lines, "spec."+p.Path+": "+p.Message)
	}
	return errors.New(strings.Join(lines, "\n"))
}

// configOf turns a Processor into the processor's own terms.
func configOf(p *v1alpha1.Processor, in inputs) *config.Config {
	s := &p.Spec
	c := &config.Config{
		Name:    p.Name,
		Codec:   config.Codec{Type: config.CodecType(s.Codec.Type), Field: s.Codec.Field},
		Mapping: mappingOf(&s.Mapping),
		Errors:  config.Errors{MaxDeliveries: int(s.Errors.MaxDeliveries), Policy: config.ErrorPolicy(s.Errors.Policy)},
		Batch:   config.Batch{MaxRows: int(s.Batch.MaxRows), Writers: int(s.Batch.Writers)},
	}
	if q := s.Batch.MaxBytes; q != nil {
		c.Batch.MaxBytes = int(min(q.Value(), math.MaxInt32))
	}
	c.Batch.Linger = duration(s.Batch.Linger)
	c.Drain.Timeout = duration(s.Drain.Timeout)
	if redis := s.Source.Redis; redis != nil {
		c.Source.Redis = &config.RedisSource{
			Streams: redis.Streams, Group: redis.Group, Start: config.StartFrom(redis.Start), ReclaimAfter: duration(redis.ReclaimAfter),
			AfterAck: config.AfterAck(redis.AfterAck), Ownership: config.Ownership(redis.Ownership),
		}
		if c.Source.Redis.Group == "" {
			c.Source.Redis.Group = p.Name
		}
	}
	if group := in.group; group != nil {
		c.Source.ConsumerGroup = &config.ConsumerGroupSource{
			Stream: group.Status.Stream, Group: group.Status.Name, Mode: config.GroupMode(group.Spec.Mode),
		}
	}
	if codec := s.Codec.Protobuf; codec != nil {
		c.Codec.Protobuf = &config.ProtobufCodec{DescriptorSet: in.descriptorSet, Message: codec.Message}
	}
	if s.State != nil {
		c.State = &config.State{Key: s.State.Key, Time: s.State.Time, MaxKeys: int(s.State.MaxKeys)}
	}
	if m := s.Memory; m != nil {
		c.Memory = &config.Memory{Name: m.Name, Subject: m.Subject, Create: config.Create(m.Create), Table: m.Table, KeepCompleted: duration(m.KeepCompleted)}
	}
	c.Sink = config.Sink{Table: tableOf(s.Sink.Table), Stream: streamOf(s.Sink.Stream), SQL: sqlOf(s.Sink.SQL), HTTP: httpOf(s.Sink.HTTP)}
	if s.Sink.Projection != nil && in.group != nil {
		project(c)
	}
	for _, b := range s.Sink.FanOut {
		branch := config.Branch{Name: b.Name, Table: tableOf(b.Table), Stream: streamOf(b.Stream), SQL: sqlOf(b.SQL), HTTP: httpOf(b.HTTP)}
		if b.Mapping != nil {
			m := mappingOf(b.Mapping)
			branch.Mapping = &m
		}
		c.Sink.FanOut = append(c.Sink.FanOut, branch)
	}
	return c
}

// project makes the sink call the group's projection. The function reads the messages where they are, so their positions are enough.
func project(c *config.Config) {
	quote := func(name string) string { return "'" + strings.ReplaceAll(name, "'", "''") + "'" }
	group := c.Source.ConsumerGroup
	c.Mapping.Columns = []config.Column{{Name: "position", Path: config.PropertyPosition, Type: config.TypeBigint}}
	c.Sink.SQL = &config.SQLSink{Statement: fmt.Sprintf("select millrace.project(%s, %s, array_agg(position)) from batch", quote(group.Stream), quote(group.Group))}
}

func mappingOf(m *v1alpha1.Mapping) config.Mapping {
	out := config.Mapping{Filter: m.Filter}
	for _, col := range m.Columns {
		out.Columns = append(out.Columns, config.Column{
			Name: col.Name, Path: col.Path, Expression: col.Expression, Type: config.ColumnType(col.Type), Required: col.Required,
			Default: col.Default, TimeFormat: config.TimeFormat(col.TimeFormat),
		})
	}
	return out
}

func tableOf(t *v1alpha1.TableSink) *config.TableSink {
	if t == nil {
		return nil
	}
	return &config.TableSink{
		Schema: t.Schema, Name: t.Name, Key: t.Key, Create: config.Create(t.Create), Idempotency: config.Idempotency(t.Idempotency),
		Conflict: config.Conflict{Action: config.ConflictAction(t.Conflict.Action), Newer: t.Conflict.Newer, DetectMismatch: t.Conflict.DetectMismatch},
	}
}

func streamOf(s *v1alpha1.StreamSink) *config.StreamSink {
	if s == nil {
		return nil
	}
	return &config.StreamSink{Stream: s.Stream, Route: s.Route, Key: s.Key, Headers: s.Headers, Payload: s.Payload}
}

func sqlOf(s *v1alpha1.SQLSink) *config.SQLSink {
	if s == nil {
		return nil
	}
	return &config.SQLSink{Statement: s.Statement}
}

// httpOf leaves the URL out when the pods read it from a Secret.
func httpOf(h *v1alpha1.HTTPSink) *config.HTTPSink {
	if h == nil {
		return nil
	}
	out := &config.HTTPSink{
		URL: h.URL, Mode: config.HTTPMode(h.Mode), Type: h.Type, Data: h.Data, Headers: h.Headers, Timeout: duration(h.Timeout),
		MaxConcurrent: int(h.MaxConcurrent),
	}
	if s := h.Sidecar; s != nil {
		out.URL = fmt.Sprintf("http://127.0.0.1:%d%s", s.Port, s.Path)
	}
	return out
}

func duration(d *metav1.Duration) config.Duration {
	if d == nil {
		return 0
	}
	return config.Duration(d.Duration)
}

func podTemplate(p *v1alpha1.Processor, in inputs, account string, file []byte) *coreac.PodTemplateSpecApplyConfiguration {
	choice := p.Spec.Pod
	if choice == nil {
		choice = &v1alpha1.PodTemplate{}
	}
	podLabels, annotations := maps.Clone(choice.Labels), maps.Clone(choice.Annotations)
	if podLabels == nil {
		podLabels = map[string]string{}
	}
	if annotations == nil {
		annotations = map[string]string{}
	}
	maps.Copy(podLabels, labels(p))
	annotations[v1alpha1.AnnotationConfigHash] = hash(string(file))
	annotations[v1alpha1.AnnotationSecretHash] = hash(in.addresses...)

	grace := config.DefaultDrainTimeout
	if d := p.Spec.Drain.Timeout; d != nil {
		grace = config.Duration(d.Duration)
	}
	spec := coreac.PodSpec().
		WithServiceAccountName(account).
		WithAutomountServiceAccountToken(false).
		WithEnableServiceLinks(false).
		WithTerminationGracePeriodSeconds(int64(math.Ceil((time.Duration(grace) + graceMargin).Seconds()))).
		WithSecurityContext(coreac.PodSecurityContext().WithRunAsNonRoot(true).WithRunAsUser(user).WithRunAsGroup(user).
			WithSeccompProfile(coreac.SeccompProfile().WithType(corev1.SeccompProfileTypeRuntimeDefault))).
		WithVolumes(coreac.Volume().WithName("config").WithConfigMap(coreac.ConfigMapVolumeSource().WithName(childName(p)).WithDefaultMode(0o444))).
		WithContainers(processorContainer(in, choice))
	if volume := secretVolume(in.secrets); volume != nil {
		spec.WithVolumes(volume)
	}
	if in.tls != nil {
		spec.WithVolumes(tlsVolume(in.tls.Name))
	}
	for _, h := range httpSinks(p) {
		if h.Sidecar != nil {
			spec.WithInitContainers(sidecarContainer(h.Sidecar))
		}
	}
	if choice.PriorityClassName != "" {
		spec.WithPriorityClassName(choice.PriorityClassName)
	}
	for _, name := range in.pullSecrets {
		spec.WithImagePullSecrets(coreac.LocalObjectReference().WithName(name))
	}
	if len(choice.NodeSelector) > 0 {
		spec.WithNodeSelector(choice.NodeSelector)
	}
	copyInto(choice.Tolerations, &spec.Tolerations)
	copyInto(choice.Affinity, &spec.Affinity)
	copyInto(choice.TopologySpreadConstraints, &spec.TopologySpreadConstraints)
	return coreac.PodTemplateSpec().WithLabels(podLabels).WithAnnotations(annotations).WithSpec(spec)
}

func processorContainer(in inputs, choice *v1alpha1.PodTemplate) *coreac.ContainerApplyConfiguration {
	probe := func(path string) *coreac.ProbeApplyConfiguration {
		return coreac.Probe().WithHTTPGet(coreac.HTTPGetAction().WithPath(path).WithPort(intstr.FromString("http")).WithScheme(corev1.URISchemeHTTP)).
			WithTimeoutSeconds(2).WithSuccessThreshold(1)
	}
	c := coreac.Container().WithName(container).WithImage(in.image).
		WithCommand("/processor").
		WithArgs("--config", configPath+"/"+configKey).
		WithPorts(coreac.ContainerPort().WithName("http").WithContainerPort(httpPort).WithProtocol(corev1.ProtocolTCP)).
		WithVolumeMounts(coreac.VolumeMount().WithName("config").WithMountPath(configPath).WithReadOnly(true)).
		WithSecurityContext(restricted()).
		WithLivenessProbe(probe("/healthz").WithPeriodSeconds(10).WithFailureThreshold(6)).
		WithReadinessProbe(probe("/readyz").WithPeriodSeconds(2).WithFailureThreshold(2)).
		// The end of the log is the termination message, so status can tell why a pod stopped.
		WithTerminationMessagePolicy(corev1.TerminationMessageFallbackToLogsOnError).
		WithResources(resources(choice.Resources))
	if in.pullPolicy != "" {
		c.WithImagePullPolicy(corev1.PullPolicy(in.pullPolicy))
	}
	if len(in.secrets) > 0 {
		c.WithVolumeMounts(coreac.VolumeMount().WithName("secrets").WithMountPath(secretPath).WithReadOnly(true))
	}
	for _, f := range in.secrets {
		c.WithEnv(coreac.EnvVar().WithName(f.variable + "_FILE").WithValue(path.Join(secretPath, f.path())))
	}
	if in.tls != nil {
		c.WithVolumeMounts(coreac.VolumeMount().WithName("redis-tls").WithMountPath(tlsPath).WithReadOnly(true)).
			WithEnv(coreac.EnvVar().WithName(config.EnvRedisTLSDir).WithValue(tlsPath))
	}
	for _, e := range choice.Env {
		c.WithEnv(coreac.EnvVar().WithName(e.Name).WithValue(e.Value))
	}
	return c
}

// restricted is what the restricted Pod Security Standard asks of a container, and a file system that nobody writes.
func restricted() *coreac.SecurityContextApplyConfiguration {
	return coreac.SecurityContext().WithAllowPrivilegeEscalation(false).WithReadOnlyRootFilesystem(true).
		WithCapabilities(coreac.Capabilities().WithDrop("ALL"))
}

// path of the file below secretPath: the same for the same key, whatever it is used for, so that a processor sees that source and
// sink are one database.
func (f secretFile) path() string { return f.ref.Name + "/" + f.ref.Key }

// secretVolume holds the keys that pods use and no others, as files, so that what is rotated reaches a pod while it runs. Nil when there are none.
func secretVolume(files []secretFile) *coreac.VolumeApplyConfiguration {
	if len(files) == 0 {
		return nil
	}
	projected := coreac.ProjectedVolumeSource().WithDefaultMode(0o444)
	seen := map[string]bool{}
	for _, f := range files {
		if seen[f.path()] {
			continue
		}
		seen[f.path()] = true
		projected.WithSources(coreac.VolumeProjection().WithSecret(coreac.SecretProjection().WithName(f.ref.Name).
			WithItems(coreac.KeyToPath().WithKey(f.ref.Key).WithPath(f.path()))))
	}
	return coreac.Volume().WithName("secrets").WithProjected(projected)
}

// tlsVolume holds what there is of the certificates.
func tlsVolume(secret string) *coreac.VolumeApplyConfiguration {
	projected := coreac.ProjectedVolumeSource().WithDefaultMode(0o444)
	for _, key := range []string{"ca.crt", "tls.crt", "tls.key"} {
		projected.WithSources(coreac.VolumeProjection().WithSecret(coreac.SecretProjection().WithName(secret).WithOptional(true).
			WithItems(coreac.KeyToPath().WithKey(key).WithPath(key))))
	}
	return coreac.Volume().WithName("redis-tls").WithProjected(projected)
}

// sidecarContainer is an init container that goes on: Kubernetes starts it before the processor and stops it after it, so that a drain
// still finds it. It has no volume and therefore no Secret.
func sidecarContainer(s *v1alpha1.Sidecar) *coreac.ContainerApplyConfiguration {
	c := coreac.Container().WithName(sidecar).WithImage(s.Image).
		WithRestartPolicy(corev1.ContainerRestartPolicyAlways).
		WithSecurityContext(restricted()).
		WithTerminationMessagePolicy(corev1.TerminationMessageFallbackToLogsOnError).
		WithResources(resources(s.Resources))
	if len(s.Args) > 0 {
		c.WithArgs(s.Args...)
	}
	for _, e := range s.Env {
		c.WithEnv(coreac.EnvVar().WithName(e.Name).WithValue(e.Value))
	}
	return c
}

// resources of the container: what spec says, or enough for a modest pipeline with a limit that a leak would meet.
func resources(r *corev1.ResourceRequirements) *coreac.ResourceRequirementsApplyConfiguration {
	if r == nil {
		r = &corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")},
		}
	}
	out := coreac.ResourceRequirements()
	if len(r.Requests) > 0 {
		out.WithRequests(r.Requests)
	}
	if len(r.Limits) > 0 {
		out.WithLimits(r.Limits)
	}
	return out
}

func ownerReference(p *v1alpha1.Processor) *metaac.OwnerReferenceApplyConfiguration {
	return metaac.OwnerReference().WithAPIVersion(v1alpha1.GroupVersion.String()).WithKind(Kind).WithName(p.Name).WithUID(p.UID).
		WithController(true).WithBlockOwnerDeletion(true)
}

func hash(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:8])
}

func selector(p *v1alpha1.Processor) string {
	return fmt.Sprintf("app.kubernetes.io/name=millrace-processor,%s=%s", v1alpha1.LabelProcessor, p.Name)
}
