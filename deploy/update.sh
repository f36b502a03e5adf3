#!/usr/bin/env bash
# Replace the replicas one after another, by new ones with the archives, the image and the settings of now: `make update`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 -m deploy.commands update
