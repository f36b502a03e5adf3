#!/usr/bin/env bash
# Replace the replicas one after another, by new ones with the archives, the image and the settings of now: `make update`.
#
# A new replica comes first and has answered for every model before an old one is told to drain. Needs memory for one more.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t old < <(docker compose ps -q torchserve)
count=${#old[@]}
((count)) || { echo "no replica runs: docker compose up" >&2; exit 1; }
for replica in "${old[@]}"; do
  docker compose up -d --wait --no-deps --no-recreate --scale torchserve=$((count + 1)) torchserve
  # Two rounds of the gateway's look-ups and health checks, so that it knows the new one.
  sleep 4
  docker stop -t 45 "$replica" >/dev/null
  docker rm "$replica" >/dev/null
done
