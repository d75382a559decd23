{{/* The name of every object: that of the release. */}}
{{- define "sdbento.name" -}}
{{- ternary .Release.Name (printf "%s-sdbento" .Release.Name) (contains "sdbento" .Release.Name) | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "sdbento.selector" -}}
app.kubernetes.io/name: sdbento
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Takes the root and what the object's name ends in. */}}
{{- define "sdbento.metadata" -}}
{{- $root := first . -}}
name: {{ include "sdbento.name" $root }}{{ last . }}
labels:
  {{- include "sdbento.selector" $root | nindent 2 }}
  app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
{{- end -}}

{{/* A setting as the text of its environment variable. Numbers are floats here, and 33554432 would
     become 3.3554432e+07. */}}
{{- define "sdbento.text" -}}
{{- kindIs "string" . | ternary . (toJson .) -}}
{{- end -}}

{{/* Seconds before SIGTERM, in which the Service forgets the pod. */}}
{{- define "sdbento.pause" -}}10{{- end -}}

{{/* The pause, the requests under way, the 8 seconds in which the server then ends, and some room. */}}
{{- define "sdbento.grace" -}}
{{- add (include "sdbento.pause" .) (ceil (default 20 .Values.settings.SDBENTO_SHUTDOWN_TIMEOUT)) 8 12 -}}
{{- end -}}

{{- define "sdbento.keysSecret" -}}
{{- default (printf "%s-keys" (include "sdbento.name" .)) .Values.keys.existingSecret -}}
{{- end -}}

{{- define "sdbento.modelsClaim" -}}
{{- default (printf "%s-models" (include "sdbento.name" .)) .Values.modelCache.existingClaim -}}
{{- end -}}

{{/* Kubernetes makes one pod where no number is given, and leaves the number to an autoscaler. */}}
{{- define "sdbento.replicas" -}}
{{- if and (ne (int .Values.replicas) 1) (not .Values.autoscaling.trigger) -}}
replicas: {{ .Values.replicas }}
{{- end -}}
{{- end -}}
