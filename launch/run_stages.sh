#!/usr/bin/env bash
# Trains all stages of FastVLM's recipe, one after the other. Each stage starts from the weights of the stage before it.
#   bash launch/run_stages.sh --size 0.5b --parent vision=DIR,llm=DIR --workdir DIR [--launcher tpu --settings FILE] [--dry_run]
# --size SIZE         0.5b, 1.5b or 7b, or another size of the configs, with an encoder behind a comma if not FastViTHD
# --parent MODEL      weights that the first stage starts from: an encoder and a language model, or a model with both
# --stage0 SIZE       begins with stage 0, the encoder's own pretraining, as s3 or s3/12m; --parent then is llm=DIR alone
# --tokenizer0 FILE   tokenizer of stage 0, as CLIP's bpe_simple_vocab_16e6.txt.gz
# --workdir DIR       folder with a subfolder for each stage, local or gs://BUCKET/...
# --launcher NAME     local (the default), tpu, gke or slurm
# --settings FILE     settings file of the launcher
# --stages "A B"      trains only these, in the order below; the first of them starts from --parent
# --data_stage2 SET   conversations of stage 2: 665k, 1.1m (the default), 6.5m, 11.9m or 12.5m
# --config.KEY=VALUE  goes to every stage, for example --config.data.root=gs://BUCKET/data
# --dry_run           prints every command and every file, and runs and writes nothing
# After a stop, the same command resumes: it skips finished stages, and an unfinished one resumes from its checkpoint.
# docs/preflight.md has the TPU compiler's estimates of each stage's hours, chip-hours and memory on TPU slices.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
all="stage1_align stage15_pretrain stage2_instruct stage3_reason"
size='' parent='' workdir='' stage0='' tokenizer0='' launcher=local settings='' stages=$all data_stage2=1.1m dry_run=() overrides=()
misuse() { echo "run_stages: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --dry_run) dry_run=(--dry_run) ;;
    --size | --parent | --workdir | --stage0 | --tokenizer0 | --launcher | --settings | --stages | --data_stage2)
      [ $# -ge 2 ] || misuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift ;;
    --config.*=*) overrides+=("$1") ;;
    *) misuse "unexpected $1; the first lines of $0 list the flags" ;;
  esac
  shift
done
for name in size parent workdir; do [ -n "${!name}" ] || misuse "--$name is missing"; done
for name in $stages; do case " $all " in *" $name "*) ;; *) misuse "unknown stage $name: choose from $all" ;; esac; done
case $stage0,$parent in ,* | *,llm=*) ;; *) misuse "--stage0 makes the encoder: --parent must be llm=DIR, not $parent" ;; esac
case $parent in *vision=*) [ -z "$stage0" ] || misuse "--stage0 makes the encoder: leave vision=DIR out of --parent" ;; esac
case ${stage0%%/*} in
  '' ) encoder= ;;
  s[0124]) encoder=,mci${stage0:1:1} ;;
  s3) encoder= ;;
  *) encoder=,${stage0%%,*} ;;
esac
case $size in *,mci3 | *,fastvithd) own= ;; *,*) own=,${size#*,} ;; *) own= ;; esac
[ -z "$stage0" ] || [ "$own" = "$encoder" ] || misuse "--stage0 $stage0 makes another encoder than --size $size asks for: --size ${size%%,*}$encoder"
case $launcher in local | tpu | gke | slurm) ;; *) misuse "unknown launcher $launcher: choose local, tpu, gke or slurm" ;; esac
[ -n "$settings" ] || [ "$launcher" = local ] || misuse "--settings is missing: copy launch/settings/$launcher.env and fill it in"

# A stage is finished if its folder holds the file `finished`. Without that file nothing is lost: the trainer sees
# that all steps are done.
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

# stage NAME ARGUMENT [FLAG]: trains configs/NAME.py:ARGUMENT from $parent; its workdir becomes the parent of the next
# stage.
stage() {
  case " stage0_clip $stages " in *" $1 "*) ;; *) return 0 ;; esac
  echo "== $1"
  if [ ${#dry_run[@]} = 0 ] && finished "$workdir/$1"; then
    echo "finished before: $workdir/$1"
  else
    bash "$here/$launcher.sh" --settings "${settings:-$here/settings/local.env}" "${dry_run[@]}" \
      --config "configs/$1.py:$2" --workdir "$workdir/$1" --config.parent="$parent" "${@:3}" "${overrides[@]}"
    [ ${#dry_run[@]} != 0 ] || finish "$workdir/$1"
  fi
  parent=$workdir/$1
}

# Stage 0 trains the encoder beside a text tower, on pairs of an image and its caption, as MobileCLIP does: s3 on
# DataCompDR-1B for 200,000 steps of 65,536 pairs, or s3/12m on DataCompDR-12M for 30,000 of 8,192. It costs far more
# than all other stages; most people begin with a published encoder instead.
if [ -n "$stage0" ]; then
  llm=$parent parent=''
  stage stage0_clip "$stage0" ${tokenizer0:+"--config.data.tokenizer=$tokenizer0"}
  parent=vision=$parent,$llm
fi

# Stage 1 trains only the projector, so that it maps image features to where the language model understands them.
# 558K captions of LLaVA-1.5 at 256 px, batch size 256: about 2,200 steps at a learning rate of 1e-3, the shortest stage
# by far.
stage stage1_align "$size"

# Stage 1.5 trains the whole model at 1024 px; the encoder sees this resolution for the first time.
# 15M dense captions (CC3M and CC12M), batch size 128: about 117,000 steps at 2e-5, the longest stage. The paper's Table
# 8 has a shorter recipe without it: --stages "stage1_align stage2_instruct" --data_stage2 665k.
stage stage15_pretrain "$size"

# Stage 2 trains the whole model to follow instructions: questions about images, documents and charts.
# 1.1M conversations by default, batch size 128: about 8,600 steps at 2e-5; 12.5M conversations are about 98,000 steps.
stage stage2_instruct "$size/$data_stage2"

# Stage 3 trains the whole model to reason at length, as the released models do.
# 10.6M conversations of MAmmoTH-VL with long answers, batch size 128: about 83,000 steps at 2e-5.
stage stage3_reason "$size"

echo "== the model"
echo "$parent"
