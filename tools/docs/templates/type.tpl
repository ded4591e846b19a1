{{- define "type" -}}
{{- $type := . -}}
{{- if markdownShouldRenderType $type -}}
## {{ $type.Name }}

{{ $type.Doc | replace "<" "&lt;" }}
{{ with $type.SortedReferences }}
Used in {{ range $i, $r := . }}{{ if $i }}, {{ end }}{{ markdownRenderTypeLink $r }}{{ end }}.
{{ end }}
{{- $limits := list }}
{{- range $type.Validation }}{{ if not (hasPrefix "Enum:" .) }}{{ $limits = append $limits (markdownRenderFieldDoc .) }}{{ end }}{{ end }}
{{- with $limits }}
{{ join "; " . }}
{{ end }}
{{- with $type.Members }}
| Field | Type | Default | What it is |
|---|---|---|---|
{{- range . }}
| `{{ .Name }}` | {{ markdownRenderType .Type }} | {{ with .Default }}`{{ . }}`{{ end }} | {{ template "type_members" . }} |
{{- end }}
{{ end }}
{{- with $type.EnumValues }}
| Value | What it means |
|---|---|
{{- range . }}
| `{{ .Name }}` | {{ regexReplaceAll "^[A-Z][A-Za-z]+ " (markdownRenderFieldDoc .Doc | trimSuffix "<br />") "" }} |
{{- end }}
{{ end }}
{{- end -}}
{{- end -}}
