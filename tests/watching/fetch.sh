#!/usr/bin/env bash
# Put Prometheus and promtool where the tests find them, without installing them: Debian's package, unpacked in .tools/prometheus.
# Where that cannot be done, say why and succeed: the tests that need them are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() { echo "no Prometheus for tests/watching: $1" >&2; exit 0; }

if { command -v prometheus && command -v promtool; } >/dev/null || [ -x .tools/prometheus/usr/bin/promtool ]; then exit 0; fi
{ command -v apt-get && command -v dpkg; } >/dev/null || skip "neither it nor apt is here"
mkdir -p .tools
work=$(mktemp -d "$PWD/.tools/XXXXXX")
trap 'rm -rf "$work"' EXIT
if [ -z "$(apt-cache madison prometheus 2>/dev/null)" ]; then
  [ "$(id -u)" = 0 ] || skip "apt has no lists; \`sudo apt-get update\` gets them"
  apt-get update -qq >/dev/null || skip "apt-get update fails"
fi
(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download prometheus >/dev/null) || skip "apt-get download prometheus fails"
dpkg -x "$work"/prometheus_*.deb "$work/prometheus"
"$work/prometheus/usr/bin/promtool" --version >/dev/null 2>&1 || skip "Debian's promtool does not run here"
"$work/prometheus/usr/bin/prometheus" --version >/dev/null 2>&1 || skip "Debian's Prometheus does not run here"
rm -rf .tools/prometheus
mv "$work/prometheus" .tools/prometheus
.tools/prometheus/usr/bin/prometheus --version 2>&1 | head -n 1
