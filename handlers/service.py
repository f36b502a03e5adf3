"""The service: a call's rows through parsing, one forward pass and encoding, each row on its own.

Rows of one call come from callers who do not know each other, so whatever goes wrong in one stays there. It knows
nothing of TorchServe's context; `entry.py` does.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from handlers import bundle, card, media, memory, reply, request
from handlers.bundle import Bundle, Limits
from handlers.engines.choice import choose
from handlers.engines.eager import Eager
from handlers.engines.engine import Engine
from handlers.errors import Draining, Internal, ReplyTooLarge, RequestError, TooManyImages, UnknownLayer
from handlers.images import ANY_SIZE, Picture, decode, noise
from handlers.inference import Inference, Job
from handlers.networks.geometry import layer_geometry
from handlers.options import Options

logger = logging.getLogger(__name__)

_MAX_INPUT_BYTES = (
    8 * 2**20
)  # Of one forward pass: activations are many times their input, and callers send many pictures.
_ITEM_BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_TOO_LARGE = (
    "the reply would have {size:,} bytes, at most {limit:,} can be sent; ask for fewer layers or channels, "
    "for pool, for map_dtype uint8 or float16, or send fewer pictures in a request"
)


@dataclass(frozen=True)
class Answer:
    """What goes back for one row: body, media type, HTTP status (which only REST heeds)."""

    body: bytes
    media_type: str
    status: int = 200


class Service:
    """A loaded archive that answers rows.

    Args:
        archive: The loaded archive.
        identity: Who answers.
        limits: In force.
        engine: What runs the network; None for torch on `device`.
        device: Where the network runs, unless there is an engine.
        drain_file: While this file exists, readiness says no.

    Raises:
        RuntimeError: The network does not survive its first forward pass, or its graph computes something else.
    """

    def __init__(
        self,
        archive: Bundle,
        identity: reply.Identity,
        limits: Limits,
        *,
        engine: Engine | None = None,
        device: torch.device | str = "cpu",
        drain_file: Path | None = None,
    ) -> None:
        self._preprocessing = archive.preprocessing
        self._identity = identity
        self._limits = limits
        self._drain_file = drain_file
        shape = (archive.preprocessing.channels, *(archive.preprocessing.size or ANY_SIZE))
        self._geometry = layer_geometry(archive.module, archive.layers, shape)
        if engine is None:
            engine = Eager(archive.module, archive.layers, has_scores=bool(archive.classes), device=device)
        self._inference = Inference(engine, archive.preprocessing, archive.classes)
        self._inference.check_graph()
        self._card = card.describe(archive, identity, limits, self._geometry)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        model: str,
        version: str,
        config: Mapping[str, Any],
        batch_size: int,
        gpu: int | None,
        environment: Mapping[str, str] = os.environ,
    ) -> Service:
        """Load an unpacked archive onto its device.

        Args:
            directory: The archive's folder.
            model: Name it is served under.
            version: Of the archive.
            config: Content of model-config.yaml.
            batch_size: Most rows in one call.
            gpu: Index of the GPU given to this worker, None for the CPU.
            environment: `CONVSCOPE_MAX_RESPONSE_BYTES`, `CONVSCOPE_DRAIN_FILE`, `CONVSCOPE_THREADS`, and
                `CONVSCOPE_ENGINE`: `auto`, `torch` or `onnxruntime`.
        """
        memory.keep()
        # One thread a worker unless told otherwise: TorchServe starts a worker per core.
        threads = int(environment.get("CONVSCOPE_THREADS", 1))
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 maps are float32 on a GPU too; TF32 keeps 10 bits of 23.
        device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
        archive = bundle.load(directory)
        eager = Eager(archive.module, archive.layers, has_scores=bool(archive.classes), device=device)
        wanted = environment.get("CONVSCOPE_ENGINE", "auto")
        engine = choose(eager, archive.graph, noise(archive.preprocessing, 2), wanted=wanted, threads=threads)
        identity = reply.Identity(model, version, engine.name, str(device))
        drain_file = environment.get("CONVSCOPE_DRAIN_FILE")
        service = cls(
            archive,
            identity,
            Limits.of(config, batch_size=batch_size, environment=environment),
            engine=engine,
            drain_file=Path(drain_file) if drain_file else None,
        )
        memory.settle()
        return service

    def answer(self, rows: Sequence[request.Row], properties: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Answer every row of a call.

        Args:
            rows: TorchServe's parameters of each request.
            properties: TorchServe's request properties of each, headers among them.

        Returns:
            One answer a row, in order. Nothing is raised: an error is an answer too.
        """
        headers = [request.request_headers(values) for values in properties]
        admitted = [self._admit(row, head) for row, head in zip(rows, headers, strict=True)]
        self._inference.run([job for job in admitted if isinstance(job, Job)])
        return [self._finish(job) if isinstance(job, Job) else job for job in admitted]

    def _admit(self, row: request.Row, headers: Mapping[str, str]) -> Job | Answer:
        """Parse a row and decode its pictures; a model card or a refusal is an answer already."""
        media_type = media.REST_DEFAULT if headers else media.GRPC_DEFAULT
        try:
            media_type = request.reply_type(row, headers)
            asked = request.parse(row, headers, max_images=self._limits.max_images)
            media_type = asked.media_type
            if asked.describe:
                return self._describe(media_type)
            layers = self._resolve(asked.options.layers)
            pictures = self._decode(asked.pictures)
            self._check_reply_size(len(pictures), layers, asked.options, media_type)
        except RequestError as error:
            return self._refuse(error, media_type)
        except Exception:
            logger.exception("a request could not be read")
            return self._refuse(Internal("the request could not be read; the server's log has the reason"), media_type)
        return Job(asked.options, layers, media_type, pictures, [None] * len(pictures))

    def _resolve(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        if "all" in layers:
            return tuple(self._geometry)
        unknown = [name for name in layers if name not in self._geometry]
        if unknown:
            published = ", ".join(self._geometry)
            raise UnknownLayer(f"there is no layer {unknown[0][:40]!r}; this model publishes {published}")
        return layers

    def _decode(self, files: Iterable[request.Bytes]) -> list[Picture | RequestError]:
        """Decode every file; one that fails is its own error, unless there are too many of them for the request."""
        pictures: list[Picture | RequestError] = []
        for file in files:
            try:
                pictures += decode(
                    file,
                    self._preprocessing,
                    max_bytes=self._limits.max_image_bytes,
                    max_pixels=self._limits.max_image_pixels,
                    max_images=self._limits.max_images,
                )
            except (TooManyImages, MemoryError):
                raise
            except RequestError as error:
                pictures.append(error)
            request.check_count(len(pictures), self._limits.max_images)
        return pictures

    def _check_reply_size(self, count: int, layers: tuple[str, ...], options: Options, media_type: str) -> None:
        """Refuse before the forward pass what could not be sent; a network of any size is judged by its reply."""
        if self._preprocessing.size is None or media_type == media.PNG:
            return
        cells = 0
        for name in layers:
            channels, *area = self._geometry[name].shape
            if isinstance(options.channels, int):
                channels = min(channels, options.channels)
            elif options.channels is not None:
                channels = len(options.channels)
            cells += channels * (math.prod(area) if options.pool is None else options.pool**2)
        size = count * cells * _ITEM_BYTES[options.map_dtype]
        size = size * 4 // 3 if media_type == media.JSON else size
        self._check_size(size)

    def _check_size(self, size: int) -> None:
        limit = self._limits.max_reply_bytes
        if size > limit:
            raise ReplyTooLarge(_TOO_LARGE.format(size=size, limit=limit))

    def _finish(self, job: Job) -> Answer:
        """Encode a job's reply, or say why it cannot be."""
        try:
            results = tuple(result for result in job.results if result is not None)
            outcome = reply.Reply.of(self._identity, results)
            body, media_type = reply.encode(outcome, job.media_type)
            self._check_size(len(body))
        except RequestError as error:
            return self._refuse(error, job.media_type)
        except Exception:
            logger.exception("a reply could not be encoded")
            return self._refuse(Internal("the reply could not be encoded; the server's log says why"), job.media_type)
        return Answer(body, media_type, outcome.refusal.status if outcome.refusal else 200)

    def _refuse(self, error: RequestError, media_type: str) -> Answer:
        body, media_type = reply.encode(reply.Reply(self._identity, (), error), media_type)
        return Answer(body, media_type, error.status)

    def _describe(self, media_type: str) -> Answer:
        """Answer the card after one real forward pass: the readiness probe."""
        if self._drain_file is not None and self._drain_file.exists():
            raise Draining("the server is stopping; requests in flight finish, new ones go elsewhere")
        self._inference.warm_up()
        body, media_type = card.encode(self._card, media_type)
        return Answer(body, media_type)
