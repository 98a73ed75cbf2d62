#!/usr/bin/env bash
# The quickstart: trains, evaluates, uses and exports a tiny FastVLM on an ordinary two-core machine. docs/quickstart.md
# shows and explains its results.
#   bash launch/quickstart.sh [--steps N] [--questions N] [--output DIR] [--stage0]
# --steps N        trains each stage for N steps, without validation (default: the full stages)
# --questions N    evaluates on at most N test questions (default: all 9,673)
# --output DIR     folder for all results (default: runs/quickstart)
# --stage0         first pretrains the encoder beside a text tower, as docs/contrastive.md explains (4 minutes more)
# After an interruption, the same command resumes the run. A finished run is kept: it is renamed, and a new one starts.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
steps=0 questions=0 output=runs/quickstart stages=(stage1_align stage15_pretrain stage2_instruct)
while [ $# -gt 0 ]; do
  case "$1" in
    --stage0)
      stages=(stage0_clip "${stages[@]}")
      shift
      continue ;;
    --steps | --questions | --output)
      [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; } ;;&
    --steps) steps=$2 ;;
    --questions) questions=$2 ;;
    --output) case "$2" in /*) output=$2 ;; *) output=$here/$2 ;; esac ;;
    *) echo "quickstart: unknown option $1 (--steps N, --questions N, --output DIR, --stage0)" >&2; exit 2 ;;
  esac
  shift 2
done
case "$steps$questions" in *[!0-9]*) echo "quickstart: --steps and --questions take whole numbers" >&2; exit 2 ;; esac

source launch/install.sh
install demo
export PATH="$PWD/.venv/bin:$PATH"
# XLA allocates and frees one large buffer per step; with huge pages a step takes a tenth less time.
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

if [ -e "$output/summary.json" ]; then
  kept=$output-$(date +%Y%m%d-%H%M%S)
  mv "$output" "$kept"
  echo "quickstart: the finished run is kept as $kept"
fi
mkdir -p "$output"
# SECONDS includes the time before an interruption.
SECONDS=$(cat "$output/seconds" 2>/dev/null || echo 0)
trap 'echo "$SECONDS" >"$output/seconds"' EXIT

echo "== data"
fastvlm data easy-vqa --output data/easy_vqa

parent='' short=()
[ "$steps" = 0 ] || short=(--config.steps="$steps" --config.eval_batches=0 '--config.evaluate=()')
for stage in "${stages[@]}"; do
  echo "== train $stage"
  config=(configs/quickstart.py:"$stage")
  if [ "$stage" = stage0_clip ]; then
    config=(configs/stage0_clip.py:tiny --config.data.path=data/easy_vqa/captions --config.data.tokenizer=data/easy_vqa
      '--config.evaluate=(("zero-shot","",0),)')
  fi
  fastvlm train --config "${config[@]}" --workdir "$output/$stage" ${parent:+--config.parent="$parent"} "${short[@]}"
  parent=$output/$stage
  [ "$stage" != stage0_clip ] || parent=vision=$parent
done

echo "== evaluate"
limit=()
[ "$questions" = 0 ] || limit=(--limit="$questions")
fastvlm evaluate --model "$parent" --benchmark easy-vqa --data data/easy_vqa --output "$output/evaluation" "${limit[@]}"

echo "== generate"
image=$(python -c 'import easy_vqa; print(easy_vqa.get_test_image_paths()[0])')
fastvlm generate --model "$parent" --image "$image" --prompt "what color is the shape?" --prompt "what shape is in the image?"

echo "== export"
fastvlm convert --source "$parent" --target "$output/export_hf" --layout hf --overwrite
python launch/check_export.py --model "$parent" --export "$output/export_hf" --image "$image" --data data/easy_vqa \
  --predictions "$output/evaluation/easy-vqa-own.predictions.jsonl" --output "$output/export.json"

echo "== pictures"
fastvlm report "${stages[@]/#/$output/}" \
  --output "$output/report.html" --model "$parent" --data data/easy_vqa

python launch/summarize.py --run "$output" --seconds "$SECONDS"
