#!/usr/bin/env bash
# The whole recipe of FastVLM, one stage after the other; each starts from the weights of the one before.
#   bash launch/run_stages.sh --size 0.5b --parent vision=DIR,llm=DIR --workdir DIR [--launcher tpu --settings FILE] [--dry_run]
# --size SIZE         0.5b, 1.5b or 7b, or another size of the configs, with an encoder behind a comma if not FastViTHD
# --parent MODEL      what the first stage starts from: an encoder and a language model, or a model that has both
# --workdir DIR       each stage gets a folder in it, local or gs://BUCKET/...
# --launcher NAME     local (the default), tpu, gke or slurm; --settings FILE is its settings file
# --stages "A B"      only these, in the order below: --parent is then what the first of them starts from
# --data_stage2 SET   665k, 1.1m (the default), 6.5m, 11.9m or 12.5m: conversations of stage 2
# --config.KEY=VALUE  goes to every stage, as --config.data.root=gs://BUCKET/data
# Stopped, the same command goes on where it was: finished stages are left out, an unfinished one starts from its last checkpoint.
# Hours, chip-hours and memory of each stage on TPU slices, as estimated by the TPU compiler, stand in docs/preflight.md.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
all="stage1_align stage15_pretrain stage2_instruct stage3_reason"
size='' parent='' workdir='' launcher=local settings='' stages=$all data_stage2=1.1m dry_run=() overrides=()
misuse() { echo "run_stages: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=(--dry_run) ;;
    --size | --parent | --workdir | --launcher | --settings | --stages | --data_stage2)
      [ $# -ge 2 ] || misuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift ;;
    --config.*=*) overrides+=("$1") ;;
    *) misuse "unexpected $1; the first lines of $0 tell what there is" ;;
  esac
  shift
done
for name in size parent workdir; do [ -n "${!name}" ] || misuse "--$name is missing"; done
for name in $stages; do case " $all " in *" $name "*) ;; *) misuse "unknown stage $name: choose of $all" ;; esac; done
case $launcher in local | tpu | gke | slurm) ;; *) misuse "unknown launcher $launcher: choose local, tpu, gke or slurm" ;; esac
[ -n "$settings" ] || [ "$launcher" = local ] || misuse "--settings is missing: copy launch/settings/$launcher.env and fill it in"

# A file beside the checkpoints says that a stage is finished. Without it nothing is lost: the trainer finds that all steps are done.
finished() {
  case $1 in
    gs://*) gcloud storage ls "$1/finished" >/dev/null 2>&1 ;;
    *) [ -e "$1/finished" ] ;;
  esac
}

finish() {
  case $1 in
    gs://*) gcloud storage cp --no-user-output-enabled "$here/run_stages.sh" "$1/finished" || true ;;
    *) : >"$1/finished" ;;
  esac
}

# stage NAME ARGUMENT: trains configs/NAME.py:ARGUMENT from $parent, and is the next one's parent.
stage() {
  case " $stages " in *" $1 "*) ;; *) return 0 ;; esac
  echo "== $1"
  if [ ${#dry_run[@]} = 0 ] && finished "$workdir/$1"; then
    echo "finished before: $workdir/$1"
  else
    bash "$here/$launcher.sh" --settings "${settings:-$here/settings/local.env}" "${dry_run[@]}" \
      --config "configs/$1.py:$2" --workdir "$workdir/$1" --config.parent="$parent" "${overrides[@]}"
    [ ${#dry_run[@]} != 0 ] || finish "$workdir/$1"
  fi
  parent=$workdir/$1
}

# Stage 1: the projector alone learns, to put image features where the language model understands them.
# 558K captions of LLaVA-1.5 at 256 px, 256 a step: about 2,200 steps at a rate of 1e-3, the shortest stage by far.
stage stage1_align "$size"

# Stage 1.5: all of it learns to read at 1024 px, the encoder's first time at this resolution.
# 15M dense captions (CC3M and CC12M), 128 a step: about 117,000 steps at 2e-5, the longest stage. The paper also has the
# shorter recipe of its Table 8: --stages "stage1_align stage2_instruct" --data_stage2 665k.
stage stage15_pretrain "$size"

# Stage 2: all of it learns to follow instructions: questions about images, documents and charts.
# 1.1M conversations by default, 128 a step: about 8,600 steps at 2e-5; 12.5M are about 98,000.
stage stage2_instruct "$size/$data_stage2"

# Stage 3: all of it learns to reason at length, as the released models do.
# 10.6M conversations of MAmmoTH-VL with long answers, 128 a step: about 83,000 steps at 2e-5.
stage stage3_reason "$size"

echo "== the model"
echo "$parent"
