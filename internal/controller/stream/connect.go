package stream

import (
	"context"
)

// connect finds the database. It opens no connection: the first call in a later phase does, and brings the schema up to date.
func (r *Reconciler) connect(ctx context.Context, sc *scope) error {
	db, err := r.Databases.Resolve(ctx, sc.stream.Namespace, sc.stream.Spec.DatabaseSecretRef)
	if err != nil {
		return err
	}
	sc.db = db
	r.Poller.Follow(r.follower(sc.stream), db, sc.stream.DatabaseName(), "")
	return nil
}
