#!/usr/bin/env bash
# Measures this package on one NVIDIA GPU of 80 GB or more (H100, H200), in less than 8 minutes: forms of attention, a
# training step and the first token of FastVLM-0.5B at 1024 px, and the memory that preflight's arithmetic predicts.
#   bash launch/bench_gpu.sh [--output DIR] [--tiny]
# Writes gpu.json, gpu.md, pictures and log.txt to DIR (default: $OUT, else runs/bench_gpu), anew after every part: a part
# that fails or outlasts its limit loses nothing of the others. --tiny takes sizes that a CPU can run, to try the script.
# Exit status: 0 all parts were measured, 1 some were not (gpu.md says which and why), 2 wrong usage.
#
# It installs nothing and needs no network. PYTHON (default python3) must have: jax[cuda13] flax optax orbax-checkpoint
# etils matplotlib opencv-python-headless pillow regex safetensors sentencepiece tokenizers, and for the comparison torch
# transformers timm. Of the rest a machine for PyTorch and JAX mostly lacks five wheels, together below 2 MB, to carry:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#     --platform manylinux_2_17_x86_64 -d wheels ml-collections gguf simplejpeg ftfy wcwidth
#   python3 -m pip install --no-index --no-deps --target DIR wheels/*.whl && export PYTHONPATH=DIR
# grain, array-record, tensorboardX and tensorflow-datasets are not needed.
set -uo pipefail

misuse() { echo "bench_gpu: $*" >&2; exit 2; }

output=${OUT:-runs/bench_gpu} tiny=no
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=yes ;;
    --output) [ $# -ge 2 ] || misuse "--output needs a folder"; output=$2; shift ;;
    --output=*) output=${1#*=} ;;
    *) misuse "unexpected $1: the flags are --output DIR and --tiny" ;;
  esac
  shift
done
[ -n "$output" ] || misuse "--output needs a folder"
mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
: >"$output/log.txt"

if [ "$tiny" = yes ]; then
  lengths=256,512 rows=1 runs=2 sides=64 prompt=16
  step=(--config=configs/stage2_instruct.py:tiny --config.data.image_size=64 --config.data.groups=2
    --config.data.images_per_group=1 --config.data.row_length=64
    "--config.groups=(('vision/.*', 0.0, 0.0), ('.*', 0.001, 0.0))") # the encoder frozen: a CPU compiles its gradient long
  model=configs/stage2_instruct.py:tiny
else
  lengths=512,1024,2048,4096 rows=4 runs=20 sides=256,512,1024 prompt=64
  step=(--config=configs/stage2_instruct.py:0.5b --config.data.groups=2) # 2 groups of 4 images, rows of 2048 tokens
  model=configs/stage2_instruct.py:0.5b
fi

failed=0
# part NAME SECONDS COMMAND ...: runs a part, at most so long, and writes the tables of all parts so far.
part() {
  local name=$1 limit=$2 status=0 begin=$SECONDS
  shift 2
  echo "bench_gpu: $name (at most $limit s)"
  printf '\n== %s: %s\n' "$name" "$*" >>"$output/log.txt"
  timeout -k 5 "$limit" "$@" >"$parts/$name.out" 2>"$parts/$name.err" || status=$?
  cat "$parts/$name.out" "$parts/$name.err" >>"$output/log.txt"
  echo "$status $((SECONDS - begin)) $limit $*" >"$parts/$name.status"
  [ "$status" = 0 ] || { failed=1; echo "bench_gpu: $name failed with status $status: $(tail -n 1 "$parts/$name.err")" >&2; }
  find "$parts" -name '*.png' -exec cp {} "$output" \;
  "$python" launch/gpu_table.py "$parts" "$output" || failed=1
}

fastvlm=("$python" -m fastvlm_jax)
part attention 60 "$python" -m fastvlm_jax.bench.attention --lengths="$lengths" --rows="$rows" --runs="$runs" \
  --output="$parts/attention.json"
part memory 30 env JAX_PLATFORMS=cpu "${fastvlm[@]}" preflight "${step[@]}" --config.mesh=1,1,1,1 --topology=gpu:80GB \
  --output="$parts/memory.json"
part step 230 "${fastvlm[@]}" bench step "${step[@]}" --config.mesh=1,1,1,1 --runs="$runs" --output="$parts/step.json"
part ttft 150 "${fastvlm[@]}" bench ttft --config="$model" --image_size="$sides" --prompt_tokens="$prompt" \
  --runs="$runs" --against=transformers --output="$parts/ttft.json"
echo "bench_gpu: $SECONDS s; $output/gpu.md, $output/gpu.json"
exit "$failed"
