package processor

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pipeline/config"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// resolve finds what spec refers to: the ConsumerGroup and its Stream, the Secrets of both ends, and the descriptor set.
func (r *Reconciler) resolve(ctx context.Context, sc *scope) error {
	p, in := sc.processor, &sc.inputs
	in.image, in.pullPolicy, in.pullSecrets = r.Image, r.ImagePullPolicy, r.ImagePullSecrets
	if p.Spec.Image != "" {
		in.image = p.Spec.Image
	}
	if pod := p.Spec.Pod; pod != nil && len(pod.ImagePullSecrets) > 0 {
		in.pullSecrets = nil
		for _, s := range pod.ImagePullSecrets {
			in.pullSecrets = append(in.pullSecrets, s.Name)
		}
	}
	if redis := p.Spec.Source.Redis; redis != nil {
		in.use(config.EnvRedisURL, &redis.URLSecretRef, redisstream.CheckURL, withoutCredentials)
		in.tls = redis.TLSSecretRef
	}
	var source *v1alpha1.SecretKeyReference
	if group := p.Spec.Source.ConsumerGroup; group != nil {
		var err error
		if source, err = r.resolveGroup(ctx, sc, group); err != nil {
			return err
		}
		in.use(config.EnvSourceDatabaseURL, source, database.Check, withoutCredentials)
		in.use(config.EnvSourceListenURL, group.ListenSecretRef, database.Check, withoutCredentials)
	}
	sink, err := sinkDatabase(p, source)
	if err != nil {
		return err
	}
	in.use(config.EnvSinkDatabaseURL, sink, database.Check, withoutCredentials)
	for _, h := range httpSinks(p) {
		in.use(config.EnvHTTPURL, h.URLSecretRef, checkHTTP, nil)
		in.use(config.EnvHTTPAuthorization, h.AuthorizationSecretRef, checkHeader, nil)
		in.use(config.EnvHTTPSigningKey, h.SigningKeySecretRef, checkNotEmpty, nil)
	}
	if err := r.readSecrets(ctx, sc); err != nil {
		return err
	}
	return r.readDescriptorSet(ctx, sc)
}

// use notes a key of a Secret that pods read, when there is one.
func (in *inputs) use(variable string, ref *v1alpha1.SecretKeyReference, check func(string) error, address func(string) string) {
	if ref != nil {
		in.secrets = append(in.secrets, secretFile{variable: variable, ref: *ref, check: check, address: address})
	}
}

// sinkDatabase is the Secret key of the database that the sinks write into, or where dead letters go; nil when there is nothing to write.
func sinkDatabase(p *v1alpha1.Processor, source *v1alpha1.SecretKeyReference) (*v1alpha1.SecretKeyReference, error) {
	var sink *v1alpha1.SecretKeyReference
	var at, missing string
	writes := false
	for _, b := range databaseRefs(p) {
		if b.writes {
			writes = true
			if missing == "" {
				missing = b.at
			}
		}
		switch {
		case b.ref == nil:
		case sink == nil:
			sink, at = b.ref, b.at
		case *sink != *b.ref:
			return nil, phase.Stallf(v1alpha1.ReasonInvalidConfiguration,
				"%s and %s name different Secret keys, and a fan-out writes into one database. Name one of them, or write a second Processor", at, b.at)
		}
	}
	// Messages that cannot be written stay with their group; entries of Redis need a place.
	letters := p.Spec.Source.Redis != nil && p.Spec.Errors.Policy != v1alpha1.ErrorPending
	switch {
	case sink != nil:
		return sink, nil
	case source != nil:
		return source, nil // the same database: rows and acks commit together
	case writes:
		return nil, phase.Stallf(v1alpha1.ReasonDatabaseSecretRefRequired,
			"%s is missing. A pod reads its connection string from a Secret in its own namespace, so the "+
				"installation's default database is of no use to it; name a Secret key in namespace %q", missing, p.Namespace)
	case letters:
		return nil, phase.Stallf(v1alpha1.ReasonDatabaseSecretRefRequired,
			"%s is missing: entries of Redis that cannot be processed become dead letters in that database. "+
				"Name a Secret key in namespace %q, or set spec.errors.policy to Pending", databaseRefs(p)[0].at, p.Namespace)
	}
	return nil, nil
}

// resolveGroup finds the group and the Secret key of its database.
func (r *Reconciler) resolveGroup(ctx context.Context, sc *scope, source *v1alpha1.ConsumerGroupSource) (*v1alpha1.SecretKeyReference, error) {
	namespace := sc.processor.Namespace
	var group v1alpha1.ConsumerGroup
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: source.Name}, &group)
	if apierrors.IsNotFound(err) {
		return nil, phase.Waitf(v1alpha1.ReasonConsumerGroupMissing, 0,
			"ConsumerGroup %q does not exist in namespace %q. Create it, or name another in spec.source.consumerGroup", source.Name, namespace)
	}
	if err != nil {
		return nil, fmt.Errorf("read ConsumerGroup %q: %w", source.Name, err)
	}
	if phase.New(&group, r.Clock.Now()) {
		return nil, phase.Again(phase.NewFor, errors.New("the ConsumerGroup has not been looked at yet"))
	}
	if !group.InDatabase() {
		text := fmt.Sprintf("ConsumerGroup %q is not in its database yet", group.Name)
		if c := meta.FindStatusCondition(group.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Message != "" {
			text += fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
		}
		return nil, phase.Waitf(v1alpha1.ReasonConsumerGroupNotReady, 0, "%s", text)
	}
	sc.inputs.group = &group
	if source.DatabaseSecretRef != nil {
		return source.DatabaseSecretRef, nil
	}
	stream, err := r.streamOf(ctx, &group)
	if err != nil {
		return nil, err
	}
	if stream.Spec.DatabaseSecretRef == nil {
		return nil, phase.Stallf(v1alpha1.ReasonDatabaseSecretRefRequired,
			"Stream %q lives in the installation's default database, whose Secret pods cannot use. "+
				"Set spec.source.consumerGroup.databaseSecretRef to a Secret key in namespace %q that leads to the same database", stream.Name, namespace)
	}
	return stream.Spec.DatabaseSecretRef, nil
}

// streamOf finds the Stream of a group.
func (r *Reconciler) streamOf(ctx context.Context, g *v1alpha1.ConsumerGroup) (*v1alpha1.Stream, error) {
	var stream v1alpha1.Stream
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: g.Namespace, Name: g.Spec.StreamRef.Name}, &stream)
	if apierrors.IsNotFound(err) {
		return nil, phase.Waitf(v1alpha1.ReasonStreamMissing, 0, "Stream %q of ConsumerGroup %q does not exist in namespace %q. Create it",
			g.Spec.StreamRef.Name, g.Name, g.Namespace)
	}
	if err != nil {
		return nil, fmt.Errorf("read Stream %q: %w", g.Spec.StreamRef.Name, err)
	}
	return &stream, nil
}

// readSecrets makes sure that what pods will read is there and looks right.
func (r *Reconciler) readSecrets(ctx context.Context, sc *scope) error {
	in, namespace := &sc.inputs, sc.processor.Namespace
	for _, s := range in.secrets {
		learnt, err := r.readSecret(ctx, namespace, s)
		if err != nil {
			return err
		}
		if learnt.login != (login{}) {
			if in.logins == nil {
				in.logins = map[string]login{}
			}
			in.logins[s.variable] = learnt.login
		}
		if s.address != nil {
			in.addresses = append(in.addresses, s.variable+"="+learnt.address)
		}
	}
	if in.tls == nil {
		return nil
	}
	return r.readCertificates(ctx, namespace, in.tls.Name)
}

// readCertificates checks that the Secret for TLS holds something that a pod can use. Keys that are missing are no error of
// their own: a private authority needs no client certificate, and the other way round.
func (r *Reconciler) readCertificates(ctx context.Context, namespace, name string) error {
	var secret corev1.Secret
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, &secret)
	switch {
	case apierrors.IsNotFound(err):
		return phase.Waitf(v1alpha1.ReasonSecretMissing, 0, "Secret %q does not exist in namespace %q. Create it with ca.crt, or with tls.crt and tls.key", name, namespace)
	case err != nil:
		return fmt.Errorf("read Secret %q: %w", name, err)
	}
	has := func(key string) bool { return len(secret.Data[key]) > 0 }
	switch {
	case has("tls.crt") != has("tls.key"):
		return phase.Stallf(v1alpha1.ReasonSecretInvalid, "Secret %q has one of tls.crt and tls.key; a client certificate needs both", name)
	case !has("ca.crt") && !has("tls.crt"):
		return phase.Stallf(v1alpha1.ReasonSecretKeyMissing, "Secret %q has neither ca.crt nor tls.crt with tls.key. Add them, or remove tlsSecretRef", name)
	}
	return nil
}

// descriptorLook is how often a ConfigMap is looked for that is not there. One that changes is noticed at the next verification.
const descriptorLook = 10 * time.Second

// readDescriptorSet finds the codec's descriptor set, which becomes part of the configuration file.
func (r *Reconciler) readDescriptorSet(ctx context.Context, sc *scope) error {
	codec, namespace := sc.processor.Spec.Codec.Protobuf, sc.processor.Namespace
	if codec == nil {
		return nil
	}
	ref := codec.DescriptorSetRef
	if ref == nil {
		sc.inputs.descriptorSet = codec.DescriptorSet
		return nil
	}
	var file corev1.ConfigMap
	err := r.Live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: ref.Name}, &file)
	switch {
	case apierrors.IsNotFound(err):
		return phase.Waitf(v1alpha1.ReasonConfigMapMissing, descriptorLook,
			"ConfigMap %q does not exist in namespace %q. Create it with key %q, for example: kubectl -n %s create configmap %s --from-file=%s",
			ref.Name, namespace, ref.Key, namespace, ref.Name, ref.Key)
	case err != nil:
		return fmt.Errorf("read ConfigMap %q: %w", ref.Name, err)
	}
	data, ok := file.BinaryData[ref.Key]
	if !ok {
		var text string
		if text, ok = file.Data[ref.Key]; !ok {
			return phase.Waitf(v1alpha1.ReasonConfigMapMissing, descriptorLook, "ConfigMap %q has no key %q. Add it, or name another in spec.codec.protobuf.descriptorSetRef",
				ref.Name, ref.Key)
		}
		data = []byte(text) // a file that happens to be text
	}
	sc.inputs.descriptorSet = base64.StdEncoding.EncodeToString(data)
	return nil
}

// checkHTTP says what is wrong with the address of an HTTP sink, and nothing of what it is.
func checkHTTP(value string) error {
	u, err := url.Parse(value)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("the value is not the address of a web server; write https://host/path")
	}
	return nil
}

func checkHeader(value string) error {
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return errors.New("the value holds a line break or another control character; write it on one line, such as Bearer …")
	}
	return checkNotEmpty(value)
}

func checkNotEmpty(value string) error {
	if value == "" {
		return errors.New("the value is empty")
	}
	return nil
}
