#!/usr/bin/env bash
# Trains one stage on a Slurm cluster of NVIDIA GPUs, with one process per GPU. Before the time limit, and when a node
# is lost, the job goes back into the queue; the run resumes from its last checkpoint.
#   bash launch/slurm.sh --settings FILE --config configs/stage1_align.py:0.5b --workdir DIR [--dry_run] [--config.KEY=VALUE ...]
# Ctrl-C ends this script, not the job; the same command follows the job again. scancel stops the job: it saves first.
set -euo pipefail
launcher=slurm here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"
parse_arguments "$@"
read_settings "NAME NODES GPUS_PER_NODE TIME VENV LOG_DIR" \
  PARTITION= ACCOUNT= QOS= CPUS_PER_GPU=8 BUCKET= MOUNT= MAX_RESTARTS=20 POLL_SECONDS=30
whole NODES GPUS_PER_NODE CPUS_PER_GPU MAX_RESTARTS POLL_SECONDS
[[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$ ]] || fail "$settings: TIME=$TIME must be like 24:00:00 or 2-00:00:00"
[ -z "$BUCKET" ] || [ -n "$MOUNT" ] || fail "$settings: MOUNT is missing: the folder where the nodes mount gs://$BUCKET"
mount_names
root=$(cd "$here/.." && pwd)
script=$LOG_DIR/$NAME.sbatch ended=$LOG_DIR/$NAME.status counted=$LOG_DIR/$NAME.restarts

check() {
  installed sbatch "run this on a login node of the cluster"
  [ -z "$PARTITION" ] || [ -n "$(ask "sinfo does not answer" sinfo --noheader --partition="$PARTITION" --format=%R)" ] ||
    [ "$dry_run" = yes ] || fail "there is no PARTITION=$PARTITION: sinfo lists them"
  [ -z "$ACCOUNT" ] || [ -n "$(ask "sacctmgr does not answer" sacctmgr --noheader --parsable2 show associations user="$USER" account="$ACCOUNT" format=account)" ] ||
    [ "$dry_run" = yes ] || fail "$USER may not use ACCOUNT=$ACCOUNT: sacctmgr show associations user=$USER lists yours"
  [ "$dry_run" = yes ] || [ -x "$VENV/bin/fastvlm" ] ||
    fail "there is no $VENV/bin/fastvlm: python3 -m venv $VENV && $VENV/bin/pip install -c requirements.txt -e '.[gpu]'"
  [ "$dry_run" = yes ] || { make_output && mkdir -p "$LOG_DIR"; } 2>"$scratch/errors" ||
    fail "--workdir $workdir or LOG_DIR=$LOG_DIR cannot be made: $(tail -n 1 "$scratch/errors")"
}

# Prints the batch script. Slurm sends USR1 two minutes before the time limit. The script then sends TERM to the run, as
# scancel and preemption do; the run saves and ends with status 75.
batch() {
  local meet=''
  # `fastvlm bench ttft` is one process.
  [ "$command" = "bench ttft" ] || meet=" \\
  --coordinator_address=\$COORDINATOR --num_processes=\$SLURM_NTASKS --process_id=\$SLURM_PROCID"
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS_PER_NODE
#SBATCH --gpus-per-node=$GPUS_PER_NODE
#SBATCH --cpus-per-task=$CPUS_PER_GPU
#SBATCH --time=$TIME
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=$LOG_DIR/$NAME.log
END
  [ -z "$PARTITION" ] || echo "#SBATCH --partition=$PARTITION"
  [ -z "$ACCOUNT" ] || echo "#SBATCH --account=$ACCOUNT"
  [ -z "$QOS" ] || echo "#SBATCH --qos=$QOS"
  cat <<END
cd $(show "$root")
launcher=slurm dry_run=no workdir=$(show "$workdir") run_workdir=$(show "$run_workdir") MAX_RESTARTS=$MAX_RESTARTS
source $(show "$root/launch/common.sh")
export COORDINATOR=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1):\$((20000 + SLURM_JOB_ID % 20000))
again=no told=no
trap 'again=yes; scancel --signal=TERM "\$SLURM_JOB_ID"' USR1
trap 'told=yes' TERM # the processes got it too: wait until they have saved
srun --kill-on-bad-exit=0 bash -c 'export CUDA_VISIBLE_DEVICES=\$SLURM_LOCALID; exec "\$@"$meet' - \\
  $(show "$VENV/bin/fastvlm" "${fastvlm[@]}") &
wait \$!; status=\$?
while kill -0 \$! 2>/dev/null; do wait \$!; status=\$?; done # a trap ends a wait
echo "slurm: fastvlm $command ended with status \$status"
# A process died, or the time is up: again. Wrong flags (2) stay wrong, and Ctrl-C (130) is a wish. After a scancel or a
# preemption, which this script was told too, Slurm itself decides.
case \$status in 0 | 2 | 130) ;; *) [ \$told = yes ] || again=yes ;; esac
[ ! -e $(show "$counted") ] || read -r reached restarts <$(show "$counted")
if [ \$again = yes ] && may_restart; then
  echo "\$reached \$restarts" >$(show "$counted")
  scontrol requeue "\$SLURM_JOB_ID"
else
  echo \$status >$(show "$ended")
fi
exit \$status
END
}

# Prints the ids of this run's jobs in the queue.
queued() { squeue --me --noheader --name="$NAME" --format=%i; }

say "checks"
check
part_with "the job goes on; the same command follows it again; scancel --name=$NAME stops it"
say "the job, unless it is at work already"
if [ "$dry_run" = yes ] || [ -z "$(queued)" ]; then
  run rm -f "$ended" "$counted"
  batch | write "$script"
  run sbatch "$script"
else
  tr ' ' '\n' <"$script" | grep -qxF -e "--workdir=$run_workdir" -e "--output=$run_workdir" || fail "a job $NAME is at work on another workdir: give this one another NAME in $settings"
  say "the job $NAME is at work already"
fi
say "its output: tail -f $LOG_DIR/$NAME.log"
say "until the queue has it no longer"
if [ "$dry_run" = yes ]; then
  show squeue --me --noheader --name="$NAME" --format=%i
else
  while [ -n "$(queued || echo unknown)" ]; do sleep "$POLL_SECONDS"; done
  status=$(cat "$ended" 2>/dev/null || echo "none: it was cancelled or killed")
  [ "$status" = 0 ] || fail "the job ended with status $status: see $LOG_DIR/$NAME.log"
fi
say "$past: $workdir"
