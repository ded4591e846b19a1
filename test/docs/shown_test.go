package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// shown is a block that shows a file of the source tree: its first line is a comment with the file's path.
var shown = regexp.MustCompile("(?ms)^```yaml\n# (examples/[^ \n]+)\n(.*?)^```$")

// TestShownFilesAreTheFiles compares what pages show with the files that tests run.
func TestShownFilesAreTheFiles(t *testing.T) {
	t.Parallel()
	found := 0
	for _, path := range documents(t) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range shown.FindAllSubmatch(text, -1) {
			file := string(block[1])
			want, err := os.ReadFile(filepath.Join("..", "..", file))
			if err != nil {
				t.Errorf("%s: %v", filepath.Base(path), err)
			} else if string(block[2]) != string(want) {
				t.Errorf("%s shows %s as it is not:\n%s", filepath.Base(path), file, block[2])
			}
			found++
		}
	}
	if found == 0 {
		t.Fatal("no page shows a file")
	}
}
