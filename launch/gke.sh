#!/usr/bin/env bash
# Trains one stage on Google Kubernetes Engine (GKE), as a JobSet with one Job per TPU slice. If a pod is lost or fails,
# the JobSet starts all pods again, and the run resumes from its last checkpoint. The JobSet counts all restarts; this
# script applies it anew when they are used up and the run has written checkpoints meanwhile.
#   bash launch/gke.sh --settings FILE --config configs/stage1_align.py:0.5b --workdir gs://BUCKET/DIR [--dry_run] [--config.KEY=VALUE ...]
# Ctrl-C ends this script, not the run; the same command follows the run again. docs/tpu.md explains every step.
set -euo pipefail
launcher=gke here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
parse_arguments "$@"
read_settings "PROJECT LOCATION CLUSTER NAME BUCKET IMAGE ACCELERATOR TOPOLOGY MACHINE_TYPE" \
  NAMESPACE=default SERVICE_ACCOUNT=default NUM_SLICES=1 SPOT=no MAX_RESTARTS=20 POLL_SECONDS=30
whole NUM_SLICES MAX_RESTARTS POLL_SECONDS
one_of SPOT yes no
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] ||
  fail "$settings: NAME=$NAME must be lower-case letters, digits and hyphens, at most 32 characters: the names of pods are made from it"
[[ $TOPOLOGY =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "$settings: TOPOLOGY=$TOPOLOGY must be like 4x4 or 2x2x4"
[[ $MACHINE_TYPE =~ -([0-9]+)t$ ]] || fail "$settings: MACHINE_TYPE=$MACHINE_TYPE must end in its number of chips, like ct5lp-hightpu-4t"
chips_per_vm=${BASH_REMATCH[1]} chips=$((${TOPOLOGY//x/*}))
[ $((chips % chips_per_vm)) = 0 ] ||
  fail "$settings: TOPOLOGY=$TOPOLOGY has $chips chips, which is not a multiple of the $chips_per_vm chips of MACHINE_TYPE=$MACHINE_TYPE"
vms=$((chips / chips_per_vm))
MOUNT=/gcs/$BUCKET
workdir_in_bucket
mount_names
kubectl=(kubectl --context="gke_${PROJECT}_${LOCATION}_$CLUSTER" --namespace="$NAMESPACE")

check() {
  local pools driver
  check_google_cloud
  installed kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
  driver=$(ask "CLUSTER=$CLUSTER cannot be seen in LOCATION=$LOCATION: gcloud container clusters list --project=$PROJECT" \
    gcloud container clusters describe "$CLUSTER" --location="$LOCATION" --project="$PROJECT" \
    "--format=value(addonsConfig.gcsFuseCsiDriverConfig.enabled)")
  [ "$dry_run" = yes ] || [ "$driver" = True ] ||
    fail "CLUSTER=$CLUSTER cannot mount buckets: gcloud container clusters update $CLUSTER --location=$LOCATION --project=$PROJECT --update-addons=GcsFuseCsiDriver=ENABLED"
  pools=$(ask "the node pools of $CLUSTER cannot be listed" \
    gcloud container node-pools list --cluster="$CLUSTER" --location="$LOCATION" --project="$PROJECT" \
    "--filter=config.machineType=$MACHINE_TYPE" "--format=value(name)")
  # One node pool is one slice. The topology is not compared: a pool of a single machine does not list it.
  [ "$dry_run" = yes ] || [ "$(wc -w <<<"$pools")" -ge "$NUM_SLICES" ] ||
    fail "CLUSTER=$CLUSTER has $(wc -w <<<"$pools") node pools of $MACHINE_TYPE and NUM_SLICES=$NUM_SLICES: create them, see docs/tpu.md, GKE"
  ask "kubectl has no context of $CLUSTER: gcloud container clusters get-credentials $CLUSTER --location=$LOCATION --project=$PROJECT" \
    "${kubectl[@]}" get namespace "$NAMESPACE" --output=name >/dev/null
  ask "CLUSTER=$CLUSTER has no JobSets: install them, see docs/tpu.md, GKE" \
    "${kubectl[@]}" get crd jobsets.jobset.x-k8s.io --output=name >/dev/null
  ask "there is no SERVICE_ACCOUNT=$SERVICE_ACCOUNT in NAMESPACE=$NAMESPACE: create it, see docs/tpu.md, GKE" \
    "${kubectl[@]}" get serviceaccount "$SERVICE_ACCOUNT" --output=name >/dev/null
}

# quoted TEXT: prints TEXT as a JSON string, which is also a YAML string.
quoted() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

command_yaml() {
  local word
  for word in fastvlm "${fastvlm[@]}"; do
    echo "                - $(quoted "$word")"
  done
}

# Prints the JobSet. Wrong flags (exit status 2) and Ctrl-C (130) make it fail at once, because a restart is no mend;
# every other failure counts towards maxRestarts. The processes find each other through environment variables that GKE
# sets; TPU hosts and slices communicate on ports 8471 and 8080.
jobset() {
  local spot=
  [ "$SPOT" = no ] || spot='
                cloud.google.com/gke-spot: "true"'
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  namespace: $NAMESPACE
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    fastvlm/workdir: $(quoted "$workdir")
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - name: NotAgain
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $NUM_SLICES
      template:
        spec:
          parallelism: $vms
          completions: $vms
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: fastvlm
                  operator: In
                  values: [2, 130]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              serviceAccountName: $SERVICE_ACCOUNT
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY$spot
              containers:
                - name: fastvlm
                  image: $IMAGE
                  command:
$(command_yaml | sed 's/^/    /')
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $chips_per_vm
                  volumeMounts:
                    - name: bucket
                      mountPath: $MOUNT
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $BUCKET
                      mountOptions: "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"
END
}

# field PATH: prints this field of the JobSet, or nothing if there is no JobSet.
field() {
  ask "the JobSet $NAME cannot be looked up" \
    "${kubectl[@]}" get jobset "$NAME" --ignore-not-found --output="jsonpath={$1}"
}

# Applies the JobSet unless it is running already. The JobSet of a run that has ended is removed first.
start() {
  local there finished
  there=$(field '.metadata.annotations.fastvlm/workdir')
  finished=$(field .status.terminalState)
  if [ -n "$there" ] && [ -z "$finished" ]; then
    [ "$there" = "$workdir" ] || fail "the JobSet $NAME is at work on $there: give this run another NAME in $settings"
    say "the JobSet $NAME is at work already"
    return
  fi
  [ -z "$finished" ] || run "${kubectl[@]}" delete jobset "$NAME" --wait
  local file=${scratch:-SCRATCH}/jobset.yaml
  jobset | write "$file"
  run "${kubectl[@]}" apply --filename="$file"
}

# Waits for the end of the JobSet. A question that gets no answer is asked again. Fails if the JobSet has used up its
# restarts, but the run has come further since it was applied, and so deserves more.
follow() {
  local finished restarts before=
  if [ "$dry_run" = yes ]; then
    say "until it prints Completed or Failed"
    field .status.terminalState
    return
  fi
  while :; do
    finished=$(field .status.terminalState) || finished=
    case $finished in
      Completed) return ;;
      Failed)
        restarts=$(field .status.restarts)
        [ "${restarts:-0}" = 0 ] || [ "$restarts" -lt "$MAX_RESTARTS" ] || [ "$(saved_step)" -le "$reached" ] || return
        fail "the JobSet $NAME failed: ${kubectl[*]} logs --selector=jobset.sigs.k8s.io/jobset-name=$NAME --container=fastvlm --tail=50" ;;
    esac
    restarts=$(field .status.restarts) || restarts=$before
    [ "$restarts" = "$before" ] || say "$NAME at work, restarts: ${restarts:-0} of $MAX_RESTARTS"
    before=$restarts
    sleep "$POLL_SECONDS"
  done
}

say "checks"
check
part_with "the run goes on; the same command follows it again; docs/tpu.md, GKE, says how to stop it"
reached=$(saved_step)
say "the JobSet, unless it is at work already"
start
say "its output: ${kubectl[*]} logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0 --container=fastvlm"
until follow; do
  reached=$(saved_step)
  say "all $MAX_RESTARTS restarts are used up, but the run has come to step $reached: the JobSet is applied anew"
  start
done
say "$past: $workdir"
