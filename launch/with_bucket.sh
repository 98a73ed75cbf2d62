#!/usr/bin/env bash
# Mounts a Cloud Storage bucket at /gcs/BUCKET, then becomes the given command, which so receives all signals. It runs
# in the container on a TPU VM.
#   bash launch/with_bucket.sh BUCKET COMMAND [ARGUMENT ...]
set -euo pipefail
[ $# -ge 2 ] || { echo "with_bucket: name a bucket and a command" >&2; exit 2; }
bucket=$1
shift
mkdir -p "/gcs/$bucket"
# File metadata is not cached: the other hosts must see at once what one host has written.
gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$bucket" "/gcs/$bucket"
exec "$@"
