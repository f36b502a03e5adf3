#!/bin/bash
# The gateway's own spans, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector that takes OTLP over HTTP. Without it nothing is changed.
#
# Envoy has no way to include one file in another. So Envoy reads copies of http.yaml and of the listener's file: the first has
# tracing.yaml in it, the second names the first. Where the collector is, goes on the command line.
TRACED=/tmp/traced

# Print why there can be no spans; nothing if there can, or if none are asked for.
untraceable() {
  [[ -n ${OTEL_EXPORTER_OTLP_ENDPOINT-} ]] || return 0
  [[ $OTEL_EXPORTER_OTLP_ENDPOINT =~ ^https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[A-Za-z0-9._/-]*)?$ ]] ||
    echo "OTEL_EXPORTER_OTLP_ENDPOINT must be http://host:port or https://host:port, with a path or without"
  [[ ${OTEL_TRACES_SAMPLER_ARG:-1} =~ ^[0-9]*\.?[0-9]+$ ]] || echo "OTEL_TRACES_SAMPLER_ARG must be a share, 0 to 1"
  [[ $(grep -cx '      stat_prefix: public' /etc/envoy/http.yaml) == 1 ]] ||
    echo "/etc/envoy/http.yaml must have the line stat_prefix: public, behind which tracing.yaml is put"
}

# Set `arguments`, with which to start Envoy, from those without tracing.
trace() {
  arguments=("$@")
  [[ -n ${OTEL_EXPORTER_OTLP_ENDPOINT-} ]] || return 0
  local scheme host port place tls=""
  scheme=${OTEL_EXPORTER_OTLP_ENDPOINT%%://*}
  host=${OTEL_EXPORTER_OTLP_ENDPOINT#*://}
  host=${host%%/*}
  port=${host#*:}
  if [[ $port == "$host" ]]; then port=$([[ $scheme == https ]] && echo 443 || echo 80); fi
  host=${host%%:*}
  if [[ $scheme == https ]]; then
    tls=', "transport_socket": {"name": "tls", "typed_config": {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
      "sni": "'$host'", "auto_sni_san_validation": true, "common_tls_context": {"validation_context": {"trusted_ca": {"filename": "/etc/ssl/certs/ca-certificates.crt"}}}}}'
  fi
  for place in "${!arguments[@]}"; do
    [[ ${arguments[place]} == *'"/etc/envoy/'*'.yaml"'* ]] || continue
    DOOR=$(sed -E 's#.*"/etc/envoy/([a-z]+\.yaml)".*#\1#' <<<"${arguments[place]}")
    arguments[place]=${arguments[place]//\/etc\/envoy/$TRACED}
    arguments[place]=${arguments[place]%\}}', "static_resources": {"clusters": [{"name": "traces", "type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED",
      "wait_for_warm_on_init": false, "connect_timeout": "1s", "load_assignment": {"cluster_name": "traces", "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
      {"socket_address": {"address": "'$host'", "port_value": '$port'}}}}]}]}'$tls'}]}}'
  done
  mkdir -p $TRACED
  copy_traced
}

# Bring the copies up to date; Envoy takes in those that have changed.
copy_traced() {
  [[ -n ${OTEL_EXPORTER_OTLP_ENDPOINT-} ]] || return 0
  local share
  case ${OTEL_TRACES_SAMPLER-} in
    *always_off) share=0 ;;
    *traceidratio) share=${OTEL_TRACES_SAMPLER_ARG:-1} ;;
    *) share=1 ;;
  esac
  sed "s#ENDPOINT#${OTEL_EXPORTER_OTLP_ENDPOINT%/}/v1/traces#; s#MILLIONTHS#$(printf %.0f "${share}e6")#" /etc/envoy/tracing.yaml >$TRACED/tracing || return
  sed "/^      stat_prefix: public\$/r $TRACED/tracing" /etc/envoy/http.yaml >$TRACED/http.new || return
  sed "s#/etc/envoy/http.yaml, watched_directory: {path: /etc/envoy}#$TRACED/http.yaml, watched_directory: {path: $TRACED}#" "/etc/envoy/$DOOR" \
    >$TRACED/door.new || return
  cmp -s $TRACED/http.new $TRACED/http.yaml || mv $TRACED/http.new $TRACED/http.yaml
  cmp -s $TRACED/door.new "$TRACED/$DOOR" || mv $TRACED/door.new "$TRACED/$DOOR"
}
