// Package seeds shows the promises of the seed documents, row by row, from the side of a user: SQL through a driver, as a role that owns nothing, against
// real servers. Edges, races and errors are tested beside the code.
//
// A row's test is called after it, TestSeed_H02_PublishMany. It stands here, or in another package where what it needs is at hand: `make seeds` finds it by
// its name and prints the table of all rows. See docs/design/seeds.md.
package seeds
