"""Known traffic: what is sent, and what the metrics must say of it afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
from convscope import Client, RequestRejected
from numpy.typing import NDArray

from tests.server.harness import ROOT, Launched

SAMPLES = ROOT / "samples"
PICTURES = {"cifar": ("cat.png", "frog.png", "ship.png"), "digits": ("digit-3.png", "digit-7.png")}
MEDIA = {"json": "application/json", "npz": "application/x-npz", "png": "image/png"}

Key = tuple[str, ...]


@dataclass
class Tally:
    """What was sent and answered; the keys are those of the metrics' labels.

    Attributes:
        requests: By model, transport, format and code.
        pictures: By model, transport and code.
        layers: By model and layer.
        classes: By model and class.
        handler_s: The replies' own timing, by model and transport; of every request of that model and transport.
        total_s: The caller's, alike.
    """

    requests: Counter[Key] = field(default_factory=Counter)
    pictures: Counter[Key] = field(default_factory=Counter)
    layers: Counter[Key] = field(default_factory=Counter)
    classes: Counter[Key] = field(default_factory=Counter)
    handler_s: dict[Key, list[float]] = field(default_factory=dict)
    total_s: dict[Key, list[float]] = field(default_factory=dict)


class Sender:
    """Sends to a service over both transports and keeps the tally.

    Args:
        server: The running service.
    """

    def __init__(self, server: Launched) -> None:
        self.tally = Tally()
        self._rest_url = f"http://127.0.0.1:{server.port('REST')}"
        addresses = {"rest": self._rest_url, "grpc": f"grpc://127.0.0.1:{server.port('gRPC')}"}
        self.clients = {name: Client(url, retries=0, deadline_s=120) for name, url in addresses.items()}

    def close(self) -> None:
        """Close the connections."""
        for client in self.clients.values():
            client.close()

    def send(
        self, transport: str, model: str, *, pictures: int = 1, layers: Sequence[str] = (), **options: Any
    ) -> None:
        """Send one good request, asking where its time went."""
        names = PICTURES[model]
        files = [SAMPLES / names[number % len(names)] for number in range(pictures)]
        seen = self.clients[transport].predict(files, model=model, layers=layers, timing=True, **options)
        self._note(transport, model, "protobuf", pictures, layers, [one.top[0].label for one in seen])
        assert seen[0].timing is not None
        self.tally.handler_s.setdefault((model, transport), []).append(seen[0].timing.handler_s)
        self.tally.total_s.setdefault((model, transport), []).append(seen[0].timing.total_s)

    def send_noise(self, transport: str, model: str, side_px: int) -> None:
        """Send one good request with a large picture, slow to decode."""
        noise: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
        seen = self.clients[transport].predict(noise, model=model, timing=True)
        self._note(transport, model, "protobuf", 1, (), [seen.top[0].label])
        assert seen.timing is not None
        self.tally.handler_s.setdefault((model, transport), []).append(seen.timing.handler_s)
        self.tally.total_s.setdefault((model, transport), []).append(seen.timing.total_s)

    def send_as(self, kind: str, model: str, layer: str) -> None:
        """Send one good request over REST whose reply is of another format."""
        picture = (SAMPLES / PICTURES[model][0]).read_bytes()
        headers = {"Accept": MEDIA[kind], "X-Convscope-Layers": layer}
        answer = httpx.post(f"{self._rest_url}/predictions/{model}", content=picture, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        label = self.clients["rest"].predict(picture, model=model).top[0].label
        self._note("rest", model, "protobuf", 1, (), [label])
        self._note("rest", model, kind, 1, (layer,), [label])

    def send_bad(self, transport: str, model: str, code: str) -> None:
        """Send one request that is refused: `bad_image` or `unknown_layer`."""
        picture = b"no picture" if code == "bad_image" else (SAMPLES / PICTURES[model][0]).read_bytes()
        layers = ["nobody"] if code == "unknown_layer" else []
        with pytest.raises(RequestRejected) as caught:
            self.clients[transport].predict(picture, model=model, layers=layers)
        assert caught.value.code == code
        self.tally.requests[model, transport, "protobuf", code] += 1
        if code == "bad_image":
            self.tally.pictures[model, transport, code] += 1

    def _note(
        self, transport: str, model: str, kind: str, pictures: int, layers: Sequence[str], labels: Sequence[str]
    ) -> None:
        self.tally.requests[model, transport, kind, "ok"] += 1
        self.tally.pictures[model, transport, "ok"] += pictures
        self.tally.layers.update((model, layer) for layer in layers)
        self.tally.classes.update((model, label) for label in labels)
