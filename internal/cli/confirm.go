package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"strings"
)

// errNotConfirmed ends a command that was to change something and may not.
var errNotConfirmed = errors.New("nothing was changed: it was not confirmed. Answer y, or pass --yes")

// confirm asks before something is changed, unless yes has answered already. A standard input that ends is a no.
func (a *app) confirm(ctx context.Context, yes bool, question string) error {
	if yes {
		return nil
	}
	fmt.Fprintf(a.Err, "%s [y/N] ", question)
	answered := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(a.In).ReadString('\n')
		answered <- strings.ToLower(strings.TrimSpace(line))
	}()
	select {
	case answer := <-answered:
		if answer == "y" || answer == "yes" {
			return nil
		}
	case <-ctx.Done():
	}
	fmt.Fprintln(a.Err)
	return errNotConfirmed
}
