#!/usr/bin/env bash
# Make a test certificate, one API key and Grafana's password in secrets/ (or $1), where there are none yet: `make secrets`.
#
# Only this user can enter the folder. The files in it are readable by all, since the containers' users, which are none of this
# machine's, read them where they are mounted.
set -euo pipefail
folder=${1:-secrets}
umask 022
mkdir -p -m 0700 "$folder"
mkdir -p "$folder/certificate" "$folder/api-keys"
if [[ ! -e $folder/certificate/tls.key ]]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 90 -subj "/CN=convscope test" \
    -addext "subjectAltName=DNS:localhost,DNS:gateway,IP:127.0.0.1" -addext "extendedKeyUsage=serverAuth" \
    -keyout "$folder/certificate/tls.key" -out "$folder/certificate/tls.crt" 2>/dev/null
  chmod 0644 "$folder/certificate/tls.key"
  echo "$folder/certificate: a certificate for localhost that signs itself, good for 90 days; put your own in its place"
fi
if [[ ! -e $folder/api-keys/keys.yaml ]]; then
  key=$(openssl rand -hex 24)  # 192 bits, and short enough for one block of SHA-256.
  digest=$(printf %s "$key" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
  cat >"$folder/api-keys/keys.yaml" <<YAML
# Who may ask. A \`key\` is the SHA-256 digest of what the caller sends: printf %s "\$KEY" | sha256sum
# Add and remove keys under \`credentials\`, then rename the new file over this one: read again at once.
resources:
  - "@type": type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig
    name: api_keys
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth
      key_sources: [{header: x-api-key}]
      forwarding: {header: x-convscope-caller, hide_credentials: true}
      credentials:
        - {client: first, key: $digest}
YAML
  printf '%s\n' "$key" >"$folder/api-key"
  chmod 0600 "$folder/api-key"
  echo "$folder/api-key: the first API key"
fi
if [[ ! -e $folder/probe-key ]]; then
  openssl rand -hex 24 >"$folder/probe-key"
  digest=$(tr -d '\n' <"$folder/probe-key" | openssl dgst -sha256 -r | cut -d ' ' -f 1)
  sed "s/^      credentials:$/&\n        - {client: probe, key: $digest}/" "$folder/api-keys/keys.yaml" >"$folder/api-keys/keys.new"
  mv "$folder/api-keys/keys.new" "$folder/api-keys/keys.yaml"
  echo "$folder/probe-key: the probe's API key"
fi
if [[ ! -e $folder/grafana-password ]]; then
  openssl rand -hex 16 >"$folder/grafana-password"
  echo "$folder/grafana-password: the password of Grafana's user admin"
fi
