"""The demonstration: serve, classify the pictures beside this file, draw their maps, say what to try next.

Type: make demo, and make stop when done. The service is left running in the background, so that another shell can ask
it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from convscope import Client, ConvscopeError, ModelNotFound

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
OUT = ROOT / "out" / "demo"
PID_FILE = OUT / "server.pid"
LOG_FILE = OUT / "server.log"
PICTURES = {
    "cifar": ("airplane", "cat", "frog", "horse", "ship", "truck"),
    "simple": ("cat", "ship"),
    "digits": ("digit-3", "digit-7"),
    "edges": ("square", "ship"),
}
START_S = 600.0  # Workers that share two cores with ten other processes took 243 s.


def main() -> int:
    """Run the demonstration, or stop the service it left running."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stop", action="store_true", help="stop the service that an earlier run left behind")
    parser.add_argument("--rest-port", type=int, default=8080)
    parser.add_argument("--grpc-port", type=int, default=7070)
    parser.add_argument("--metrics-port", type=int, default=8082)
    options = parser.parse_args()
    stop()
    if options.stop:
        return 0
    began = time.monotonic()
    print(f"Starting the service; its log is {LOG_FILE.relative_to(ROOT)}.", flush=True)
    server = start(options)
    with Client(f"http://127.0.0.1:{options.rest_port}") as client:
        if missing := wait_until_ready(server, client):
            stop()
            print(LOG_FILE.read_text(encoding="utf-8"), file=sys.stderr)
            print(f"demo: no answer from {', '.join(sorted(missing))}; the service is stopped", file=sys.stderr)
            return 1
        served = ", ".join(sorted(archive.stem for archive in (ROOT / "model_store").glob("*.mar")))
        print(f"Serving {served} after {time.monotonic() - began:.1f} s.\n")
        show_scores(client)
        show_maps(client)
    show_commands(options.rest_port, options.grpc_port)
    return 0


def start(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the service in its own session, with its output in a file."""
    OUT.mkdir(parents=True, exist_ok=True)
    ports = ("rest", "grpc", "metrics")
    flags = [text for name in ports for text in (f"--{name}-port", str(getattr(options, f"{name}_port")))]
    with LOG_FILE.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "server", "--workers", "1", "--startup-timeout-s", str(START_S), *flags],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    PID_FILE.write_text(str(server.pid), encoding="utf-8")
    return server


def stop() -> None:
    """Stop the service of an earlier run, if there is one, and wait until it is gone."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int(PID_FILE.read_text(encoding="utf-8"))
        command = Path(f"/proc/{pid}/cmdline")
        if (
            not command.exists() or b"server" not in command.read_bytes()
        ):  # The process id belongs to another program by now.
            raise ProcessLookupError
        os.kill(pid, signal.SIGTERM)
        while command.exists() and b"server" in command.read_bytes():
            time.sleep(0.1)
    PID_FILE.unlink(missing_ok=True)


def wait_until_ready(server: subprocess.Popen[bytes], client: Client) -> set[str]:
    """Wait until every model answers; return those that do not, since the service ended or took too long."""
    ends = time.monotonic() + START_S + 10  # Later than the service's own timeout, whose message says what is late.
    waiting = set(PICTURES)
    while waiting and time.monotonic() < ends and server.poll() is None:
        for model in sorted(waiting):
            with contextlib.suppress(ModelNotFound):
                if client.ready(model):
                    waiting.discard(model)
        time.sleep(0.2)
    return waiting


def show_scores(client: Client) -> None:
    """Print each network's best guesses for its pictures."""
    print(f"{'network':8} {'picture':10} best guesses")
    for model, names in PICTURES.items():
        for name, seen in zip(
            names, client.predict([SAMPLES / f"{name}.png" for name in names], model=model, top_k=3), strict=True
        ):
            guesses = ", ".join(f"{score.label} {score.probability:.0%}" for score in seen.top)
            print(f"{model:8} {name:10} {guesses or '(no classes: ask it for maps)'}")
    print()


def show_maps(client: Client) -> None:
    """Draw every layer's map of every picture as rows of grey tiles."""
    count = 0
    for model, names in PICTURES.items():
        for name in names:
            seen = client.predict(SAMPLES / f"{name}.png", model=model, layers="all")
            for layer in seen.maps:
                seen.figure(layer).savefig(OUT / f"{model}-{name}-{layer}.png")
                count += 1
    square = client.predict(SAMPLES / "square.png", model="edges", layers=["conv1"])
    print("The map of the 5×5 square, from the hand-set edge filter:")
    for row in square.maps["conv1"][0].astype(int).tolist():
        print("   " + "".join(f"{value:4}" for value in row))
    print(f"\n{count} figures of feature maps are in {OUT.relative_to(ROOT)}/, one a picture and layer.\n")


def show_commands(rest_port: int, grpc_port: int) -> None:
    """Print what to try while the service runs."""
    rest = f"localhost:{rest_port}/predictions/cifar"
    print(f"""The service runs on; `make stop` ends it. Try, in this folder:
  curl -T samples/cat.png {rest}
  curl -F data=@samples/cat.png -F layers=conv1,conv2 {rest}
  curl -T samples/cat.png -H 'X-Convscope-Layers: conv1' -H 'Accept: image/png' -o maps.png {rest}
  .venv/bin/convscope predict samples/cat.png samples/truck.png --model cifar --layers all --url http://localhost:{rest_port}
  .venv/bin/convscope card cifar --url grpc://localhost:{grpc_port}
  .venv/bin/convscope report samples/cat.png --model cifar --out out/cat.html --url http://localhost:{rest_port}
  .venv/bin/convscope ui --model cifar,deep,digits --url http://localhost:{rest_port}""")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConvscopeError as error:
        sys.exit(f"demo: {error}; the service's log is {LOG_FILE.relative_to(ROOT)}")
