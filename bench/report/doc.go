// Package report holds what a benchmark has found: rows of medians and ratios, as JSON and as a table. It knows nothing
// of what was measured, so that all benchmarks have one shape.
package report
