# shellcheck shell=bash
# Defines `install` for the other scripts, which source this file from the repository's root folder, with pipefail set.
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
    local log=.venv/install.log start=$SECONDS total
    total=$(grep -c == requirements.txt)
    echo "launch: installing jax, flax and $((total - 2)) other packages, then the extra \"$extra\", into .venv (once, 2 to 5 minutes)"
    if ! { .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt &&
           .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -c requirements.txt -e ".[$extra]"; } 2>&1 |
         tee "$log" | show_packages; then
      tail -n 20 "$log" >&2
      echo "launch: the installation failed; the whole log is in $log" >&2
      return 1
    fi
    echo "$wanted" >"$stamp"
    echo "launch: installed in $((SECONDS - start)) s"
  fi
}

# Reads the output of pip and shows how far it is: on a terminal in one line that changes, elsewhere every tenth package.
show_packages() {
  local line count=0 name
  while IFS= read -r line; do
    case $line in
      "Collecting "*)
        count=$((count + 1)) name=${line#Collecting }
        if [ -t 1 ]; then
          printf '\r\033[Klaunch: package %s: %s' "$count" "${name%% *}"
        elif [ $((count % 10)) = 0 ]; then
          echo "launch: package $count: ${name%% *}"
        fi ;;
      "Installing collected packages:"*)
        [ ! -t 1 ] || printf '\r\033[K'
        name=${line#*: }
        echo "launch: unpacking $(wc -w <<<"$name") packages" ;;
    esac
  done
}
