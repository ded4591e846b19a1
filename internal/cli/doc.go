// Package cli is the program millrace: streams and consumer groups from a shell, beside kubectl or without it.
//
// One file is one command; root.go lists them. What several commands share is in files of its own: the way to the database (connect.go, kubernetes.go), what is
// printed (table.go, message.go, progress.go, text.go), and what a person writes (place.go, filter.go, confirm.go, suggest.go).
//
// What a script relies on is kept: exit codes (exit.go) and the fields of -o json, which are named as the columns of the SQL API. Standard output holds
// results only; everything else goes to standard error.
package cli
