package command

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/millrace-dev/millrace/bench/report"
)

// Selection is which part of a benchmark to run, how often, and where the figures go.
type Selection struct {
	Works, Systems []string // empty: all
	N              int      // the size of a measurement; 0: by work
	Runs           int
	Short          bool
	Output
}

// Defaults of a program's Selection.
type Defaults struct {
	File        string // in results/, without its ending
	Unit        string // what N counts
	Full, Short int    // repetitions, and those with -short
}

// Parse reads a program's arguments. more adds flags of its own; a run for which partial says true measures a part too.
func (s *Selection) Parse(name string, args []string, usage io.Writer, d Defaults, more func(*flag.FlagSet), partial func() bool) error {
	var works, systems string
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(usage)
	flags.StringVar(&works, "work", "", "only these `works`, with commas between")
	flags.StringVar(&systems, "system", "", "only these `systems`, with commas between")
	flags.IntVar(&s.N, "n", 0, "`"+d.Unit+"` in a measurement; default: by work")
	flags.IntVar(&s.Runs, "runs", 0, fmt.Sprintf("`repetitions`, at most; default %d, or %d with -short; works that take long have fewer", d.Full, d.Short))
	flags.BoolVar(&s.Short, "short", false, "fewer "+d.Unit)
	s.Bind(flags, d.File, "for a part of the works, systems or sizes without -merge")
	flags.BoolVar(&s.Merge, "merge", false, "replace the measured works in the file and keep its other rows")
	if more != nil {
		more(flags)
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q; %s takes flags only", flags.Arg(0), name)
	}
	if s.N < 0 || s.Runs < 0 {
		return errors.New("-n and -runs cannot be negative")
	}
	if s.Runs == 0 {
		s.Runs = d.Full
		if s.Short {
			s.Runs = d.Short
		}
	}
	s.Works, s.Systems = List(works), List(systems)
	s.Choose(!s.Merge && (len(s.Works) > 0 || len(s.Systems) > 0 || s.N > 0 || partial != nil && partial()))
	return nil
}

// Describe adds to a server's settings what the figures depend on besides.
func (s *Selection) Describe(settings map[string]string, seed int) {
	settings["form"] = "full"
	if s.Short {
		settings["form"] = "short"
	}
	if s.N > 0 {
		settings["n"] = strconv.Itoa(s.N)
	}
	settings["seed"] = strconv.Itoa(seed)
	DescribeGo(settings)
}

// DescribeGo adds the version of Go.
func DescribeGo(settings map[string]string) {
	settings["go"] = strings.TrimPrefix(runtime.Version(), "go")
}

// Output is where figures go.
type Output struct {
	Merge bool   // into what the file has of other works
	Out   string // the file

	whole, part string
}

// Bind adds the flag -out, whose default is the file in results/ of a whole run; or another, which does not replace it, when.
func (o *Output) Bind(flags *flag.FlagSet, file, when string) {
	o.whole, o.part = filepath.Join("results", file+".json"), filepath.Join("results", file+".local.json")
	flags.StringVar(&o.Out, "out", "", "write this `file`; default "+o.whole+", or "+o.part+" "+when)
}

// Choose chooses the default of -out, after the flags were parsed.
func (o *Output) Choose(partial bool) {
	if o.Out != "" {
		return
	}
	o.Out = o.whole
	if partial {
		o.Out = o.part
	}
}

// Write prints the table and writes the file.
func (o *Output) Write(rows []report.Row, settings map[string]string, out, progress io.Writer) error {
	result := report.Report{Machine: report.Machine(), Date: report.Today(), Settings: settings, Rows: rows}
	fmt.Fprintln(progress)
	if err := result.Table(out); err != nil {
		return err
	}
	if o.Merge {
		if err := result.Merge(o.Out); err != nil {
			return err
		}
	}
	if err := result.Write(o.Out); err != nil {
		return err
	}
	fmt.Fprintf(progress, "\nwritten to %s\n", o.Out)
	return nil
}
