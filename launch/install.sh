# shellcheck shell=bash
# Defines `install` for the other scripts, which source this file from the repository's root folder.
#   install EXTRA     makes .venv and installs the pinned packages and an extra of pyproject.toml, such as demo or test;
#                     does nothing if requirements.txt and pyproject.toml have not changed since
install() {
  local extra=$1 python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "launch: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv || { echo "launch: cannot make .venv with $python -m venv" >&2; return 1; }
  fi
  local stamp=".venv/installed-$extra" wanted
  wanted=$(cat requirements.txt pyproject.toml | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "launch: installing into .venv (once)"
    local log=.venv/install.log
    if ! { .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt &&
           .venv/bin/python -m pip install --disable-pip-version-check -c requirements.txt -e ".[$extra]"; } >"$log" 2>&1; then
      tail -n 20 "$log" >&2
      echo "launch: the installation failed; the whole log is in $log" >&2
      return 1
    fi
    echo "$wanted" >"$stamp"
  fi
}
