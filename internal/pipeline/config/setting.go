package config

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Setting is a value of the environment that may be a secret: that of a variable, or that of the file which the same variable with _FILE appended names.
// A file is read again each time, so what it holds can be rotated.
type Setting struct {
	variable string // for messages
	value    string
	file     string
}

// FromEnvironment finds the setting of a variable. Variables that are not set make a Setting that reads as empty.
func FromEnvironment(variable string) (Setting, error) {
	s := Setting{variable: variable, value: os.Getenv(variable), file: os.Getenv(variable + "_FILE")}
	if s.value != "" && s.file != "" {
		return Setting{}, fmt.Errorf("%s and %s_FILE are both set; set one of them", variable, variable)
	}
	return s, nil
}

// Fixed is a setting whose value never changes. The name is for messages.
func Fixed(name, value string) Setting { return Setting{variable: name, value: value} }

// FromFile is a setting that a file holds. The name is for messages.
func FromFile(name, file string) Setting { return Setting{variable: name, file: file} }

// Variable names the setting in messages.
func (s Setting) Variable() string { return s.variable }

// IsSet says whether there is a value, or a file to read one from.
func (s Setting) IsSet() bool { return s.value != "" || s.file != "" }

// Same says whether two settings have the same value at any time, whatever they are called.
func (s Setting) Same(o Setting) bool { return s.value == o.value && s.file == o.file }

// Read returns the value without white space around it. Its error never holds it.
func (s Setting) Read() (string, error) {
	if s.file == "" {
		return strings.TrimSpace(s.value), nil
	}
	data, err := os.ReadFile(s.file)
	if err != nil {
		return "", fmt.Errorf("read %s_FILE: %w", s.variable, err)
	}
	value := strings.TrimSpace(string(data))
	if value == "" {
		return "", errors.New("the file of " + s.variable + "_FILE is empty")
	}
	return value, nil
}
