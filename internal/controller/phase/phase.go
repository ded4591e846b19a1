package phase

import "context"

// Func is one phase. It reads and fills the scope of one reconcile, and its error says how to go on.
type Func[S any] func(ctx context.Context, scope S) error

// Run runs the phases in order up to the first error, which it returns.
func Run[S any](ctx context.Context, scope S, phases []Func[S]) error {
	for _, f := range phases {
		if err := f(ctx, scope); err != nil {
			return err
		}
	}
	return nil
}
