#!/bin/bash
# The gateway's health: exit status 0 if it can take callers, else 1 and a line for each thing that is missing.
#
# Envoy's own /ready says LIVE as soon as it has tried its configuration. With a key that it cannot read it listens, and refuses every
# caller. So this asks whether every file has been taken in at least once, and whether the public listener is there. A file that is bad
# later changes nothing: the gateway goes on with the one before, and `envoy_*_update_rejected` and `_failure` count it.
# Replicas do not matter here: without one, callers get 503 from a gateway that is well.

declare -A FILES=(
  [cluster_manager.cds]=/etc/envoy/clusters.yaml
  [listener_manager.lds]="/etc/envoy/tls.yaml or plain.yaml"
  [extension_config_discovery.network_filter.http]=/etc/envoy/http.yaml
  [extension_config_discovery.http_filter.api_keys]=/run/secrets/api_keys/keys.yaml
  [extension_config_discovery.http_filter.key_limits]=/etc/envoy/limits.yaml
  [sds.certificate]="/etc/envoy/certificate.yaml, or tls.crt and tls.key of /run/secrets/certificate, which must be readable and belong together"
)

# Ask the admin interface. The image has no HTTP client but a shell.
admin() {
  exec 3<>/dev/tcp/127.0.0.1/9901 || return
  printf '%s %s HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\nContent-Length: 0\r\n\r\n' "$1" "$2" >&3
  cat <&3
  exec 3>&-
} 2>/dev/null

# Print the files that have never been taken in; of those only that Envoy has refused, if $1 is `refused`.
untaken() {
  local name value stats
  declare -A taken=() refused=()
  stats=$(admin GET '/stats?filter=update_(success|rejected|failure)$') || return
  while IFS=': ' read -r name value; do
    value=${value%$'\r'}
    [[ -v FILES[${name%.update_*}] ]] || continue
    case $name in
      *.update_success) taken[${name%.update_*}]=$value ;;
      *) ((refused[${name%.update_*}] += value)) ;;
    esac
  done <<<"$stats"
  for name in "${!taken[@]}"; do
    if ((taken[$name] == 0)) && [[ ${1-} != refused || ${refused[$name]-0} -gt 0 ]]; then echo "${FILES[$name]}"; fi
  done
}

# Print what is missing before callers can be taken; nothing if they can.
missing() {
  local file listeners
  [[ $(admin GET /ready) == *LIVE* ]] || echo "Envoy is still starting, or its admin interface does not answer"
  untaken | while read -r file; do echo "not in service: $file"; done
  listeners=$(admin GET /listeners)
  [[ $listeners == *public::* ]] || echo "no public listener"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  found=$(missing)
  echo "${found:-ready}"
  [[ -z $found ]]
fi
