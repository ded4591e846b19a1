// Package gitops tests what the code of Argo CD, Flux and Helm makes of Millrace's resources: the Lua files of config/argocd, run by Argo CD's
// own interpreter, and statuses, read by the kstatus library that Flux and Helm use. The real programs run in test/e2e.
package gitops
