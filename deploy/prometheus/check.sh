#!/bin/sh
# Check prometheus.yml and its rules before they are taken in; with `reload`, take them in if they are right:
#
#   docker compose exec -T prometheus sh /etc/prometheus/check.sh reload
#
# promtool accepts a rule that reads a recorded series which nobody records. Such a series is absent, and every alert that depends on
# it falls silent, so this script looks for them, too.
set -eu
folder=$(dirname "$0")
promtool check config "$folder/prometheus.yml" >&2

recorded=$(sed -n 's/.*record: *"\{0,1\}\([a-zA-Z_:][a-zA-Z0-9_:]*\).*/\1/p' "$folder"/rules/*.yml | sort -u)
# A recorded series has a colon in its name; nothing else in a rule looks like one, once comments, strings and ranges are gone.
read=$(sed -e 's/^ *#.*//' -e 's/"rule", "[^"]*"//' -e 's/\[[^]]*\]//g' "$folder"/rules/*.yml |
  grep -oE '[a-z_]+:[a-z_][a-zA-Z0-9_]*(:[a-zA-Z0-9_]+)?' | sort -u)
missing=
for name in $read; do
  printf '%s\n' "$recorded" | grep -qxF "$name" || missing="$missing $name"
done
if [ -n "$missing" ]; then
  echo "rules read series that no rule records:$missing" >&2
  exit 1
fi
if [ "${1:-}" = reload ]; then
  kill -HUP 1
  echo "Prometheus reads its configuration again" >&2
fi
