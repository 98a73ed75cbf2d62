# shellcheck shell=bash disable=SC2034,SC2154 # some variables are set here for the launchers, some there for this file
# What the launchers tpu.sh, gke.sh, slurm.sh and local.sh share: the command line, the settings file, dry runs, checks,
# and paths in the bucket. They set `launcher` to their own name, then source this file.
# Exit status: 0 the stage is trained, 1 there is something to fix (one line says what), 2 wrong usage, 75 SIGTERM ended
# the launcher (run it again), 130 Ctrl-C did, or the run itself got Ctrl-C.

fail() { echo "$launcher: $*" >&2; exit 1; }
misuse() { echo "$launcher: $*" >&2; exit 2; }

# Reads "$@" into settings, dry_run, config, workdir, command and flags (those for the command, `fastvlm train`).
# --command=evaluate and --command="bench ttft" run these in the place of training, for `fastvlm sweep`: --workdir is
# then what they write, their --output, and there is no --config.
parse_arguments() {
  [ "${BASH_VERSINFO[0]}" -ge 5 ] || misuse "bash 5 or newer is needed, this is $BASH_VERSION"
  settings='' dry_run=no config='' workdir='' command=train past=trained flags=()
  while [ $# -gt 0 ]; do
    case $1 in
      --dry_run) dry_run=yes ;;
      --settings | --config | --workdir)
        [ $# -ge 2 ] || misuse "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift ;;
      --settings=*) settings=${1#*=} ;;
      --config=*) config=${1#*=} ;;
      --command=*) command=${1#*=} ;;
      --workdir=*) workdir=${1#*=} ;;
      --*=*) flags+=("$1") ;;
      *) misuse "unexpected $1: flags of fastvlm train are written --name=value; flags of this script are --settings FILE, --config FILE.py:SIZE, --workdir DIR and --dry_run" ;;
    esac
    shift
  done
  [ "$command" = train ] || past='done'
  case $command in train | evaluate | "bench ttft") ;; *) misuse "unknown --command=$command: train, evaluate or bench ttft" ;; esac
  local name
  for name in settings config workdir; do
    [ "$command" = train ] || [ "$name" != config ] || continue
    [ -n "${!name}" ] || misuse "--$name is missing: bash launch/$launcher.sh --settings FILE --config FILE.py:SIZE --workdir DIR [--dry_run] [--config.KEY=VALUE ...]"
  done
  exec 3>&1 # for dry runs: shows a command where its output is captured
  scratch=
  [ "$dry_run" = yes ] || scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
}

# read_settings "REQUIRED ..." "OPTIONAL=default" ...: sets a variable for each key of the settings file.
# The file holds KEY=value lines and comments. It is read as text and never run.
read_settings() {
  local required=$1 known=" $1" seen=' ' number=0 line key value
  for line in "${@:2}"; do
    known+=" ${line%%=*}"
    printf -v "${line%%=*}" %s "${line#*=}"
  done
  for key in $required; do printf -v "$key" %s ''; done
  [ -f "$settings" ] || fail "there is no settings file $settings; copy launch/settings/$launcher.env and fill it in"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%"${line##*[![:space:]]}"} # strips spaces and carriage returns at the end
    case $line in '' | '#'*) continue ;; esac
    [[ $line =~ ^([A-Z_]+)=(.*)$ ]] || fail "$settings:$number: '$line' is not KEY=value"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    case "$known " in *" $key "*) ;; *) fail "$settings:$number: unknown key $key; the keys are$known" ;; esac
    case $seen in *" $key "*) fail "$settings:$number: $key is set twice" ;; esac
    [[ $value =~ ^[A-Za-z0-9_@%+=:,./-]*$ ]] || fail "$settings:$number: $key: write the value alone, without quotes, spaces, variables or a comment"
    seen+="$key "
    printf -v "$key" %s "$value"
  done <"$settings"
  for key in $required; do
    [ -n "${!key}" ] || fail "$settings: $key is missing; launch/settings/$launcher.env explains it"
  done
}

# whole KEY ...: refuses values that are not whole numbers of at least 1 (MAX_RESTARTS: at least 0).
whole() {
  local key
  for key in "$@"; do
    [[ ${!key} =~ ^[0-9]{1,6}$ ]] || fail "$settings: $key=${!key} must be a whole number"
    [ "${!key}" -gt 0 ] || [ "$key" = MAX_RESTARTS ] || fail "$settings: $key=${!key} must be at least 1"
  done
}

# one_of KEY VALUE ...: refuses a setting that is none of these values.
one_of() {
  local value
  for value in "${@:2}"; do [ "${!1}" != "$value" ] || return 0; done
  fail "$settings: $1=${!1} must be one of: ${*:2}"
}

# say TEXT: a line about progress; in a dry run a comment.
say() { if [ "$dry_run" = yes ]; then echo "# $*"; else echo "$launcher: $*"; fi; }

# show COMMAND ...: prints the command as one would type it; printf's %q would fill it with backslashes.
show() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# run COMMAND ...: runs the command; in a dry run, prints it.
run() { if [ "$dry_run" = yes ]; then show "$@" >&3; else "$@"; fi; }

# ask MEND COMMAND ...: prints the output of the command. If it fails, the error is MEND and the command's last line.
ask() {
  local mend=$1 answer
  shift
  if [ "$dry_run" = yes ]; then
    show "$@" >&3
  elif answer=$("$@" 2>"$scratch/errors"); then
    printf '%s\n' "$answer"
  else
    fail "$mend ($1: $(tail -n 1 "$scratch/errors"))"
  fi
}

# write FILE: writes standard input to the file, which appears only when it is complete; in a dry run, prints it.
write() {
  if [ "$dry_run" = yes ]; then
    echo "write $1:"
    sed 's/^/  | /'
  else
    mkdir -p "$(dirname "$1")"
    cat >"$1.tmp"
    mv "$1.tmp" "$1"
  fi
}

# installed PROGRAM MEND: refuses to go on without the program.
installed() { [ "$dry_run" = yes ] || command -v "$1" >/dev/null || fail "$1 is not installed: $2"; }

# On machines other than this one the workdir must be in the bucket: their own disks are lost with them.
workdir_in_bucket() {
  [[ $workdir =~ ^gs://[A-Za-z0-9._/-]+$ ]] ||
    fail "--workdir $workdir must be gs://$BUCKET/FOLDER, with letters, digits and . _ - only (BUCKET of $settings)"
}

# Sets run_workdir to workdir, and in it and in the models of flags replaces gs://BUCKET/ by MOUNT/, the folder where
# the machines mount BUCKET: data are read from a bucket, but a workdir and models from a file system. Sets fastvlm to
# the words behind `fastvlm`.
mount_names() {
  local i
  run_workdir=$(mounted "$workdir")
  for i in "${!flags[@]}"; do
    case ${flags[i]} in --config.parent=* | --model=*) flags[i]=$(mounted "${flags[i]}") ;; esac
  done
  case $command in
    train) fastvlm=(train --config="$config" --workdir="$run_workdir" "${flags[@]}") ;;
    evaluate) fastvlm=(evaluate "${flags[@]}" --output="$run_workdir") ;;
    "bench ttft") fastvlm=(bench ttft "${flags[@]}" --output="$run_workdir") ;;
  esac
}

# part_with TEXT: from now on Ctrl-C and SIGTERM end the launcher, which says TEXT.
part_with() {
  parting=$1
  trap 'say "$parting"; exit 130' INT
  trap 'say "$parting"; exit 75' TERM
}

# Prints the step of the run's latest checkpoint, which lies here or in the bucket; 0 if there is none.
saved_step() {
  local path found=() step=0
  if [ "$dry_run" = yes ]; then
    :
  elif [[ $workdir = gs://* ]] && [ ! -d "$run_workdir" ]; then
    mapfile -t found < <(gcloud storage ls "$workdir/checkpoints/" 2>/dev/null)
  else
    found=("$run_workdir"/checkpoints/*)
  fi
  for path in "${found[@]%/}"; do
    path=${path##*/}
    [[ ! $path =~ ^[0-9]+$ ]] || [ "$path" -le "$step" ] || step=$path
  done
  echo "$step"
}

# may_restart: counts a restart. Fails if MAX_RESTARTS restarts in a row began at the same checkpoint: they get nowhere.
restarts=0 reached=0
may_restart() {
  local step
  step=$(saved_step)
  [ "$step" -le "$reached" ] || restarts=0 reached=$step
  restarts=$((restarts + 1))
  [ "$restarts" -le "$MAX_RESTARTS" ]
}

# make_output: makes the folder of the workdir, or the one that it lies in if the command makes it itself.
make_output() {
  if [ "$command" = train ]; then mkdir -p "$run_workdir"; else mkdir -p "$(dirname "$run_workdir")"; fi
}

# mounted PATH: prints PATH with gs://BUCKET/ replaced by MOUNT/.
mounted() {
  local path=$1
  [ -z "$BUCKET" ] || path=${path//"gs://$BUCKET/"/"$MOUNT/"}
  case $path in
    *gs://*) fail "$1 is not in the bucket that $settings mounts (BUCKET=$BUCKET, MOUNT=$MOUNT)" ;;
  esac
  printf '%s\n' "$path"
}

# Checks what both launchers on Google Cloud need: an account, the project, the image, and a bucket that can be written
# and that renames a folder in one operation.
check_google_cloud() {
  local account hierarchical
  installed gcloud "https://cloud.google.com/sdk/docs/install"
  account=$(ask "gcloud cannot list the accounts that are logged in" gcloud auth list --filter=status:ACTIVE "--format=value(account)")
  [ "$dry_run" = yes ] || [ -n "$account" ] || fail "gcloud is not logged in: run gcloud auth login"
  ask "PROJECT=$PROJECT cannot be seen: correct $settings, or have its owner add you" \
    gcloud projects describe "$PROJECT" "--format=value(projectId)" >/dev/null
  hierarchical=$(ask "bucket gs://$BUCKET cannot be seen: create it, see docs/tpu.md, step 4" \
    gcloud storage buckets describe "gs://$BUCKET" --raw "--format=value(hierarchicalNamespace.enabled)")
  # Without such a namespace a checkpoint is renamed file by file, and an interrupted one looks finished.
  [ "$dry_run" = yes ] || [ "$hierarchical" = True ] ||
    fail "bucket gs://$BUCKET has no hierarchical namespace, which checkpoints need: create another bucket, see docs/tpu.md, step 4"
  ask "bucket gs://$BUCKET cannot be written: ask for the role roles/storage.objectUser on it" \
    gcloud storage cp --no-user-output-enabled "$here/common.sh" "gs://$BUCKET/.fastvlm_write_check" >/dev/null
  ask "bucket gs://$BUCKET: a file that was written cannot be removed: ask for the role roles/storage.objectUser on it" \
    gcloud storage rm --no-user-output-enabled "gs://$BUCKET/.fastvlm_write_check" >/dev/null
  ask "there is no image $IMAGE: build it, see docs/tpu.md, step 5" \
    gcloud artifacts docker images describe "$IMAGE" "--format=value(image_summary.digest)" >/dev/null
}
