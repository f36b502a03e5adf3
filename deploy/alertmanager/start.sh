#!/bin/sh
# Alertmanager's first process. This release reads no URL from the environment or from a file of its own, so this script writes the
# addresses of .env into a copy of alertmanager.yml. A receiver without an address gets no webhook. Nothing is printed: an address
# may hold a secret.
set -eu
rm -f /tmp/log  # Of the start before: a restart keeps /tmp.
umask 077
result=/tmp/alertmanager.yml
cp "$(dirname "$0")/alertmanager.yml" "$result"

# Replace one placeholder by an address, or remove its receivers' webhooks.
set_address() {
  if [ -n "$2" ]; then
    address=$(printf '%s' "$2" | sed 's/["\\]/\\&/g' | sed 's/[&|\\]/\\&/g')
    sed -i "s|$1|$address|" "$result"
  else
    sed -i "\|$1|d" "$result"
  fi
}
set_address http://alerts.invalid/ "${CONVSCOPE_ALERT_WEBHOOK:-}"
set_address http://watchdog.invalid/ "${CONVSCOPE_WATCHDOG_WEBHOOK:-}"

# Alertmanager logs the whole address when a notification fails, so its log passes through a filter.
hide() {
  [ -z "$1" ] || printf 's|%s|<address>|g\n' "$(printf '%s' "$1" | sed 's/[][\\.*^$|"]/\\&/g')"
}
{ hide "${CONVSCOPE_WATCHDOG_WEBHOOK:-}"; hide "${CONVSCOPE_ALERT_WEBHOOK:-}"; } >/tmp/hide.sed
mkfifo /tmp/log
sed -u -f /tmp/hide.sed </tmp/log >&2 &
exec /bin/alertmanager --config.file="$result" --storage.path=/alertmanager --web.listen-address=:9093 --cluster.listen-address= "$@" \
  >/tmp/log 2>&1
