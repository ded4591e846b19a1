// Package pgstream is the streaming engine: streams, consumer groups and their SQL in PostgreSQL. It knows neither
// Kubernetes nor Redis.
package pgstream
