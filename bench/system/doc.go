// Package system holds the systems that the engine's benchmark compares, one file each. A system whose verbs are single SQL statements
// is a value of SQL; others implement engine.System. To add one, write its file and a line in All.
package system
