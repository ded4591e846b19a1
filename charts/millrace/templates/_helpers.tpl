{{/* The name of what the release makes. */}}
{{- define "millrace.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change: a Deployment's selector cannot. */}}
{{- define "millrace.selectorLabels" -}}
app.kubernetes.io/name: millrace
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: manager
{{- end -}}

{{- define "millrace.labels" -}}
{{ include "millrace.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "millrace.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "millrace.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed when serviceAccount.create is false: write the name of a service account that exists" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/*
An image reference. Takes a dict of root and image. Values that the chart 0.1.0 did not have may be missing: helm upgrade --reuse-values takes its defaults.
*/}}
{{- define "millrace.image" -}}
{{- $registry := default .image.registry (.root.Values.global).imageRegistry -}}
{{- $name := .image.repository -}}
{{- if $registry -}}{{- $name = printf "%s/%s" (trimSuffix "/" $registry) $name -}}{{- end -}}
{{- if .image.digest -}}{{ $name }}@{{ .image.digest }}{{- else -}}{{ $name }}:{{ default .root.Chart.AppVersion .image.tag }}{{- end -}}
{{- end -}}

{{/* Names of pull secrets as a list. Takes a dict of root and secrets. */}}
{{- define "millrace.pullSecrets" -}}
{{- concat (default list (.root.Values.global).imagePullSecrets) (default list .secrets) | uniq | toJson -}}
{{- end -}}

{{/*
Rules of the manager's role, which controller-gen writes into files/role.yaml. Takes a dict of root and of which: "cluster" gives those that make
sense for the whole cluster only, as far as the values need them, "namespace" the others. Empty when there are none.
*/}}
{{- define "millrace.rules" -}}
{{- $v := .root.Values -}}
{{- $which := .which -}}
{{- $rules := list -}}
{{- range (.root.Files.Get "files/role.yaml" | fromYaml).rules -}}
{{- $group := first .apiGroups -}}
{{- $review := or (eq $group "authentication.k8s.io") (eq $group "authorization.k8s.io") -}}
{{- $clusterID := has "namespaces" .resources -}}
{{- if eq $which "namespace" -}}
{{- if not (or $review $clusterID) -}}{{- $rules = append $rules . -}}{{- end -}}
{{- else if or (and $review $v.metrics.enabled $v.metrics.secure) (and $clusterID (not $v.manager.clusterID)) -}}
{{- $rules = append $rules . -}}
{{- end -}}
{{- end -}}
{{- if $rules -}}{{- toYaml $rules -}}{{- end -}}
{{- end -}}

{{/* What the restricted Pod Security Standard asks of a pod, and of a container. */}}
{{- define "millrace.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "millrace.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The default database as a variable, empty when there is none. */}}
{{- define "millrace.databaseEnv" -}}
{{- with .Values.database.existingSecret -}}
- name: MILLRACE_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.database.secretKey }}
{{- end -}}
{{- end -}}
