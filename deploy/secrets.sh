#!/usr/bin/env bash
# Make what is missing in secrets/, or in the folder given: `make secrets`.
set -euo pipefail
folder=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
exec python3 -m deploy.commands ${folder:+--secrets "$folder"} secrets
