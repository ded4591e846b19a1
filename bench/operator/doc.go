// Package operator measures the manager with many resources: a real control plane (etcd, API server, controller manager and scheduler as processes of
// this machine), nodes and pods played by KWOK, a real PostgreSQL, and the manager's binary with the settings and the permissions of the chart.
package operator
