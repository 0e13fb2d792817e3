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
