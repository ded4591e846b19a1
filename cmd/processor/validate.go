package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/millrace-dev/millrace/internal/pipeline/config"
)

// readConfig reads and checks a configuration file; - is standard input.
func readConfig(file string) (*config.Config, error) {
	read := func() ([]byte, error) { return os.ReadFile(file) }
	if file == "-" {
		read = func() ([]byte, error) { return io.ReadAll(os.Stdin) }
	}
	data, err := read()
	if err != nil {
		return nil, err
	}
	return config.Parse(data)
}

// validate checks a file and says everything that is wrong with it, one problem per line, as compilers do: file:line: field: message.
func validate(args []string) int {
	flags := flag.NewFlagSet("processor validate", flag.ContinueOnError)
	file := flags.String("f", "", "`file` to check; - is standard input")
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	if *file == "" || flags.NArg() > 0 {
		fmt.Fprintln(flags.Output(), "Write processor validate -f file.")
		return exitUsage
	}
	c, err := readConfig(*file)
	if err != nil {
		printProblems(*file, err)
		return exitFailed
	}
	fmt.Printf("%s: valid: %s\n", *file, summary(c))
	return exitOK
}

// printProblems writes what is wrong with a configuration for a person.
func printProblems(file string, err error) {
	if file == "-" {
		file = "standard input"
	}
	var problems config.Problems
	if !errors.As(err, &problems) {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	for _, p := range problems {
		line := p.Line
		p.Line = 0
		if line == 0 {
			fmt.Fprintf(os.Stderr, "%s: %s\n", file, p)
		} else {
			fmt.Fprintf(os.Stderr, "%s:%d: %s\n", file, line, p)
		}
	}
	if len(problems) > 1 {
		fmt.Fprintf(os.Stderr, "%s: %d problems\n", file, len(problems))
	}
}

// summary says in one line what a pipeline does.
func summary(c *config.Config) string {
	from := ""
	switch r, g := c.Source.Redis, c.Source.ConsumerGroup; {
	case r != nil && len(r.Streams) == 1:
		from = fmt.Sprintf("Redis stream %s, group %s", r.Streams[0], r.Group)
	case r != nil:
		from = fmt.Sprintf("%d Redis streams, group %s", len(r.Streams), r.Group)
	case g != nil:
		from = fmt.Sprintf("stream %s, group %s", g.Stream, g.Group)
	}
	text := from + " ->"
	for i, b := range c.Branches() {
		if i > 0 {
			text += ","
		}
		text += " " + b.Target()
	}
	return text
}
