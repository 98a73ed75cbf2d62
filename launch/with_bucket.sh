#!/usr/bin/env bash
# Mounts a Cloud Storage bucket at /gcs/BUCKET and runs a command, which gets the signals. For the container on a TPU VM.
#   bash launch/with_bucket.sh BUCKET COMMAND [ARGUMENT ...]
set -euo pipefail
[ $# -ge 2 ] || { echo "with_bucket: name the bucket and a command" >&2; exit 2; }
bucket=$1
shift
mkdir -p "/gcs/$bucket"
# Nothing about files is remembered: what one host has written, the others must see at once.
gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "/gcs/$bucket"
exec "$@"
