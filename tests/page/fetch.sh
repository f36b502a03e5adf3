#!/usr/bin/env bash
# Put a headless Chromium where the tests find it, without installing it: Debian's packages, unpacked in .tools/chromium, with those of the
# libraries it needs that are not here. Where that cannot be done, say why and succeed: the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() { echo "no Chromium for tests/page: $1" >&2; exit 0; }

for name in chromium chromium-headless-shell google-chrome; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ -x .tools/chromium/headless-shell ]; then exit 0; fi
{ command -v apt-get && command -v dpkg; } >/dev/null || skip "neither it nor apt is here"
mkdir -p .tools
work=$(mktemp -d "$PWD/.tools/XXXXXX")
trap 'rm -rf "$work"' EXIT
if [ -z "$(apt-cache madison chromium-headless-shell 2>/dev/null)" ]; then
  [ "$(id -u)" = 0 ] || skip "apt has no lists, or no such package; \`sudo apt-get update\` gets them"
  apt-get update -qq >/dev/null || skip "apt-get update fails"
fi
packages=$(apt-get --simulate --no-install-recommends install chromium-headless-shell fonts-dejavu-core | sed -n 's/^Inst \([^ ]*\).*/\1/p') ||
  skip "apt cannot work out what it needs"
# shellcheck disable=SC2086  # One word a package.
(cd "$work" && apt-get -qq -o APT::Sandbox::User=root download $packages >/dev/null) || skip "apt-get download fails"
mkdir "$work/chromium"
for package in "$work"/*.deb; do dpkg -x "$package" "$work/chromium"; done
cat >"$work/chromium/headless-shell" <<'START'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$(echo "$here"/usr/lib/*-linux-gnu):$(echo "$here"/usr/lib/*-linux-gnu/pulseaudio)"
exec "$here/usr/lib/chromium/chromium-headless-shell" "$@"
START
chmod +x "$work/chromium/headless-shell"
"$work/chromium/headless-shell" --version >/dev/null 2>&1 || skip "Debian's Chromium does not run here"
rm -rf .tools/chromium
mv "$work/chromium" .tools/chromium
.tools/chromium/headless-shell --version 2>/dev/null | head -n 1
