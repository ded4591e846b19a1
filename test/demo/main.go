// Command demo shows Millrace at work, from nothing: it starts PostgreSQL, Redis and a Kubernetes with real pods, installs
// Millrace by its Helm chart, applies config/samples, produces positions into a Redis stream and orders into a Stream, and
// shows the rows arrive. Then it compares what it produced with the tables, row by row, and removes everything.
//
// It exits with 1 when a row is missing or there twice, or a resource is not Ready.
//
// Environment: DEMO_SECONDS is how long it produces (default 60). DEMO_HOLD=1 goes on until Ctrl-C. CLUSTER=current uses
// the cluster of your kubeconfig's current context.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/millrace-dev/millrace/test/env/cluster"
	"github.com/millrace-dev/millrace/test/scenario"
)

// The load: enough to see, little enough for a laptop that also runs the cluster.
const (
	positionsPerSecond = 1000
	ordersPerSecond    = 250
	namespace          = "demo"
)

const (
	readyPatience  = 2 * time.Minute // for everything to be Ready after kubectl apply
	ledgerPatience = time.Minute     // for the last row to arrive
)

// errInterrupted is why a demo ends that somebody stopped before there was anything to judge.
var errInterrupted = errors.New("interrupted")

func main() {
	// A second Ctrl-C ends the demo at once: the servers end with it, and the next start removes their files.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	switch err := demo(ctx); {
	case errors.Is(err, errInterrupted):
		fmt.Println("interrupted; everything is removed")
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// settings are what the environment says.
type settings struct {
	length time.Duration
	hold   bool
}

func readSettings(getenv func(string) string) (settings, error) {
	s := settings{length: time.Minute, hold: getenv("DEMO_HOLD") == "1"}
	if text := getenv("DEMO_SECONDS"); text != "" {
		seconds, err := strconv.Atoi(text)
		if err != nil || seconds < 1 {
			return s, fmt.Errorf("DEMO_SECONDS=%q is not a number of seconds; write for example DEMO_SECONDS=20", text)
		}
		s.length = time.Duration(seconds) * time.Second
	}
	return s, nil
}

func demo(ctx context.Context) (err error) {
	set, err := readSettings(os.Getenv)
	if err != nil {
		return err
	}
	began := time.Now()
	c, err := cluster.Up(ctx, cluster.Options{Out: os.Stdout})
	if err != nil {
		return orInterrupted(ctx, err)
	}
	defer func() { err = errors.Join(err, c.Down(context.WithoutCancel(ctx))) }()

	s, err := scenario.Start(ctx, c, scenario.Options{Out: os.Stdout})
	if err != nil {
		return orInterrupted(ctx, err)
	}
	defer func() { err = errors.Join(err, s.Stop(context.WithoutCancel(ctx))) }()

	ns, err := prepare(ctx, s)
	if err != nil {
		if ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, s.Diagnose(ctx))
		}
		return orInterrupted(ctx, err)
	}
	fmt.Printf("Ready after %s. Look around from another terminal:\n\n  export KUBECONFIG=%s\n  %s -n %s get millrace\n\n",
		time.Since(began).Round(time.Second), c.Kubeconfig(), c.Program("kubectl"), namespace)

	if err := produceAndJudge(ctx, set, ns); err != nil {
		if !errors.Is(err, errInterrupted) {
			fmt.Fprintln(os.Stderr, s.Diagnose(ctx))
		}
		return err
	}
	return nil
}

func orInterrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errInterrupted
	}
	return err
}

// prepare applies the samples and waits until they are Ready.
func prepare(ctx context.Context, s *scenario.Scenario) (*scenario.Namespace, error) {
	began := time.Now()
	ns, err := s.Namespace(ctx, namespace)
	if err != nil {
		return nil, err
	}
	if err := ns.ApplySamples(ctx); err != nil {
		return nil, err
	}
	if err := ns.WaitReady(ctx, readyPatience); err != nil {
		return nil, err
	}
	fmt.Printf("%-28s %5.1fs\n", "kubectl apply, all Ready", time.Since(began).Seconds())
	return ns, nil
}

// load is the producers and what they have produced.
type load struct {
	positions, orders *scenario.Produced
}

// produceAndJudge runs the load under the eyes of the dashboard, and then says whether everything arrived.
func produceAndJudge(ctx context.Context, set settings, ns *scenario.Namespace) error {
	l := load{positions: scenario.NewProduced(), orders: scenario.NewProduced()}
	producing, stop := context.WithCancel(ctx)
	if !set.hold {
		producing, stop = context.WithTimeout(ctx, set.length)
	}
	defer stop()

	var producers sync.WaitGroup
	var positionsErr, ordersErr error
	seed := uint64(time.Now().Unix())
	const endless = 1 << 40
	producers.Go(func() {
		defer stop() // when one producer fails, there is nothing more to see
		positionsErr = scenario.Positions{Count: endless, Seed: seed, Duplicates: 0.05, Undecodable: 0.01, PerSecond: positionsPerSecond}.
			Produce(producing, ns.RedisURL, l.positions)
	})
	producers.Go(func() {
		defer stop()
		ordersErr = scenario.Orders{Count: endless, Seed: seed, Transactions: 5, Messages: 10, PerSecond: ordersPerSecond}.
			Publish(producing, ns.DSN, l.orders)
	})
	// The last look is taken after the producers' end, which ctx may have caused.
	judging := context.WithoutCancel(ctx)
	watchErr := watch(producing, judging, set, ns, l)
	stop()
	producers.Wait()
	if err := errors.Join(positionsErr, ordersErr, watchErr); err != nil {
		return err
	}
	if ctx.Err() != nil && !set.hold {
		return errInterrupted
	}
	return judge(judging, ns, l)
}

// judge prints the ledgers and the resources, and returns an error unless every id is one row and everything is Ready.
func judge(ctx context.Context, ns *scenario.Namespace, l load) error {
	fmt.Println("\nThe producers have stopped; comparing what they produced with the tables, row by row.")
	var errs []error
	for _, s := range []struct {
		sink     scenario.Sink
		produced *scenario.Produced
	}{{ns.PositionsSink(), l.positions}, {ns.OrdersSink(), l.orders}} {
		ledger, err := s.sink.Await(ctx, s.produced, ledgerPatience)
		if ledger != nil {
			fmt.Printf("\n%s", ledger)
		}
		if s.produced.Rows() == 0 {
			err = errors.Join(err, fmt.Errorf("nothing was produced for table %s", s.sink.Table))
		}
		errs = append(errs, err)
	}
	now, err := observe(ctx, ns)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	fmt.Printf("\n%s", now.resourceTable())
	for _, r := range now.resources {
		if !r.ready() {
			errs = append(errs, fmt.Errorf("%s is not Ready: %s", r.name, r.message()))
		}
	}
	if len(now.resources) == 0 {
		errs = append(errs, errors.New("there is no resource of Millrace; config/samples should have some"))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	fmt.Println("\nEvery id is exactly one row, and every resource is Ready.")
	return nil
}
