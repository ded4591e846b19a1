//go:build !race

package pipeline_test

// raceFlags build the processor like its tests.
var raceFlags []string
