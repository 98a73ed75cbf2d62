#!/usr/bin/env bash
# Trains one stage on this machine, with one or several processes. A run that fails is started again, as often as the
# settings allow, and resumes from its last checkpoint. On Ctrl-C or SIGTERM the run saves and ends.
#   bash launch/local.sh --settings FILE --config configs/stage1_align.py:0.5b --workdir DIR [--dry_run] [--config.KEY=VALUE ...]
set -euo pipefail
launcher=local here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
parse_arguments "$@"
read_settings "PLATFORM" NUM_PROCESSES=1 DEVICES_PER_PROCESS=1 PORT=12355 VENV=.venv BUCKET= MOUNT= MAX_RESTARTS=3 \
  WAIT_SECONDS=5
whole NUM_PROCESSES DEVICES_PER_PROCESS PORT MAX_RESTARTS WAIT_SECONDS
one_of PLATFORM cpu gpu tpu
[ "$command" != "bench ttft" ] || NUM_PROCESSES=1 # one user waits for one answer
[ "$PLATFORM" != tpu ] || [ "$NUM_PROCESSES" = 1 ] || fail "$settings: on a TPU VM one process has all chips: NUM_PROCESSES=1"
[ -z "$BUCKET" ] || [ -n "$MOUNT" ] || fail "$settings: MOUNT is missing: the folder where gs://$BUCKET is mounted"
mount_names

check() {
  [ "$dry_run" = yes ] && return
  [ -x "$VENV/bin/fastvlm" ] ||
    fail "there is no $VENV/bin/fastvlm: python3 -m venv $VENV && $VENV/bin/pip install -c requirements.txt -e ."
  make_output 2>"$scratch/errors" || fail "--workdir $workdir cannot be made: $(tail -n 1 "$scratch/errors")"
}

# make_process NUMBER: sets `process` to the command of this process, with its environment variables.
make_process() {
  local first=$(($1 * DEVICES_PER_PROCESS)) devices=() device
  for ((device = first; device < first + DEVICES_PER_PROCESS; device++)); do devices+=("$device"); done
  case $PLATFORM in
    # NPROC: a collective blocks one XLA thread per device until all devices arrive; with too few threads it hangs
    cpu) process=(env JAX_PLATFORMS=cpu NPROC=16 JAX_NUM_CPU_DEVICES="$DEVICES_PER_PROCESS") ;;
    gpu) process=(env JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${devices[*]}")") ;;
    tpu) process=(env JAX_PLATFORMS=tpu) ;;
  esac
  process+=("$VENV/bin/fastvlm" "${fastvlm[@]}")
  [ "$NUM_PROCESSES" = 1 ] ||
    process+=(--coordinator_address="127.0.0.1:$PORT" --num_processes="$NUM_PROCESSES" --process_id="$1")
}

# Runs all processes to their end. Sets `status`: 0 if all succeeded, 2 for wrong usage, else the status of a failure.
# Ctrl-C and SIGTERM set `stopped` to the status of the launcher.
run_all() {
  local i ended pids=()
  for ((i = 0; i < NUM_PROCESSES; i++)); do
    make_process "$i"
    set -m # a process group of its own: Ctrl-C reaches it only through the trap, because a second signal kills
    "${process[@]}" &
    set +m
    pids+=($!)
  done
  trap 'stopped=130; kill -TERM "${pids[@]}" 2>/dev/null || true; trap "" INT TERM' INT
  trap 'stopped=75; kill -TERM "${pids[@]}" 2>/dev/null || true; trap "" INT TERM' TERM
  status=0
  for i in "${!pids[@]}"; do
    ended=0
    wait "${pids[i]}" || ended=$?
    while kill -0 "${pids[i]}" 2>/dev/null; do # a trap interrupts a wait
      ended=0
      wait "${pids[i]}" || ended=$?
    done
    [ "$ended" = 0 ] || [ "$status" = 2 ] || status=$ended
  done
  trap - INT TERM
}

say "checks"
check
say "the run"
if [ "$dry_run" = yes ]; then
  for ((i = 0; i < NUM_PROCESSES; i++)); do
    make_process "$i"
    show "${process[@]}"
  done
  say "started again, at most $MAX_RESTARTS times from the same checkpoint, unless the status is 0, 2 or 130"
  exit
fi
stopped=
while :; do
  run_all
  [ "$status" != 0 ] || break
  [ "$status" != 130 ] || stopped=${stopped:-130} # the run got Ctrl-C, and not from here
  if [ -n "$stopped" ]; then
    case $status in
      75 | 130 | 143) say "stopped; the same command goes on"; exit "$stopped" ;; # 143: before it could save anything
      *) fail "fastvlm $command was told to stop and ended with status $status (see above)" ;;
    esac
  fi
  [ "$status" != 2 ] || fail "fastvlm $command does not understand its flags (see above)"
  may_restart || fail "fastvlm $command ended with status $status, after $MAX_RESTARTS restarts from the same checkpoint (MAX_RESTARTS)"
  say "fastvlm $command ended with status $status: restart $restarts of $MAX_RESTARTS from step $reached"
  sleep "$WAIT_SECONDS"
done
say "$past: $workdir"
