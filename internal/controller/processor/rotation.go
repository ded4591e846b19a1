package processor

import (
	"net/url"
	"regexp"
	"strings"
)

// secretParameters are what a connection string can hold besides its address.
var secretParameters = []string{"user", "password", "passfile", "sslpassword", "sentinel_user", "sentinel_password"}

// keywordSecret finds user and password in a connection string of the form host=… user=… password=….
var keywordSecret = regexp.MustCompile(`(?i)(^|\s)(user|password|passfile|sslpassword)\s*=\s*('(\\.|[^'\\])*'|\S*)`)

// withoutCredentials is a connection string without user and password: what pods cannot follow while they run, so that a change of it
// rolls them. What is left is put into a hash and nowhere else (C3).
func withoutCredentials(value string) string {
	scheme, rest, ok := strings.Cut(value, "://")
	if !ok {
		return strings.TrimSpace(keywordSecret.ReplaceAllString(value, ""))
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	hosts, rest := rest[:end], rest[end:]
	hosts = hosts[strings.LastIndexByte(hosts, '@')+1:]
	path, query, _ := strings.Cut(rest, "?")
	values, err := url.ParseQuery(query)
	if err != nil {
		return scheme + "://" + hosts + path
	}
	for _, name := range secretParameters {
		values.Del(name)
	}
	return scheme + "://" + hosts + path + "?" + values.Encode()
}
