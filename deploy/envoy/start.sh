#!/bin/bash
# The gateway's first process. Envoy ends at once on SIGTERM; this has it finish what is in flight first: its listeners take
# no new connection, callers are told to close theirs (Connection: close, GOAWAY), and it goes when the last request has.
set -u
drain_s=${CONVSCOPE_GATEWAY_DRAIN_S:-30}

# Ask the admin interface; the image has no HTTP client but a shell.
admin() {
  exec 3<>/dev/tcp/127.0.0.1/9901 || return
  printf '%s %s HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Length: 0\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
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

trap drain TERM INT
envoy "$@" &
envoy=$!
while kill -0 "$envoy" 2>/dev/null; do
  wait "$envoy"  # A signal ends it early; the loop waits on.
done
wait "$envoy"
