package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFileBytes bounds what Parse reads: a ConfigMap holds at most 1 MiB.
const maxFileBytes = 1 << 20

// Parse reads a configuration from YAML or JSON, fills in the defaults and validates it. The error is of type Problems
// and holds everything that is wrong, with lines.
func Parse(data []byte) (*Config, error) {
	if len(data) > maxFileBytes {
		return nil, Problems{{Message: fmt.Sprintf("the file has %d bytes; it may have %d", len(data), maxFileBytes)}}
	}
	root, err := document(data)
	if err != nil {
		return nil, err
	}
	if line := manifest(root); line > 0 {
		return nil, Problems{{Line: line, Message: "this is a manifest for Kubernetes, and not the file of a processor; kubectl apply --dry-run=server -f checks it"}}
	}
	w := walk{lines: map[string]int{}}
	w.value("", root, reflect.TypeFor[Config]())
	if err := w.problems.err(); err != nil {
		return nil, err
	}
	c := &Config{}
	if err := root.Decode(c); err != nil {
		return nil, decodeProblems(err)
	}
	c.Defaults()
	if err := c.Validate(); err != nil {
		var ps Problems
		errors.As(err, &ps)
		for i := range ps {
			ps[i].Line = w.line(ps[i].Path)
		}
		return nil, ps
	}
	return c, nil
}

// document reads the one YAML document of the file and returns its root mapping.
func document(data []byte) (*yaml.Node, error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var doc yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, Problems{{Message: "the file is empty; write name, source, mapping and sink"}}
	} else if err != nil {
		return nil, decodeProblems(err)
	}
	var more yaml.Node
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, Problems{{Line: more.Line, Message: "there is a second document; write one pipeline per file"}}
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 || doc.Content[0].Kind != yaml.MappingNode {
		return nil, Problems{{Line: doc.Line, Message: "the file is not a mapping; write keys such as name: and source:"}}
	}
	return doc.Content[0], nil
}

// manifest finds the line of apiVersion in a file that is meant for Kubernetes; 0 when there is none.
func manifest(root *yaml.Node) int {
	for i := 0; i+1 < len(root.Content); i += 2 {
		if root.Content[i].Value == "apiVersion" {
			return root.Content[i].Line
		}
	}
	return 0
}

// decodeProblems turns the YAML library's error, which holds line numbers in its text, into problems.
func decodeProblems(err error) Problems {
	var te *yaml.TypeError
	texts := []string{err.Error()}
	if errors.As(err, &te) {
		texts = te.Errors
	}
	var ps Problems
	for _, text := range texts {
		text = strings.TrimPrefix(text, "yaml: ")
		p := Problem{Message: text}
		if rest, ok := strings.CutPrefix(text, "line "); ok {
			if number, message, ok := strings.Cut(rest, ": "); ok {
				if n, err := strconv.Atoi(number); err == nil {
					p.Line, p.Message = n, message
				}
			}
		}
		ps = append(ps, p)
	}
	return ps
}

// walk compares a YAML tree with the Go types that it is decoded into. It finds what the decoder would ignore or report
// without a path, and remembers the line of every path. Its depth is the depth of the types, whatever the file says.
type walk struct {
	lines    map[string]int
	problems Problems
}

func (w *walk) line(path string) int {
	for path != "" {
		if n, ok := w.lines[path]; ok {
			return n
		}
		path = path[:max(strings.LastIndexAny(path, ".["), 0)]
	}
	return 1
}

func (w *walk) value(path string, n *yaml.Node, t reflect.Type) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	if path != "" {
		w.lines[path] = n.Line
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // the zero value; Validate says so when something must stand there
	}
	if _, ok := reflect.New(t).Interface().(encoding.TextUnmarshaler); ok {
		if n.Kind != yaml.ScalarNode {
			w.wrong(path, n, "a single value")
		} else if err := reflect.New(t).Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(n.Value)); err != nil {
			w.report(path, n.Line, err.Error())
		}
		return
	}
	switch t.Kind() {
	case reflect.Struct:
		w.object(path, n, t)
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			w.wrong(path, n, "a list")
			return
		}
		for i, item := range n.Content {
			w.value(fmt.Sprintf("%s[%d]", path, i), item, t.Elem())
		}
	case reflect.Map:
		w.entries(path, n, t)
	default:
		if n.Kind != yaml.ScalarNode {
			w.wrong(path, n, "a single value")
			return
		}
		w.scalar(path, n, t)
	}
}

func (w *walk) object(path string, n *yaml.Node, t reflect.Type) {
	if n.Kind != yaml.MappingNode {
		w.wrong(path, n, "a mapping")
		return
	}
	fields := map[string]reflect.Type{}
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		fields[name] = t.Field(i).Type
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode || key.Tag == "!!merge" {
			w.report(path, key.Line, "a key must be a plain name; merge keys (<<) are not supported, so write the fields out")
			continue
		}
		at := key.Value
		if path != "" {
			at = path + "." + key.Value
		}
		ft, ok := fields[key.Value]
		switch {
		case !ok:
			w.report(at, key.Line, "unknown field; "+known(fields))
		case seen[key.Value]:
			w.report(at, key.Line, "the field stands here a second time; keep one")
		default:
			w.value(at, n.Content[i+1], ft)
		}
		seen[key.Value] = true
	}
}

// entries looks at a mapping whose keys the writer of the file chooses, such as header names.
func (w *walk) entries(path string, n *yaml.Node, t reflect.Type) {
	if n.Kind != yaml.MappingNode {
		w.wrong(path, n, "a mapping")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind != yaml.ScalarNode || key.Tag != "!!str" {
			w.report(path, key.Line, "a key must be a plain name; put it in quotes")
			continue
		}
		at := path + "." + key.Value
		if seen[key.Value] {
			w.report(at, key.Line, "the field stands here a second time; keep one")
			continue
		}
		seen[key.Value] = true
		w.value(at, n.Content[i+1], t.Elem())
	}
}

// scalar checks what the decoder would refuse or convert in silence.
func (w *walk) scalar(path string, n *yaml.Node, t reflect.Type) {
	switch t.Kind() {
	case reflect.Bool:
		if n.Tag != "!!bool" {
			w.report(path, n.Line, fmt.Sprintf("%q is not a boolean; write true or false", n.Value))
		}
	case reflect.Int:
		if _, err := strconv.Atoi(n.Value); n.Tag != "!!int" || err != nil {
			w.report(path, n.Line, fmt.Sprintf("%q is not a whole number; write digits without unit or quotes", n.Value))
		}
	case reflect.String:
		if n.Tag != "!!str" {
			w.report(path, n.Line, fmt.Sprintf("%s is not a string; put it in quotes: %q", n.Value, n.Value))
		}
	}
}

func (w *walk) wrong(path string, n *yaml.Node, want string) {
	is := map[yaml.Kind]string{yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}[n.Kind]
	w.report(path, n.Line, fmt.Sprintf("this is %s; write %s", is, want))
}

func (w *walk) report(path string, line int, message string) {
	w.problems = append(w.problems, Problem{Path: path, Line: line, Message: message})
}

// known lists the fields of a type for the reader of a problem.
func known(fields map[string]reflect.Type) string {
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	sort.Strings(names)
	return "write one of " + strings.Join(names, ", ")
}
