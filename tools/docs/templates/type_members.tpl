{{- define "type_members" -}}
{{- $required := false }}
{{- $limits := list }}
{{- range .Validation }}
{{- if hasPrefix "Required:" . }}{{ $required = true }}
{{- else if not (or (hasPrefix "Optional:" .) (hasPrefix "Type:" .) (hasPrefix "Schemaless:" .)) }}{{ $limits = append $limits (markdownRenderFieldDoc . | trim) }}{{ end }}
{{- end }}
{{- if $required }}**Required.** {{ end }}
{{- if eq .Name "metadata" }}As in every Kubernetes object.{{ else }}{{ markdownRenderFieldDoc .Doc | trimSuffix "<br />" }}{{ end }}
{{- with $limits }} ({{ join "; " . }}){{ end }}
{{- end -}}
