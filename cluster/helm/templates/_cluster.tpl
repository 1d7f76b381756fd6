{{/* The cluster of the base with this release's values, as YAML. */}}
{{- define "persona-pruner.cluster" -}}
{{- $cluster := .Files.Get "base/raycluster.yaml" | fromYaml }}
{{- $spec := $cluster.spec }}
{{- $worker := index $spec.workerGroupSpecs 0 }}
{{- $_ := set $worker "minReplicas" (int .Values.workers.min) }}
{{- $_ := set $worker "replicas" (int .Values.workers.min) }}
{{- $_ := set $worker "maxReplicas" (int .Values.workers.max) }}
{{- $size := dict "cpu" (toString .Values.workers.cpus) "memory" .Values.workers.memory }}
{{- if .Values.workers.gpus }}
{{- $_ := set $size "nvidia.com/gpu" (toString .Values.workers.gpus) }}
{{- end }}
{{- $_ := set (index $worker.template.spec.containers 0) "resources" (dict "requests" $size "limits" $size) }}
{{- $_ := set $worker.template.spec "tolerations" .Values.workers.tolerations }}
{{- with .Values.workers.nodeSelector }}
{{- $_ := set $worker.template.spec "nodeSelector" . }}
{{- end }}
{{- range $pod := list $spec.headGroupSpec.template.spec $worker.template.spec }}
{{- if $.Values.serving.enabled }}
{{- $container := index $pod.containers 0 }}
{{- $_ := set $container "ports" (append $container.ports (dict "name" "serve" "containerPort" 8000)) }}
{{- end }}
{{- $_ := set $pod "serviceAccountName" $.Release.Name }}
{{- range $volume := $pod.volumes }}
{{- if eq $volume.name "config" }}
{{- $_ := set $volume.configMap "name" $.Release.Name }}
{{- end }}
{{- end }}
{{- range $container := concat $pod.containers ($pod.initContainers | default list) }}
{{- $_ := set $container "image" (ternary $.Values.serving.image $.Values.image $.Values.serving.enabled) }}
{{- $_ := set (index $container.envFrom 0).secretRef "name" $.Values.secret }}
{{- range $name, $value := $.Values.env }}
{{- $_ := set $container "env" (append $container.env (dict "name" $name "value" (toString $value))) }}
{{- end }}
{{- end }}
{{- end }}
{{- toYaml $spec }}
{{- end }}

{{/* Names, labels and Kueue's part of a RayCluster or RayJob. */}}
{{- define "persona-pruner.metadata" -}}
name: {{ .Release.Name }}
labels:
  app.kubernetes.io/name: persona-pruner
  app.kubernetes.io/instance: {{ .Release.Name }}
  {{- with .Values.queue }}
  kueue.x-k8s.io/queue-name: {{ . }}
  {{- end }}
{{- if .Values.queue }}
annotations:
  kueue.x-k8s.io/elastic-job: "true"
{{- end }}
{{- end }}
