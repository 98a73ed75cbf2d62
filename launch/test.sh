#!/usr/bin/env bash
# Installs what the tests need into .venv and runs the whole suite. Arguments go to pytest; --full adds full-size models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install test
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# Two workers, whole files each: most of the time is compilation, which keeps one core busy.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10 "$@"
