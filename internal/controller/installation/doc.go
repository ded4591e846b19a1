// Package installation looks at an installed Millrace from inside the cluster, with the permissions of its manager.
//
// Invariant N1: a check changes nothing, in the cluster or in a database.
// Invariant N2: a check that fails says what to do.
package installation
