// Package scenario is what the demo and the end-to-end tests have in common: Millrace installed in a cluster by its Helm
// chart, with PostgreSQL and Redis on this machine; load for it; and the ledger that tells whether everything arrived.
//
//	s, err := scenario.Start(ctx, c, scenario.Options{})         // servers, images, helm install
//	ns, err := s.Namespace(ctx, "shop")                          // with a database, and Secrets that lead to it
//	err = ns.ApplySamples(ctx); err = ns.WaitReady(ctx, time.Minute)
//
//	produced := scenario.NewProduced()
//	err = scenario.Positions{Count: 100_000, Seed: seed}.Produce(ctx, ns.RedisURL, produced)
//	ledger, err := ns.PositionsSink().Await(ctx, produced)       // every id is exactly one row, or Ledger.Err says which is not
//
// Invariants:
//
//	I1  A Produced holds an id as committed only when the server has said so, and as rolled back only when it cannot
//	    appear any more. What a lost connection leaves open is asked until it is known.
//	I2  A ledger compares sets of ids and the content of each row. Equal counts do not make it exact.
//	I3  Stop leaves neither servers nor anything in somebody else's cluster.
package scenario
