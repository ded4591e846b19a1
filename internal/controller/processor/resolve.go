package processor

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/millrace-dev/millrace/api/v1alpha1"
	"github.com/millrace-dev/millrace/internal/controller/database"
	"github.com/millrace-dev/millrace/internal/controller/phase"
	"github.com/millrace-dev/millrace/internal/pipeline/redisstream"
)

// resolve finds what spec refers to: the ConsumerGroup and its Stream, and the Secrets of both ends.
func (r *Reconciler) resolve(ctx context.Context, sc *scope) error {
	p, in := sc.processor, &sc.inputs
	in.image, in.pullPolicy = r.Image, r.ImagePullPolicy
	if p.Spec.Image != "" {
		in.image = p.Spec.Image
	}
	if redis := p.Spec.Source.Redis; redis != nil {
		in.redis = &redis.URLSecretRef
	}
	if source := p.Spec.Source.ConsumerGroup; source != nil {
		if err := r.resolveGroup(ctx, sc, source); err != nil {
			return err
		}
	}
	if table := p.Spec.Sink.Table; table != nil {
		in.sink = table.DatabaseSecretRef
	}
	if in.sink == nil {
		in.sink = in.source // the same database: rows and acks commit together
	}
	if in.sink == nil {
		return phase.Stallf(v1alpha1.ReasonDatabaseSecretRefRequired,
			"spec.sink.table.databaseSecretRef is missing. A pod reads its connection string from a Secret in its own namespace, so the "+
				"installation's default database is of no use to it; name a Secret key in namespace %q", p.Namespace)
	}
	return r.readSecrets(ctx, sc)
}

func (r *Reconciler) resolveGroup(ctx context.Context, sc *scope, source *v1alpha1.ConsumerGroupSource) error {
	namespace := sc.processor.Namespace
	var group v1alpha1.ConsumerGroup
	err := r.Client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: source.Name}, &group)
	if apierrors.IsNotFound(err) {
		return phase.Waitf(v1alpha1.ReasonConsumerGroupMissing, 0,
			"ConsumerGroup %q does not exist in namespace %q. Create it, or name another in spec.source.consumerGroup", source.Name, namespace)
	}
	if err != nil {
		return fmt.Errorf("read ConsumerGroup %q: %w", source.Name, err)
	}
	if !meta.IsStatusConditionTrue(group.Status.Conditions, v1alpha1.ConditionSchemaApplied) {
		text := fmt.Sprintf("ConsumerGroup %q is not in its database yet", group.Name)
		if c := meta.FindStatusCondition(group.Status.Conditions, v1alpha1.ConditionReady); c != nil && c.Message != "" {
			text += fmt.Sprintf(" (%s: %s)", c.Reason, c.Message)
		}
		return phase.Waitf(v1alpha1.ReasonConsumerGroupNotReady, 0, "%s", text)
	}
	sc.inputs.group = &group
	if sc.inputs.source = source.DatabaseSecretRef; sc.inputs.source != nil {
		return nil
	}
	var stream v1alpha1.Stream
	err = r.Client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: group.Spec.StreamRef.Name}, &stream)
	if apierrors.IsNotFound(err) {
		return phase.Waitf(v1alpha1.ReasonStreamMissing, 0, "Stream %q of ConsumerGroup %q does not exist in namespace %q. Create it",
			group.Spec.StreamRef.Name, group.Name, namespace)
	}
	if err != nil {
		return fmt.Errorf("read Stream %q: %w", group.Spec.StreamRef.Name, err)
	}
	if stream.Spec.DatabaseSecretRef == nil {
		return phase.Stallf(v1alpha1.ReasonDatabaseSecretRefRequired,
			"Stream %q lives in the installation's default database, whose Secret pods cannot use. "+
				"Set spec.source.consumerGroup.databaseSecretRef to a Secret key in namespace %q that leads to the same database", stream.Name, namespace)
	}
	sc.inputs.source = stream.Spec.DatabaseSecretRef
	return nil
}

// readSecrets makes sure that what pods will read is there and looks right. Values are checked and forgotten (C3).
func (r *Reconciler) readSecrets(ctx context.Context, sc *scope) error {
	in := &sc.inputs
	for _, s := range []struct {
		ref   *v1alpha1.SecretKeyReference
		check func(value string) error
	}{{in.redis, redisstream.CheckURL}, {in.source, database.Check}, {in.sink, database.Check}} {
		if s.ref == nil {
			continue
		}
		value, version, err := database.ReadSecret(ctx, r.Live, sc.processor.Namespace, *s.ref)
		if err != nil {
			return err
		}
		if err := s.check(value); err != nil {
			return phase.Stallf(v1alpha1.ReasonSecretInvalid, "Secret %q, key %q: %w", s.ref.Name, s.ref.Key, err)
		}
		in.secretVersions = append(in.secretVersions, fmt.Sprintf("%s/%s=%s", s.ref.Name, s.ref.Key, version))
	}
	return nil
}
