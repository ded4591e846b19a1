// Package expression compiles and evaluates the CEL expressions of a pipeline: filters, computed columns, and what sinks send.
//
// It knows neither configuration nor items. The caller hands in Variables, of which only those are asked for that the
// expression uses, so a document that no expression looks into is never taken apart.
//
// The language is CEL with its optional values (doc.?a.orValue(0)), a few functions on texts and numbers, and two differences,
// both because JSON has one kind of number and CEL has three:
//
//	E1: no number loses a digit in silence. A JSON number is an int, beyond that a uint, a double where the double stands for
//	    exactly the digits that were written, and a decimal otherwise.
//	E2: numbers mix. 3 and 3.5 are values of one field, so doc.v * 3.6 and doc.v > 3 work for both. + - * are exact, as in
//	    PostgreSQL's numeric: 1.1 * 3 is 3.3. Dividing two whole numbers gives a whole number; otherwise the quotient is a double.
//	E3: an evaluation ends: its cost is limited, and so is the size of what one step makes. A document cannot make an
//	    expression run or grow without bounds.
package expression
