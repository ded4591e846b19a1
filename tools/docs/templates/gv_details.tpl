{{- define "gvDetails" }}
Group and version `{{ .GroupVersionString }}`. `kubectl explain stream.spec` shows the same, for every field. Fields are optional unless they are marked as
required. Conditions and their reasons are in [troubleshooting](../troubleshooting.md).

{{ $gv := . -}}
{{- range list "Stream" "ConsumerGroup" "Processor" }}
- {{ $gv.TypeForKind . | markdownRenderTypeLink }}
{{- end }}
{{ range list "Stream" "ConsumerGroup" "Processor" }}
{{ template "type" ($gv.TypeForKind .) }}
{{- end }}
{{- range $gv.SortedTypes }}
{{- if not .GVK }}
{{ template "type" . }}
{{- end }}
{{- end }}
{{- end -}}
