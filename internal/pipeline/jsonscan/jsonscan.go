// Package jsonscan goes through the members of a JSON object or the elements of an array, one level at a time and without
// converting anything that nobody asked for. gjson does the same and parses every number on the way, which is a good part of
// the time when a few values of many are wanted.
package jsonscan

import (
	"strings"

	"github.com/tidwall/gjson"
)

// Scanner is a place in an object or array.
type Scanner struct {
	text  string
	at    int
	array bool
}

// Of returns a scanner of the members or elements of text, which must be valid JSON and an object or array.
func Of(text string) Scanner {
	s := Scanner{text: text}
	s.space()
	s.array = text[s.at] == '['
	s.at++
	return s
}

// IsArray says whether it is an array, whose elements have no names.
func (s *Scanner) IsArray() bool { return s.array }

// Next returns the next member or element: its name, and its value as it is written. ok is false after the last.
func (s *Scanner) Next() (name, value string, ok bool) {
	s.space()
	if s.text[s.at] == ',' {
		s.at++
		s.space()
	}
	if c := s.text[s.at]; c == '}' || c == ']' {
		return "", "", false
	}
	if !s.array {
		from := s.at
		if s.string() {
			name = gjson.Parse(s.text[from:s.at]).Str
		} else {
			name = s.text[from+1 : s.at-1]
		}
		s.space()
		s.at++ // the colon
		s.space()
	}
	from := s.at
	s.value()
	return name, s.text[from:s.at], true
}

// Value is a value as gjson has it, except for a number's Num, which is 0: its text tells more.
func Value(raw string) gjson.Result {
	switch raw[0] {
	case '{', '[':
		return gjson.Result{Type: gjson.JSON, Raw: raw}
	case '"':
		if strings.IndexByte(raw, '\\') >= 0 {
			return gjson.Parse(raw)
		}
		return gjson.Result{Type: gjson.String, Raw: raw, Str: raw[1 : len(raw)-1]}
	case 't':
		return gjson.Result{Type: gjson.True, Raw: raw}
	case 'f':
		return gjson.Result{Type: gjson.False, Raw: raw}
	case 'n':
		return gjson.Result{Type: gjson.Null, Raw: raw}
	}
	return gjson.Result{Type: gjson.Number, Raw: raw}
}

func (s *Scanner) space() {
	for s.text[s.at] <= ' ' {
		s.at++
	}
}

// value goes behind the value that begins here.
func (s *Scanner) value() {
	switch s.text[s.at] {
	case '"':
		s.string()
	case '{', '[':
		for depth := 0; ; {
			switch s.text[s.at] {
			case '"':
				s.string()
				continue
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					s.at++
					return
				}
			}
			s.at++
		}
	default:
		for c := s.text[s.at]; c > ' ' && c != ',' && c != '}' && c != ']'; c = s.text[s.at] {
			s.at++
		}
	}
}

// string goes behind the string that begins here, and says whether there is a backslash in it.
func (s *Scanner) string() (escaped bool) {
	s.at++
	for {
		switch s.text[s.at] {
		case '"':
			s.at++
			return escaped
		case '\\':
			escaped = true
			s.at++
		}
		s.at++
	}
}
