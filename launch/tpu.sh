#!/usr/bin/env bash
# Trains one stage on Cloud TPU: asks for slices as a queued resource, starts the run on every VM over ssh and follows
# it. If slices are lost, it asks for new ones, and the run resumes from its last checkpoint.
#   bash launch/tpu.sh --settings FILE --config configs/stage1_align.py:0.5b --workdir gs://BUCKET/DIR [--dry_run] [--config.KEY=VALUE ...]
# Ctrl-C ends this script, not the run; the same command follows the run again. docs/tpu.md explains every step.
set -euo pipefail
launcher=tpu here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
parse_arguments "$@"
read_settings "PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION NAME BUCKET IMAGE" \
  NUM_SLICES=1 SPOT=no QUOTA= SERVICE_ACCOUNT= NETWORK= MAX_RESTARTS=20 POLL_SECONDS=30 KEEP=no
whole NUM_SLICES MAX_RESTARTS POLL_SECONDS
one_of SPOT yes no
one_of KEEP yes no
[[ $ACCELERATOR_TYPE =~ ^v[0-9a-z]+-[0-9]+$ ]] ||
  fail "$settings: ACCELERATOR_TYPE=$ACCELERATOR_TYPE must be like v5litepod-16, v6e-16 or v5p-16"
MOUNT=/gcs/$BUCKET
workdir_in_bucket
mount_names
where=(--zone="$ZONE" --project="$PROJECT")
if [ "$NUM_SLICES" = 1 ]; then
  nodes=("$NAME") shape=(--node-id="$NAME")
else
  nodes=() shape=(--node-count="$NUM_SLICES" --node-prefix="$NAME")
  for ((i = 0; i < NUM_SLICES; i++)); do nodes+=("$NAME-$i"); done
fi

check() {
  check_google_cloud
  ask "ACCELERATOR_TYPE=$ACCELERATOR_TYPE is not offered in ZONE=$ZONE: gcloud compute tpus tpu-vm accelerator-types list --zone=$ZONE" \
    gcloud compute tpus tpu-vm accelerator-types describe "$ACCELERATOR_TYPE" "${where[@]}" >/dev/null
  ask "RUNTIME_VERSION=$RUNTIME_VERSION is not offered in ZONE=$ZONE: gcloud compute tpus tpu-vm versions list --zone=$ZONE" \
    gcloud compute tpus tpu-vm versions describe "$RUNTIME_VERSION" "${where[@]}" >/dev/null
  [ -z "$QUOTA" ] || check_quota
}

# Compares the quota with the slices. gcloud prints lines of ZONE,VALUE; the line without a zone is for all other zones.
# The quota counts chips or cores as the name of the accelerator type does.
check_quota() {
  local wanted=$((${ACCELERATOR_TYPE##*-} * NUM_SLICES)) granted
  granted=$(ask "QUOTA=$QUOTA cannot be read: gcloud beta quotas info list --service=tpu.googleapis.com --project=$PROJECT" \
    gcloud beta quotas info describe "$QUOTA" --service=tpu.googleapis.com --project="$PROJECT" \
    "--flatten=dimensionsInfos[]" "--format=csv[no-heading](dimensionsInfos.dimensions.zone,dimensionsInfos.details.value)")
  [ "$dry_run" = no ] || return 0
  granted=$(awk -F, -v zone="$ZONE" '$1 == zone { found = $2 } $1 == "" { other = $2 } END { print found != "" ? found : other + 0 }' <<<"$granted")
  [ "$granted" = -1 ] || [ "$granted" -ge "$wanted" ] ||
    fail "quota $QUOTA in $ZONE is $granted and $NUM_SLICES x $ACCELERATOR_TYPE needs $wanted: ask for more at https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT"
}

# Prints the state of the queued resource: ACTIVE, SUSPENDED ...; NONE if there is none, UNKNOWN if gcloud fails.
state() {
  if gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)" 2>"$scratch/errors"; then
    return
  elif grep -qE 'NOT_FOUND|not found' "$scratch/errors"; then
    echo NONE
  else
    echo "$launcher: $(tail -n 1 "$scratch/errors")" >&2
    echo UNKNOWN
  fi
}

create() {
  local options=()
  [ "$SPOT" = no ] || options+=(--spot)
  [ -z "$SERVICE_ACCOUNT" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  [ -z "$NETWORK" ] || options+=(--network="$NETWORK")
  ask "the slices cannot be requested" gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${shape[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" "${options[@]}"
}

delete() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

# Returns when the slices are ready: requests them, waits, and requests them again if they are lost.
get_slices() {
  local now
  if [ "$dry_run" = yes ]; then
    create
    say "until it prints ACTIVE; after FAILED, SUSPENDING or SUSPENDED the queued resource is deleted and created again"
    show gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" "--format=value(state.state)"
    return
  fi
  while :; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      NONE) say "asking for $NUM_SLICES x $ACCELERATOR_TYPE"; create; continue ;;
      FAILED | SUSPENDING | SUSPENDED) count_restart "the slices are $now"; delete; continue ;;
      *) say "$NAME is $now" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# give_up REASON: ends this script, and leaves the slices as they are.
give_up() {
  fail "$1; slices that still exist cost money, delete them: gcloud compute tpus queued-resources delete $NAME ${where[*]} --force"
}

# count_restart REASON: counts one more restart; fails if it is one too many from the same checkpoint.
count_restart() {
  may_restart || give_up "$1, after $MAX_RESTARTS restarts from the same checkpoint (MAX_RESTARTS)"
  say "$1: restart $restarts of $MAX_RESTARTS from step $reached"
}

# ssh_to NODE WORKERS COMMAND: runs a command on these VMs of a slice.
ssh_to() { run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" --worker="$2" --command="$3"; }

# Prints the script that every VM runs: it starts the container unless this run is in progress there.
start_script() {
  cat <<END
#!/usr/bin/env bash
set -euo pipefail
case \$(sudo docker inspect --format='{{.State.Running}} {{.Config.Labels.workdir}}' fastvlm 2>/dev/null) in
  "true $run_workdir") exit 0 ;;
  true*) echo "another run is at work here: give this one another NAME" >&2; exit 1 ;;
esac
sudo docker rm --force fastvlm >/dev/null 2>&1 || true
sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet
sudo docker pull --quiet $IMAGE
sudo docker run --detach --name=fastvlm --init --privileged --net=host --stop-timeout=120 --label=workdir=$run_workdir \\
  --env=FASTVLM_INITIALIZATION_SECONDS=1800 \\
  $IMAGE \\
  bash launch/with_bucket.sh $BUCKET \\
  $(show fastvlm "${fastvlm[@]}")
END
}

# Copies the script to every VM and runs it.
start() {
  local node file=${scratch:-SCRATCH}/fastvlm_start.sh
  start_script | write "$file"
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$file" "$node:fastvlm_start.sh" "${where[@]}" --worker=all || return
    ssh_to "$node" all "bash fastvlm_start.sh" || return
  done
}

# Shows the output of the first VM until the run ends. Sets `status`: the exit status; empty if the VM is unreachable.
follow() {
  ssh_to "${nodes[0]}" 0 "sudo docker logs --follow --tail=20 fastvlm" || true
  status=$(ssh_to "${nodes[0]}" 0 "sudo docker wait fastvlm" | tail -n 1) || true
  [ "$dry_run" = no ] || status=0
  [[ $status =~ ^[0-9]+$ ]] || status=
}

stop_all() {
  local node
  for node in "${nodes[@]}"; do ssh_to "$node" all "sudo docker rm --force fastvlm" || true; done
}

say "checks"
check
part_with "the run goes on; the same command follows it again; docs/tpu.md, step 7, says how to stop it"
while :; do
  say "slices"
  get_slices
  say "the run, on every VM of ${nodes[*]}"
  if ! start; then
    count_restart "a VM cannot be started"
    run sleep "$POLL_SECONDS"
    continue
  fi
  say "its output and its exit status"
  follow
  case $status in
    0) break ;;
    2) stop_all; give_up "fastvlm $command does not understand its flags (see above)" ;;
    130) stop_all; give_up "fastvlm $command got Ctrl-C and has saved; the same command goes on" ;;
    '') say "the connection is lost"; sleep "$POLL_SECONDS" ;; # the VM was preempted, or this machine is offline
    *) count_restart "fastvlm $command ended with status $status"; stop_all ;;
  esac
done
if [ "$KEEP" = no ]; then
  say "the end"
  delete
fi
say "$past: $workdir"
