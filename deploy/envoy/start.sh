#!/bin/bash
# The gateway's first process. It adds three things to Envoy, and its own spans where they are asked for (tracing.sh).
#
# Start: Envoy listens, and calls itself live, with a configuration or a certificate that it could not take in. This ends the container
# instead, and says in the log which file is at fault. Docker then starts it again, so a corrected file is taken in within a minute.
#
# Stop: Envoy ends at once on SIGTERM. This has it finish what is in flight first: its listeners take no new connection, callers are told
# to close theirs (Connection: close, GOAWAY), and it goes when the last request has.
#
# Between them: a line in the log for each file that changes, the keys' names included.
set -u
source "${BASH_SOURCE[0]%/*}/health.sh"
source "${BASH_SOURCE[0]%/*}/tracing.sh"
drain_s=${CONVSCOPE_GATEWAY_DRAIN_S:-30}

# Log a line of the same form as Envoy's own.
say() {
  printf '{"time":"%s","level":"%s","logger":"%s","message":"%s"}\n' "$(date -u +%Y-%m-%dT%H:%M:%S.%3NZ)" "$1" "${3-start}" "$2" >&2
}

check_readable() {
  local file failed=0
  local files=(/etc/envoy/*.yaml /etc/envoy/*.lua /etc/envoy/*.json /run/secrets/api_keys/keys.yaml)
  [[ $* == */plain.yaml* ]] || files+=(/run/secrets/certificate/tls.crt /run/secrets/certificate/tls.key)
  for file in "${files[@]}"; do
    if [[ ! -x ${file%/*} ]]; then
      say critical "the folder ${file%/*} cannot be entered by user $(id -u): it is missing, or its mode forbids it; chmod 0755 it"
    elif [[ ! -e $file ]]; then
      say critical "$file is missing"
    elif [[ ! -r $file ]]; then
      say critical "$file cannot be read by user $(id -u): its mode is $(stat -c %a "$file"), its owner $(stat -c %u "$file"); chmod 0644 it"
    elif [[ ! -s $file ]]; then
      say critical "$file is empty"
    else
      continue
    fi
    failed=1
  done
  return "$failed"
}

# Return 0 once callers can be taken, 1 if they never can be: Envoy has refused a file and has none before it.
watch_start() {
  local refused found
  while kill -0 "$envoy" 2>/dev/null; do
    sleep 0.5
    refused=$(untaken refused)
    if [[ -n $refused ]]; then
      while read -r found; do say critical "Envoy refuses $found; the reason is in its warning above"; done <<<"$refused"
      kill -TERM "$envoy"
      return 1
    fi
    [[ -n $(missing) ]] || return 0
  done
}

# Log which files are in place, and each that changes: its digest, and of the keys their names. Whether Envoy takes a file in is told by
# its own lines, which are about the files that it rejects.
watch_files() {
  local before="" after digest file names
  while sleep 5 && kill -0 "$envoy" 2>/dev/null; do
    copy_traced
    after=$(sha256sum /etc/envoy/*.yaml /etc/envoy/*.lua /etc/envoy/*.json /run/secrets/api_keys/keys.yaml /run/secrets/certificate/tls.crt 2>/dev/null | sort)
    while read -r digest file; do
      [[ -n $file ]] || continue
      names=""
      if [[ $file == */keys.yaml ]]; then names="; keys of: $(sed -n 's/.*client: *\([A-Za-z0-9._-]*\).*/\1/p' "$file" | paste -sd' ')"; fi
      say info "$file is in place, SHA-256 $digest$names" audit
    done < <(comm -13 <(echo "$before") <(echo "$after"))
    before=$after
  done
}

in_flight() {
  admin GET '/stats?filter=^http.public.downstream_rq_active$' | sed -n 's/^http.public.downstream_rq_active: \([0-9]*\).*/\1/p'
}

drain() {
  admin POST '/drain_listeners?graceful&skip_exit' >/dev/null
  local until=$((SECONDS + drain_s))
  sleep 1  # For a request that is on its way through an open connection.
  while ((SECONDS < until)) && kill -0 "$envoy" 2>/dev/null && [[ $(in_flight) != 0 ]]; do sleep 0.1; done
  kill -TERM "$envoy" 2>/dev/null
}

trap 'exit 143' TERM INT  # The first process of a container ignores a signal without a trap.
check_readable "$@" || exit 1
problem=$(untraceable)
if [[ -n $problem ]]; then
  say critical "$problem"
  exit 1
fi
trace "$@"
envoy "${arguments[@]}" &
envoy=$!
trap drain TERM INT
watch_start &
watcher=$!
watch_files &
while kill -0 "$envoy" 2>/dev/null; do
  wait "$envoy"  # A signal ends it early; the loop waits on.
done
wait "$watcher" || exit 1
wait "$envoy"
