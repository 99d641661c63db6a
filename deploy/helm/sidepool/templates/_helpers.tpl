{{- define "sidepool.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sidepool.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* What selects the pods of one part: (list context part). */}}
{{- define "sidepool.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Where a member's shards are read: (list context member). */}}
{{- define "sidepool.shards" -}}
{{- if include "sidepool.stored" (index . 0) -}}
/data/shards
{{- else -}}
{{ printf "/artifact/sidecars/%s/shards" (index . 1).name }}
{{- end -}}
{{- end -}}

{{/* Not empty where sidecars have volumes of their own. */}}
{{- define "sidepool.stored" -}}
{{- if and .Values.sidecars.storage.size (not .Values.samePod) -}}
yes
{{- end -}}
{{- end -}}

{{/* Not empty where a member starts without shards. */}}
{{- define "sidepool.someEmpty" -}}
{{- range .Values.sidecars.members -}}
{{- if .empty -}}
yes
{{- end -}}
{{- end -}}
{{- end -}}

{{/* sidecar.yaml of member N: (list context N). A member's config goes before all members', and that before the chart's own. */}}
{{- define "sidepool.sidecarConfig" -}}
{{- $root := index . 0 -}}
{{- $number := index . 1 -}}
{{- $values := $root.Values -}}
{{- $member := index $values.sidecars.members $number -}}
{{- $shift := ternary $number 0 $values.samePod -}}
{{- $listen := dict
      "grpc" (printf "%s:%d" $values.listenHost (add $values.ports.grpc $shift | int))
      "metrics" (printf "%s:%d" $values.listenHost (add $values.ports.metrics $shift | int)) -}}
{{- if $values.samePod -}}
{{- $_ := set $listen "tcp" nil -}}
{{- $_ := set $listen "unix" (printf "/run/sidepool/%d.sock" $number) -}}
{{- else -}}
{{- $_ := set $listen "tcp" (printf "%s:%d" $values.listenHost (int $values.ports.tcp)) -}}
{{- end -}}
{{- if $values.rdma.enabled -}}
{{- $_ := set $listen "rdma" $values.rdma.listen -}}
{{- end -}}
{{- $own := dict
      "version" 1
      "name" $member.name
      "plan" (ternary nil "/artifact/plan.yaml" (default false $member.empty))
      "shards" (include "sidepool.shards" (list $root $member))
      "listen" $listen -}}
{{- if $values.tls.secretName -}}
{{- $tls := dict "cert" "/tls/tls.crt" "key" "/tls/tls.key" -}}
{{- if $values.tls.mutual -}}
{{- $_ := set $tls "client_ca" "/tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $own "tls" $tls -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite (dict) $own (deepCopy $values.sidecars.config) (deepCopy (default (dict) $member.config))) -}}
{{- end -}}

{{- define "sidepool.volumes" -}}
- name: artifact
  {{- toYaml .Values.artifact.volume | nindent 2 }}
- name: tmp
  emptyDir: {}
{{- if .Values.tls.secretName }}
- name: tls
  secret: {secretName: {{ .Values.tls.secretName }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "sidepool.mounts" -}}
- name: artifact
  mountPath: /artifact
  readOnly: true
  {{- with .Values.artifact.subPath }}
  subPath: {{ . }}
  {{- end }}
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.secretName }}
- name: tls
  mountPath: /tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "sidepool.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if .Values.rdma.enabled }}
  add: [IPC_LOCK]  # registered memory is pinned
  {{- end }}
{{- end -}}

{{/* Resources with the devices that a part needs: (list resources devices). */}}
{{- define "sidepool.resources" -}}
{{- $resources := deepCopy (index . 0) -}}
{{- $devices := index . 1 -}}
{{- if $devices -}}
{{- $resources = mustMergeOverwrite $resources (dict "limits" $devices "requests" $devices) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Whether a sidecar serves: (list context number grpcPort). Kubernetes' grpc probe speaks no TLS; with TLS, what a sidecar opens
once its shards are loaded is looked at: its tcp lane, or in a shared pod its socket. */}}
{{- define "sidepool.health" -}}
{{- $root := index . 0 -}}
{{- if not $root.Values.tls.secretName -}}
grpc: {port: {{ index . 2 }}}
{{- else if $root.Values.samePod -}}
exec: {command: [test, -S, /run/sidepool/{{ index . 1 }}.sock]}
{{- else -}}
tcpSocket: {port: {{ $root.Values.ports.tcp }}}
{{- end -}}
{{- end -}}

{{/* What a sidecar's container has beside its name: (list context number grpcPort metricsPort metricsPortName). */}}
{{- define "sidepool.sidecarContainer" -}}
{{- $root := index . 0 -}}
{{- $grpc := index . 2 -}}
{{- $values := $root.Values -}}
image: {{ $values.image.sidecar | quote }}
imagePullPolicy: {{ $values.image.pullPolicy }}
command: [sidepool, sidecar, --config, "/etc/sidepool/{{ index . 1 }}.yaml"]
ports:
  - containerPort: {{ $grpc }}
  {{- if not $values.samePod }}
  - containerPort: {{ $values.ports.tcp }}
  {{- end }}
  - {name: {{ index . 4 }}, containerPort: {{ index . 3 }}}
startupProbe:
  {{- if include "sidepool.someEmpty" $root }}
  tcpSocket: {port: {{ $grpc }}}  # one that waits for shards is not to be restarted
  {{- else }}
  {{- include "sidepool.health" (list $root (index . 1) $grpc) | nindent 2 }}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add $values.sidecars.startupSeconds 4) 5 }}
readinessProbe:  # not while it drains
  {{- include "sidepool.health" (list $root (index . 1) $grpc) | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
livenessProbe:  # a reload and a drain are no reasons to restart
  tcpSocket: {port: {{ $grpc }}}
  periodSeconds: 10
resources:
  {{- include "sidepool.resources" (list $values.sidecars.resources (ternary (dict $values.rdma.resource $values.rdma.count) (dict) $values.rdma.enabled)) | nindent 2 }}
securityContext:
  {{- include "sidepool.containerSecurity" $root | nindent 2 }}
volumeMounts:
  {{- include "sidepool.mounts" $root | nindent 2 }}
  - name: config
    mountPath: /etc/sidepool
    readOnly: true
  {{- if include "sidepool.stored" $root }}
  - name: data
    mountPath: /data
  {{- end }}
{{- end -}}

{{/* Which nodes of the plan's pod, and of its racks, may be taken: (list context racks). */}}
{{- define "sidepool.nodeAffinity" -}}
{{- $topology := (index . 0).Values.topology -}}
{{- $racks := and $topology.rackLabel (index . 1) -}}
{{- if or (and $topology.podLabel $topology.pod) $racks -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          {{- if and $topology.podLabel $topology.pod }}
          - {key: {{ $topology.podLabel }}, operator: In, values: [{{ $topology.pod | quote }}]}
          {{- end }}
          {{- if $racks }}
          - {key: {{ $topology.rackLabel }}, operator: In, values: {{ toJson (index . 1) }}}
          {{- end }}
{{- end -}}
{{- end -}}
