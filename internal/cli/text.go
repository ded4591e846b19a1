package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
	"k8s.io/apimachinery/pkg/util/duration"
)

// printJSON prints one object in a line of its own.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// none stands for what is not there, as in kubectl's tables.
const none = "<none>"

func orNone(s string) string {
	if s == "" {
		return none
	}
	return s
}

// keyText is a message's key in a table.
func keyText(key *string) string {
	if key == nil {
		return none
	}
	return plain(*key)
}

// plain makes text from a message safe for a terminal: control characters, which could move its cursor or change its title, are shown by their numbers.
func plain(s string) string {
	if strings.IndexFunc(s, unsafe) < 0 && utf8.ValidString(s) {
		return s
	}
	var text strings.Builder
	for _, r := range s {
		if unsafe(r) {
			quoted := strconv.QuoteRuneToASCII(r)
			text.WriteString(quoted[1 : len(quoted)-1])
		} else {
			text.WriteRune(r)
		}
	}
	return text.String()
}

func unsafe(r rune) bool { return r == utf8.RuneError || !unicode.IsGraphic(r) }

// cut shortens a text to a width.
func cut(s string, width int) string {
	if width <= 0 || utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:max(width-1, 0)]) + "…"
}

// age is a duration as kubectl shows one.
func age(d time.Duration) string {
	if d > 0 && d < time.Second {
		return "<1s"
	}
	return duration.HumanDuration(d)
}

// ageSince is how long ago something was; none when it never was.
func ageSince(at, now time.Time) string {
	if at.IsZero() {
		return none
	}
	return age(max(now.Sub(at), 0))
}

// durationText is a setting: 2m and not 2m0s.
func durationText(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// bytesText is a size with a unit of 1,024s.
func bytesText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	size, unit := float64(n), ""
	for _, unit = range []string{"KiB", "MiB", "GiB", "TiB"} {
		if size /= 1024; size < 1024 {
			break
		}
	}
	return fmt.Sprintf("%.1f %s", size, unit)
}

// number is a count with commas.
func number(n int64) string {
	text := strconv.FormatInt(n, 10)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// count is a number with its noun.
func count(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return number(n) + " " + noun + "s"
}

// list is a list in words.
func list(items []string) string {
	if len(items) == 0 {
		return none
	}
	return strings.Join(items, ", ")
}

// yesNo is a setting that is on or off.
func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// terminal says whether a stream is one, and how many columns it has.
func terminal(stream any) (width int, is bool) {
	f, ok := stream.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) { //nolint:gosec // a file descriptor fits
		return 0, false
	}
	width, _, err := term.GetSize(int(f.Fd())) //nolint:gosec // a file descriptor fits
	if err != nil || width <= 0 {
		width = 80
	}
	return width, true
}
