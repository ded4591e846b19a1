package cli

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// How wide help is written: as wide as the terminal, but not wider than one reads well.
const (
	helpWidth    = 80
	helpWidthMax = 120
)

// setHelp makes help and usage fit the terminal. The flags that all commands have are shown with the program only.
func setHelp(root *cobra.Command, std Streams) {
	width := helpWidth
	for _, stream := range []any{std.Out, std.Err} {
		if columns, is := terminal(stream); is {
			width = min(columns, helpWidthMax)
		}
	}
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		_, err := fmt.Fprint(cmd.OutOrStderr(), usageText(cmd, width))
		return err
	})
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) {
		text := cmd.Long
		if text == "" {
			text = cmd.Short + "."
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s\n\n%s", wrap(text, width), usageText(cmd, width))
	})
}

// usageLine is what stands under an error of the command line: short, so that the error is not scrolled away.
func usageLine(cmd *cobra.Command) string {
	has := "its flags and examples"
	if cmd.HasAvailableSubCommands() {
		has = "the commands"
	}
	return fmt.Sprintf("Usage:\n  %s\n\n%s --help has %s.\n", useLine(cmd), cmd.CommandPath(), has)
}

func useLine(cmd *cobra.Command) string {
	if cmd.HasAvailableSubCommands() {
		return cmd.CommandPath() + " [command]"
	}
	return cmd.UseLine()
}

func usageText(cmd *cobra.Command, width int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage:\n  %s\n", useLine(cmd))
	if cmd.HasExample() {
		fmt.Fprintf(&b, "\nExamples:\n%s\n", cmd.Example)
	}
	if cmd.HasAvailableSubCommands() {
		groups := cmd.Groups()
		if len(groups) == 0 {
			groups = []*cobra.Group{{Title: "Commands:"}}
		}
		for _, g := range groups {
			fmt.Fprintf(&b, "\n%s\n", g.Title)
			for _, sub := range cmd.Commands() {
				if sub.GroupID == g.ID && sub.IsAvailableCommand() {
					fmt.Fprintf(&b, "  %-11s %s\n", sub.Name(), sub.Short)
				}
			}
		}
	}
	if flags := cmd.LocalFlags(); flags.HasAvailableFlags() {
		fmt.Fprintf(&b, "\nFlags:\n%s", flags.FlagUsagesWrapped(width))
	}
	if cmd.HasParent() {
		fmt.Fprintf(&b, "\n%s --help has the flags of all commands: the database, and --output.\n", cmd.Root().CommandPath())
	}
	return b.String()
}

// wrap breaks paragraphs into lines. Lines that begin with a space or a tab stay as they are.
func wrap(text string, width int) string {
	var lines []string
	line := ""
	end := func() {
		if line != "" {
			lines, line = append(lines, line), ""
		}
	}
	for l := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		if l == "" || l[0] == ' ' || l[0] == '\t' || strings.HasSuffix(line, ":") {
			end()
		}
		if l == "" || l[0] == ' ' || l[0] == '\t' {
			lines = append(lines, l)
			continue
		}
		for word := range strings.FieldsSeq(l) {
			if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
				end()
			}
			line = strings.TrimPrefix(line+" "+word, " ")
		}
	}
	end()
	return strings.Join(lines, "\n")
}
