{{- define "leaktrace.name" -}}
{{- if contains "leaktrace" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-leaktrace" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "leaktrace.selector" -}}
app.kubernetes.io/name: leaktrace
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "leaktrace.labels" -}}
{{ include "leaktrace.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "leaktrace.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ if eq .Values.security.mode "nonRoot" }}-nonroot{{ end }}
{{- end }}

{{- define "leaktrace.containerSecurity" -}}
{{- if eq .Values.security.mode "privileged" -}}
privileged: true
runAsUser: 0
readOnlyRootFilesystem: true
{{- else -}}
{{- $nonRoot := eq .Values.security.mode "nonRoot" -}}
runAsUser: {{ ternary 65532 0 $nonRoot }}
runAsGroup: {{ ternary 65532 0 $nonRoot }}
runAsNonRoot: {{ $nonRoot }}
# The file's capabilities are gained when it is started; and Kubernetes refuses "false" with SYS_ADMIN.
allowPrivilegeEscalation: {{ or $nonRoot .Values.security.sysAdmin }}
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add:
    - BPF
    - PERFMON
    # To read the memory maps and files of all users' processes.
    - SYS_PTRACE
    - DAC_READ_SEARCH
    # To open libraries that were deleted or replaced.
    - CHECKPOINT_RESTORE
    {{- if .Values.security.sysAdmin }}
    - SYS_ADMIN
    {{- end }}
seccompProfile:
  type: {{ .Values.security.seccompProfile }}
# The runtimes' default profile keeps containers from reading processes outside of them.
appArmorProfile:
  type: Unconfined
{{- end }}
{{- end }}

{{- /* A map as TOML has it within a line. JSON's texts are TOML's, too. */ -}}
{{- define "leaktrace.inlineTable" -}}
{ {{ range $i, $key := keys . | sortAlpha }}{{ if $i }}, {{ end }}{{ toJson $key }} = {{ toJson (get $ $key | toString) }}{{ end }} }
{{- end }}

{{- /* The variables of all that is pushed. */ -}}
{{- define "leaktrace.pushVariables" -}}
{{- range $kind, $push := .Values.push }}
{{- if not (has $kind (list "pyroscope" "parca" "otlp")) }}
{{- fail (printf "push.%s is none of pyroscope, parca, otlp" $kind) }}
{{- end }}
{{- if $push.url }}
{{- $variable := printf "LEAKTRACE_PUSH_%s" (upper $kind) }}
- name: {{ $variable }}_URL
  value: {{ $push.url | quote }}
- name: {{ $variable }}_INTERVAL
  value: {{ $push.interval | quote }}
{{- if $push.tokenSecret }}
- name: {{ $variable }}_TOKEN_FILE
  value: /etc/leaktrace/{{ $kind }}-token
{{- end }}
{{- if $push.caSecret }}
- name: {{ $variable }}_CA_FILE
  value: /etc/leaktrace/{{ $kind }}-ca.crt
{{- end }}
{{- with $push.headers }}
- name: {{ $variable }}_HEADERS
  value: {{ include "leaktrace.inlineTable" . | quote }}
{{- end }}
{{- with $push.labels }}
- name: {{ $variable }}_LABELS
  value: {{ include "leaktrace.inlineTable" . | quote }}
{{- end }}
{{- else if or $push.tokenSecret $push.caSecret $push.headers $push.labels }}
{{- fail (printf "push.%s.url is empty, and without it nothing is pushed" $kind) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The files that these name. */ -}}
{{- define "leaktrace.pushSecrets" -}}
{{- range $kind, $push := .Values.push }}
{{- if $push.tokenSecret }}
- secret:
    name: {{ $push.tokenSecret }}
    items:
      - key: token
        path: {{ $kind }}-token
{{- end }}
{{- if $push.caSecret }}
- secret:
    name: {{ $push.caSecret }}
    items:
      - key: ca.crt
        path: {{ $kind }}-ca.crt
{{- end }}
{{- end }}
{{- end }}
