{{/* Name of a component's objects: RELEASE-COMPONENT. */}}
{{- define "kms.name" -}}{{ .root.Release.Name }}-{{ .component }}{{- end }}

{{- define "kms.selector" -}}
app.kubernetes.io/name: key-management-hsm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "kms.labels" -}}
{{ include "kms.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Image of a block of the values; the tag falls back to the chart's version. */}}
{{- define "kms.image" -}}
{{ .block.image.repository }}:{{ .block.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "kms.openshift" -}}
{{- if or .Values.openshift (.Capabilities.APIVersions.Has "security.openshift.io/v1") }}true{{ end }}
{{- end }}

{{/* The constraint that admits the pods of a component, on OpenShift. */}}
{{- define "kms.scc" -}}
{{- $v := .root.Values -}}
{{- if $v.scc }}{{ $v.scc }}
{{- else if and (eq .component "oss") $v.hsm.hostNetwork (ne $v.hsm.hsm_model "softhsm") }}hostnetwork-v2
{{- else }}restricted-v2
{{- end }}
{{- end }}

{{/* The image's user is 65532:0; any other uid in group 0 works as well. */}}
{{- define "kms.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- if not (include "kms.openshift" .) }}
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
{{- end }}
{{- end }}

{{- define "kms.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod has in common. */}}
{{- define "kms.podCommon" -}}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
{{- toYaml . | nindent 0 }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
{{- toYaml . | nindent 0 }}
{{- end }}
{{- if .root.Values.affinity }}
affinity:
{{- toYaml .root.Values.affinity | nindent 2 }}
{{- else if gt (int (index .root.Values .component).replicas) 1 }}
# Preferred, so that a small site has them all the same.
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- include "kms.selector" . | nindent 14 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
serviceAccountName: {{ include "kms.name" . }}
securityContext:
{{- include "kms.podSecurity" .root | nindent 2 }}
{{- end }}

{{- define "kms.podMeta" -}}
labels:
  {{- include "kms.labels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The members of the store: their pods' names and DNS names. */}}
{{- define "kms.members" -}}
{{- $name := include "kms.name" (dict "root" . "component" "storage") -}}
{{- $out := list -}}
{{- range $i := until (int .Values.storage.replicas) -}}
{{- $pod := printf "%s-%d" $name $i -}}
{{- $out = append $out (dict "name" $pod "host" (printf "%s.%s.%s.svc.%s" $pod $name $.Release.Namespace $.Values.clusterDomain)) -}}
{{- end -}}
{{- toJson $out -}}
{{- end }}

{{/* A drained node takes one replica at a time. */}}
{{- define "kms.budget" }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "kms.name" . }}
  labels:
    {{- include "kms.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "kms.selector" . | nindent 6 }}
{{- end }}

{{/* A volume of a pod that is not a claim template: an existing claim, a folder
of the node, or nothing kept. Empty when a claim template makes it. */}}
{{- define "kms.volume" -}}
{{- $p := .root.Values.persistence -}}
{{- if .own.existingClaim }}
- name: {{ .name }}
  persistentVolumeClaim:
    claimName: {{ .own.existingClaim | quote }}
{{- else if $p.hostPath }}
- name: {{ .name }}
  hostPath:
    path: {{ printf "%s/%s/%s" $p.hostPath .root.Release.Name .name | quote }}
    type: DirectoryOrCreate
{{- else if $p.emptyDir }}
- name: {{ .name }}
  emptyDir: {}
{{- end }}
{{- end }}

{{- define "kms.claim" -}}
{{- $p := .root.Values.persistence -}}
{{- if not (or .own.existingClaim $p.hostPath $p.emptyDir) }}
- metadata:
    name: {{ .name }}
    labels:
      {{- include "kms.selector" . | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- if eq $p.storageClass "-" }}
    storageClassName: ""
    {{- else if $p.storageClass }}
    storageClassName: {{ $p.storageClass | quote }}
    {{- end }}
    resources:
      requests:
        storage: {{ .own.size | quote }}
{{- end }}
{{- end }}

{{/* A folder of the node belongs to root. Root of the container, without any
capability, opens it to group 0. */}}
{{- define "kms.prepare" -}}
{{- if .root.Values.persistence.hostPath }}
- name: prepare
  image: {{ include "kms.image" (dict "root" .root "block" .block) }}
  imagePullPolicy: {{ .root.Values.imagePullPolicy }}
  command: [/kms-server, run, prepare]
  args:
    {{- range .names }}
    - /volumes/{{ . }}
    {{- end }}
  securityContext:
    runAsNonRoot: false
    runAsUser: 0
    {{- include "kms.containerSecurity" .root | nindent 4 }}
  volumeMounts:
    {{- range .names }}
    - name: {{ . }}
      mountPath: /volumes/{{ . }}
    {{- end }}
{{- end }}
{{- end }}

{{/* The connector of an HSM: hsm is its block of the values, more the end of the
names of what it mounts. */}}
{{- define "kms.connector" -}}
{{- $m := .hsm.hsm_model -}}
{{- $block := index .root.Values $m -}}
- name: {{ .name }}
  image: {{ include "kms.image" (dict "root" .root "block" $block) }}
  imagePullPolicy: {{ .root.Values.imagePullPolicy }}
  args:
    - --socket=/run/kms/{{ .socket }}.sock
    - --pin-file=/run/hsm/hsm-pass
    {{- if and .root.Values.migration.hsm.hsm_model (not .more) }}
    - --gives-keys
    {{- end }}
    {{- if eq $m "softhsm" }}
    - --module={{ .hsm.module | default "/usr/lib/softhsm/libsofthsm2.so" }}
    - --token-label={{ .hsm.tokenLabel | default "kms" }}
    - --softhsm-dir=/token/softhsm
    {{- else if eq $m "gemalto" }}
    - --module={{ .hsm.module | default "/usr/safenet/lunaclient/lib/libCryptoki2_64.so" }}
    {{- with .hsm.tokenLabel }}
    - --token-label={{ . }}
    {{- else }}
    - --slot=0
    {{- end }}
    {{- else }}
    - --module={{ .hsm.module | default "/opt/nfast/toolkits/pkcs11/libcknfast.so" }}
    {{- with .hsm.tokenLabel }}
    - --token-label={{ . }}
    {{- else }}
    - --slot={{ .hsm.slotId }}
    {{- end }}
    {{- end }}
  {{- if eq $m "gemalto" }}
  env:
    - name: ChrystokiConfigurationPath
      value: /etc/luna
    # Certificate, source address and registration at the appliance must
    # be the same node's.
    - name: HOST_IP
      valueFrom:
        fieldRef:
          fieldPath: status.hostIP
  {{- else if eq $m "thales" }}
  env:
    - name: NFAST_SERVER
      value: /opt/nfast/sockets/nserver
  {{- end }}
  startupProbe:
    exec:
      command: [/usr/bin/kms-connector, check, --socket=/run/kms/{{ .socket }}.sock]
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: 60
  livenessProbe:
    exec:
      command: [/usr/bin/kms-connector, check, --socket=/run/kms/{{ .socket }}.sock]
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 3
  {{- with $block.resources }}
  resources:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- include "kms.containerSecurity" .root | nindent 4 }}
  volumeMounts:
    - name: connector
      mountPath: /run/kms
    - name: tmp
      mountPath: /tmp
    - name: pin{{ .more }}
      mountPath: /run/hsm
      readOnly: true
    {{- if eq $m "softhsm" }}
    - name: token
      mountPath: /token
    {{- else if eq $m "gemalto" }}
    - name: hsm-config{{ .more }}
      mountPath: /etc/luna
      readOnly: true
    - name: server-ca{{ .more }}
      mountPath: /run/luna/server
      readOnly: true
    - name: client-certs{{ .more }}
      mountPath: /run/luna/client/client.pem
      subPathExpr: $(HOST_IP)
      readOnly: true
    - name: client-certs{{ .more }}
      mountPath: /run/luna/client/clientKey.pem
      subPathExpr: $(HOST_IP)-key
      readOnly: true
    {{- else }}
    - name: sockets
      mountPath: /opt/nfast/sockets
    - name: kmdata
      mountPath: /opt/nfast/kmdata/local
    - name: hsm-config{{ .more }}
      mountPath: /opt/nfast/cknfastrc
      subPath: cknfastrc
      readOnly: true
    {{- end }}
{{- end }}

{{/* The certificates of a Luna client. */}}
{{- define "kms.lunaVolumes" -}}
- name: server-ca{{ .more }}
  secret:
    secretName: {{ .hsm.secretName | quote }}
    defaultMode: 0440
    items:
      - key: ServerCAFile
        path: CAFile.pem
- name: client-certs{{ .more }}
  secret:
    secretName: {{ .hsm.secretName | quote }}
    defaultMode: 0440
{{- end }}

{{/* Values that contradict each other stop here, with the reason. */}}
{{- define "kms.check" -}}
{{- $v := .Values -}}
{{- $m := $v.hsm.hsm_model -}}
{{- if not (has $m (list "gemalto" "thales" "softhsm")) }}
{{- fail (printf "hsm.hsm_model: unknown HSM model %q: known are gemalto, thales, softhsm" $m) }}
{{- end }}
{{- if and (ne $m "softhsm") (not $v.hsm.hsm_ip) }}
{{- fail (printf "hsm.hsm_ip: missing for the model %s" $m) }}
{{- end }}
{{- if and (eq $m "thales") (not $v.hsm.rfs_ip) }}
{{- fail "hsm.rfs_ip: missing for the model thales" }}
{{- end }}
{{- if and (eq $m "thales") (not $v.hsm.slotId) }}
{{- fail "hsm.slotId: missing for the model thales" }}
{{- end }}
{{- $next := $v.migration.hsm -}}
{{- if and $next.hsm_model (or (ne $next.hsm_model $m) (eq $m "thales")) }}
{{- fail (printf "migration.hsm.hsm_model: %s to %s: keys of a release move between two HSMs of one model, softhsm or gemalto" $m $next.hsm_model) }}
{{- end }}
{{- if and (eq $next.hsm_model "gemalto") (not $next.hsm_ip) }}
{{- fail "migration.hsm.hsm_ip: missing for the model gemalto" }}
{{- end }}
{{- if and (eq $next.hsm_model "softhsm") (eq ($next.tokenLabel | default "kms") ($v.hsm.tokenLabel | default "kms")) }}
{{- fail "migration.hsm.tokenLabel: a second SoftHSM token has a label of its own" }}
{{- end }}
{{- if and $v.persistence.hostPath $v.persistence.emptyDir }}
{{- fail "persistence: hostPath and emptyDir exclude each other" }}
{{- end }}
{{- if and $v.persistence.hostPath (include "kms.openshift" .) (not $v.scc) }}
{{- fail "persistence.hostPath: on OpenShift say by scc which security context constraint lets pods use folders of the node" }}
{{- end }}
{{- if and $v.persistence.hostPath (not (hasPrefix "/" $v.persistence.hostPath)) }}
{{- fail "persistence.hostPath: not an absolute path" }}
{{- end }}
{{- if and (eq $m "softhsm") (gt (int $v.oss.replicas) 1) }}
{{- fail "oss.replicas: a SoftHSM token is one folder that one process may use: 1 replica at most" }}
{{- end }}
{{- if and $v.oss.tokenAudiences (not $v.oss.serviceAccountTokens) }}
{{- fail "oss.tokenAudiences: needs oss.serviceAccountTokens" }}
{{- end }}
{{- if not (has (int $v.storage.replicas) (list 1 3)) }}
{{- fail (printf "storage.replicas: %d; a store has 1 member or 3" (int $v.storage.replicas)) }}
{{- end }}
{{- if and (gt (int $v.storage.replicas) 1) $v.storage.persistence.existingClaim }}
{{- fail "storage.persistence.existingClaim: one claim cannot serve several members" }}
{{- end }}
{{- if and (gt (int $v.storage.replicas) 1) $v.persistence.emptyDir }}
{{- fail "storage.replicas: a member of several must not come back without its data, so that persistence.emptyDir goes with 1 member only" }}
{{- end }}
{{- $was := dig "metadata" "annotations" "kmsctl/hsm-model" "" (lookup "apps/v1" "StatefulSet" .Release.Namespace (include "kms.name" (dict "root" . "component" "oss"))) }}
{{- if and $was (ne $was $m) }}
{{- fail (printf "hsm.hsm_model: the release runs %s, and its data open with the master keys in that HSM alone: %s needs a new installation" $was $m) }}
{{- end }}
{{- $have := lookup "apps/v1" "StatefulSet" .Release.Namespace (include "kms.name" (dict "root" . "component" "storage")) }}
{{- if and $have $have.spec.replicas (gt (int $have.spec.replicas) (int $v.storage.replicas)) }}
{{- fail (printf "storage.replicas: the store has %d, and grows from 1 to 3 but never shrinks: only a new installation can have fewer" (int $have.spec.replicas)) }}
{{- end }}
{{- if and (gt (int $v.oss.replicas) 1) $v.oss.persistence.existingClaim }}
{{- fail "oss.persistence.existingClaim: one claim cannot serve several replicas" }}
{{- end }}
{{- end }}
