// Package config is the file that the manager writes and the processor reads: one pipeline, from its source to its sink.
//
// The file never holds a secret. Connection strings come from the environment, under the names of this package's Env
// constants. Parse is strict: an unknown key is a problem with its path, its line and what may stand there instead.
//
//	C1: a configuration that Parse or Validate accepts can be compiled by the processor; what is wrong with it is found
//	    before a pod starts.
//	C2: every problem is reported at once, each with its path, and tells what to write instead.
//	C3: Marshal writes the same bytes for equal configurations, so its hash says whether pods have to be replaced, and
//	    Parse reads them back to an equal configuration.
package config
