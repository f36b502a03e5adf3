"""Generate the code and the golden files of `proto/`: run by `make proto`, and with `--check` by a test.

Type: .venv-proto/bin/python proto/generate.py [--check]

The generator is pinned in requirements/proto.txt, apart from the service's own pins.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROTO = Path(__file__).resolve().parent
ROOT = PROTO.parent
GENERATED = {
    Path("handlers/wire"): ("convscope.proto",),
    Path("client/src/convscope/_wire"): ("convscope.proto", "inference.proto"),
    Path("server/wire"): ("inference.proto",),
}
EXAMPLES = {
    "request": "PredictRequest",
    "reply": "PredictReply",
    "refusal": "PredictReply",
    "card": "PredictReply",
    "explain": "PredictRequest",
    "explanation": "PredictReply",
    "edit": "PredictRequest",
    "edited": "PredictReply",
}


def generate(root: Path) -> list[Path]:
    """Write every generated file below `root` and return their paths, relative to it."""
    written = []
    for folder, sources in GENERATED.items():
        target = root / folder
        target.mkdir(parents=True, exist_ok=True)
        _protoc(f"--python_out={target}", f"--pyi_out={target}", *sources)
        written += [folder / f"{Path(name).stem}_pb2{ending}" for name in sources for ending in (".py", ".pyi")]
    for name, message in EXAMPLES.items():
        path = Path("proto/examples") / f"{name}.binpb"
        text = (PROTO / "examples" / f"{name}.txtpb").read_bytes()
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(
            _protoc("--deterministic_output", f"--encode=convscope.v1.{message}", "convscope.proto", stdin=text)
        )
        written.append(path)
    return written


def stale() -> list[Path]:
    """Return the generated files that are not what the sources make today."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        return [path for path in generate(fresh) if _read(fresh / path) != _read(ROOT / path)]


def _protoc(*arguments: str, stdin: bytes = b"") -> bytes:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *arguments]
    return subprocess.run(command, input=stdin, check=True, capture_output=True).stdout


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def main() -> int:
    """Generate, or say what is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a generated file is stale")
    if not parser.parse_args().check:
        print("\n".join(map(str, generate(ROOT))))
        return 0
    for path in stale():
        print(f"{path} is not what proto/ makes today; run `make proto`", file=sys.stderr)
    return 1 if stale() else 0


if __name__ == "__main__":
    sys.exit(main())
