{{/* Labels of every object. Call with (dict "root" $ "component" "operator"); component may be empty. */}}
{{- define "berth.labels" -}}
app.kubernetes.io/name: berth
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: berth
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* What selectors select by: our own key, never a shared one. */}}
{{- define "berth.selector" -}}
berth.dev/component: {{ .component }}
{{- end }}

{{- define "berth.metadata" -}}
name: berth-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "berth.labels" . | nindent 2 }}
{{- end }}

{{- define "berth.clusterMetadata" -}}
name: {{ .name | default (printf "berth-%s" .component) }}
labels:
  {{- include "berth.labels" . | nindent 2 }}
{{- end }}

{{- define "berth.imageOf" -}}
{{- $image := .image -}}
{{- $registry := $image.registry | default .root.Values.global.imageRegistry -}}
{{- if $registry }}{{ $registry }}/{{ end }}{{ $image.repository }}
{{- if or $image.tag (not $image.digest) }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- with $image.digest }}@{{ . }}{{ end }}
{{- end }}

{{- define "berth.image" -}}
{{- include "berth.imageOf" (dict "root" . "image" .Values.image) }}
{{- end }}

{{/* The runners' image: runner.image over image; another repository or tag drops the digest of image. */}}
{{- define "berth.runnerImage" -}}
{{- $own := .Values.runner.image -}}
{{- $base := .Values.image -}}
{{- $inherit := not (or $own.repository $own.tag $own.digest) -}}
{{- $image := dict
      "registry" ($own.registry | default $base.registry)
      "repository" ($own.repository | default $base.repository)
      "tag" ($own.tag | default (ternary $base.tag "" (or $inherit (and (not $own.repository) (not $own.digest)))))
      "digest" ($own.digest | default (ternary $base.digest "" $inherit)) -}}
{{- include "berth.imageOf" (dict "root" . "image" $image) }}
{{- end }}

{{/* The agents' image opens vendors' libraries, so it is another than the static one: berth-agent beside berth. */}}
{{- define "berth.agentImage" -}}
{{- $own := .Values.agent.image -}}
{{- $base := .Values.image -}}
{{- $image := dict
      "registry" ($own.registry | default $base.registry)
      "repository" ($own.repository | default (printf "%s-agent" $base.repository))
      "tag" ($own.tag | default (ternary $base.tag "" (empty $own.digest)))
      "digest" $own.digest -}}
{{- include "berth.imageOf" (dict "root" . "image" $image) }}
{{- end }}

{{- define "berth.serviceAccount" -}}
{{- $values := index .root.Values .component -}}
{{- $values.serviceAccount.name | default (printf "berth-%s" .component) }}
{{- end }}

{{/* <pod ip>:<port>; the kubelet expands the variable. */}}
{{- define "berth.listen" -}}
{{- if eq .root.Values.ipFamily "IPv6" -}}[$(BERTH_POD_IP)]:{{ .port }}{{- else -}}$(BERTH_POD_IP):{{ .port }}{{- end }}
{{- end }}

{{/* The environment that every part is given; the contract is the table in README.md. */}}
{{- define "berth.env" -}}
- name: BERTH_POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: BERTH_POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: BERTH_POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: BERTH_NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: BERTH_LOG
  value: {{ .root.Values.log | quote }}
- name: BERTH_ADMIN_LISTEN
  value: {{ include "berth.listen" (dict "root" .root "port" .adminPort) | quote }}
{{- with .root.Values.tracing.otlpEndpoint }}
- name: BERTH_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/* Exporters of vendors whose names agents use besides. Call with the agent's values. */}}
{{- define "berth.exporters" -}}
{{- $wanted := list }}
{{- range $exporter := list "dcgm" "npu" }}
{{- if get $.compat $exporter }}
{{- $wanted = append $wanted $exporter }}
{{- end }}
{{- end }}
{{- join "," $wanted }}
{{- end }}

{{/* How a monitor scrapes. Call with the monitor's values. */}}
{{- define "berth.scrape" -}}
interval: {{ .interval }}
{{- with .scrapeTimeout }}
scrapeTimeout: {{ . }}
{{- end }}
{{- end }}

{{- define "berth.probes" -}}
startupProbe:
  httpGet: {path: /startupz, port: admin}
  periodSeconds: 1
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  timeoutSeconds: 3
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 2
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* What the restricted Pod Security Standard asks for. */}}
{{- define "berth.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "berth.restrictedContainer" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "berth.serviceAccountObject" -}}
{{- $values := index .root.Values .component -}}
{{- if $values.serviceAccount.create }}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "berth.serviceAccount" . }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "berth.labels" . | nindent 4 }}
  {{- with $values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- end }}

{{/* Binds the ClusterRole, and the Role if "role" is set, to the component's service account. */}}
{{- define "berth.bindings" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  {{- include "berth.clusterMetadata" . | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: berth-{{ .component }}}
subjects:
  - {kind: ServiceAccount, name: {{ include "berth.serviceAccount" . }}, namespace: {{ .root.Release.Namespace }}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "berth.metadata" . | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: berth-{{ .component }}}
subjects:
  - {kind: ServiceAccount, name: {{ include "berth.serviceAccount" . }}, namespace: {{ .root.Release.Namespace }}}
{{- end }}

{{/* Keeps its own Lease. A name can restrict every verb but create, which is for a Lease deleted by hand. */}}
{{- define "berth.leaseRole" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "berth.metadata" . | nindent 2 }}
rules:
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [create]
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    resourceNames: [berth-{{ .component }}]
    verbs: [get, update]
{{- end }}

{{- define "berth.pdb" -}}
{{- $values := index .root.Values .component -}}
{{- if and $values.pdb.create (gt (int $values.replicas) 1) }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "berth.metadata" . | nindent 2 }}
spec:
  minAvailable: {{ $values.pdb.minAvailable }}
  selector:
    matchLabels:
      {{- include "berth.selector" . | nindent 6 }}
{{- end }}
{{- end }}

{{/* A Deployment of a part that needs no hardware. "ports" and "env" are YAML texts that are added, "secrets" are
names of Secrets by the folder of /etc/berth where they are mounted. */}}
{{- define "berth.deployment" -}}
{{- $values := index .root.Values .component -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "berth.metadata" . | nindent 2 }}
spec:
  replicas: {{ $values.replicas }}
  selector:
    matchLabels:
      {{- include "berth.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "berth.labels" . | nindent 8 }}
        {{- include "berth.selector" . | nindent 8 }}
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "berth.serviceAccount" . }}
      automountServiceAccountToken: true
      terminationGracePeriodSeconds: 45
      {{- with $values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with .root.Values.global.imagePullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      securityContext:
        {{- include "berth.restrictedPod" . | nindent 8 }}
      containers:
        - name: {{ .component }}
          image: {{ include "berth.image" .root | quote }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          args:
            - {{ .component }}
            {{- with $values.extraArgs }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          env:
            {{- include "berth.env" (dict "root" .root "adminPort" 8081) | nindent 12 }}
            {{- with .env }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- with $values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: admin, containerPort: 8081}
            {{- with .ports }}
            {{- . | nindent 12 }}
            {{- end }}
          {{- include "berth.probes" . | nindent 10 }}
          securityContext:
            {{- include "berth.restrictedContainer" . | nindent 12 }}
          {{- with $values.resources }}
          resources:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with .secrets }}
          volumeMounts:
            {{- range $folder, $_ := . }}
            - {name: {{ $folder }}, mountPath: /etc/berth/{{ $folder }}, readOnly: true}
            {{- end }}
          {{- end }}
      {{- with .secrets }}
      volumes:
        {{- range $folder, $secret := . }}
        - {name: {{ $folder }}, secret: {secretName: {{ $secret }}}}
        {{- end }}
      {{- end }}
      topologySpreadConstraints:
        {{- with $values.topologySpreadConstraints }}
        {{- toYaml . | nindent 8 }}
        {{- else }}
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "berth.selector" . | nindent 14 }}
        {{- end }}
      {{- with $values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      affinity:
        {{- with $values.affinity }}
        {{- toYaml . | nindent 8 }}
        {{- else }}
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - weight: 100
              preference:
                matchExpressions: [{key: berth.dev/mode, operator: NotIn, values: [native]}]
        {{- end }}
      tolerations:
        # Where every node hosts experts, there is no other place; elsewhere the affinity keeps away.
        - {key: berth.dev/native, operator: Exists}
        {{- with $values.tolerations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}
