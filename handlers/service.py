"""The service: a call's rows through parsing, one forward pass and encoding, each row on its own.

Rows of one call come from callers who do not know each other, so whatever goes wrong in one stays there. It knows
nothing of TorchServe's context; `entry.py` does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from handlers import bundle, card, formats, memory, rehearsal, reply, request, sizes
from handlers.admission import Admission, refuse
from handlers.assembly import Piece
from handlers.bundle import Bundle, Limits
from handlers.engines.choice import choose
from handlers.engines.eager import Eager
from handlers.engines.engine import Engine
from handlers.errors import Internal, RequestError
from handlers.explanations.explainer import Explainer
from handlers.formats import Encoded
from handlers.images import ANY_SIZE, noise
from handlers.inference import Inference, Job
from handlers.networks.geometry import blank, layer_geometry
from handlers.networks.operations import count_multiply_adds
from handlers.telemetry import Nobody, Telemetry
from handlers.trace import Trace


@dataclass(frozen=True)
class Answer:
    """What goes back for one row: its pieces, media type, HTTP status (which only REST heeds)."""

    pieces: list[Piece]
    media_type: str
    status: int = 200

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.pieces))

    @property
    def body(self) -> bytes:
        """The pieces in one; each time it is asked for, they are copied."""
        return b"".join(self.pieces)


class Service:
    """A loaded archive that answers rows.

    Args:
        archive: The loaded archive.
        identity: Who answers.
        limits: In force.
        network: In torch; None for one on `device`.
        engine: What predicts; None for `network`.
        device: Where the network runs, unless it is given.
        drain_file: While this file exists, readiness says no.
        starting_file: While this file exists, readiness says no and nobody is told of requests.
        telemetry: Told of every request.

    Raises:
        RuntimeError: The network does not survive its first forward pass, or its graph computes something else.
    """

    def __init__(
        self,
        archive: Bundle,
        identity: reply.Identity,
        limits: Limits,
        *,
        network: Eager | None = None,
        engine: Engine | None = None,
        device: torch.device | str = "cpu",
        drain_file: Path | None = None,
        starting_file: Path | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._preprocessing = archive.preprocessing
        self._identity = identity
        self._limits = limits
        self._telemetry = telemetry or Telemetry()
        shape = (archive.preprocessing.channels, *(archive.preprocessing.size or ANY_SIZE))
        self._geometry = layer_geometry(archive.module, archive.layers, shape)
        multiply_adds = count_multiply_adds(archive.module, blank(archive.module, shape))
        if network is None:
            network = Eager(archive.module, archive.layers, has_scores=bool(archive.classes), device=device)
        engine = engine or network
        self._explainer = Explainer(
            network,
            engine,
            archive.preprocessing,
            archive.classes,
            self._geometry,
            has_gradients=archive.has_gradients,
        )
        self._inference = Inference(engine, archive.preprocessing, archive.classes, network.device)
        self._inference.check_graph()
        self._admission = Admission(
            identity,
            limits,
            archive.preprocessing,
            self._geometry,
            card.describe(archive, identity, limits, self._geometry, multiply_adds, self._explainer.available()),
            self._inference,
            self._explainer,
            drain_file=drain_file,
            starting_file=starting_file,
        )

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
            environment: `CONVSCOPE_MAX_RESPONSE_BYTES`, `CONVSCOPE_DRAIN_FILE`, `CONVSCOPE_STARTING_FILE`,
                `CONVSCOPE_THREADS`, `CONVSCOPE_ENGINE`: `auto`, `torch` or `onnxruntime`, and `CONVSCOPE_PRECISION`:
                `float32`, `float16` or `bfloat16`.
        """
        began = perf_counter()
        memory.keep()
        # One thread a worker unless told otherwise: TorchServe starts a worker per core.
        threads = int(environment.get("CONVSCOPE_THREADS", 1))
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = False  # float32 maps are float32 on a GPU too; TF32 keeps 10 bits of 23.
        device = torch.device("cpu" if gpu is None else f"cuda:{gpu}")
        archive = bundle.load(directory)
        eager = Eager(archive.module, archive.layers, has_scores=bool(archive.classes), device=device)
        wanted = environment.get("CONVSCOPE_ENGINE", "auto")
        precision, images = environment.get("CONVSCOPE_PRECISION", "float32"), noise(archive.preprocessing, 2)
        engine = choose(eager, archive.graph, images, wanted=wanted, threads=threads, precision=precision)
        if not isinstance(engine, Eager):
            # What is left to torch is converting maps: too little for threads to wait on others.
            torch.set_num_threads(1)
        identity = reply.Identity(model, version, engine.name, str(device))
        drain_file, starting_file = (environment.get(f"CONVSCOPE_{what}_FILE") for what in ("DRAIN", "STARTING"))
        telemetry = Telemetry.of(identity, tuple(archive.layers), archive.classes)
        service = cls(
            archive,
            identity,
            Limits.of(config, batch_size=batch_size, environment=environment),
            network=eager,
            engine=engine,
            drain_file=Path(drain_file) if drain_file else None,
            starting_file=Path(starting_file) if starting_file else None,
            telemetry=telemetry,
        )
        service.rehearse()
        telemetry.loaded(perf_counter() - began)
        memory.settle()
        return service

    def rehearse(self) -> None:
        """Ask itself every kind of request once, of which nobody is told."""
        telemetry, self._telemetry = self._telemetry, Nobody()
        try:
            rehearsal.rehearse(self.answer, self._preprocessing, tuple(self._geometry), self._limits.max_images)
        finally:
            self._telemetry = telemetry

    def answer(
        self,
        rows: Sequence[request.Row],
        properties: Sequence[Mapping[str, Any]],
        request_ids: Sequence[str | None] | None = None,
    ) -> list[Answer]:
        """Answer every row of a call.

        Args:
            rows: TorchServe's parameters of each request.
            properties: TorchServe's request properties of each, headers among them.
            request_ids: TorchServe's id of each, for requests that name none.

        Returns:
            One answer a row, in order. Nothing is raised: an error is an answer too.
        """
        answers = self._answer(rows, properties, request_ids or [None] * len(rows))
        memory.release(sum(answer.size for answer in answers))
        return answers

    def _answer(
        self, rows: Sequence[request.Row], properties: Sequence[Mapping[str, Any]], request_ids: Sequence[str | None]
    ) -> list[Answer]:
        began = perf_counter()
        self._telemetry.in_flight(len(rows))
        try:
            traces: list[Trace] = []
            admitted: list[Job | Encoded] = []
            for row, values, given in zip(rows, properties, request_ids, strict=True):
                headers = request.request_headers(values)
                traces.append(Trace(headers, given))
                admitted.append(self._admission.admit(row, headers, traces[-1]))
            jobs = [job for job in admitted if isinstance(job, Job)]
            self._inference.run(jobs)
            self._explainer.run(jobs)
            encoded = [self._finish(job) if isinstance(job, Job) else job for job in admitted]
            handler_s = perf_counter() - began
            timings = [trace.timing(handler_s, len(rows)) if trace.wants_timing else None for trace in traces]
            answers = [self._close(*one) for one in zip(encoded, traces, timings, strict=True)]
            if not self._admission.is_starting():
                self._telemetry.record(traces, handler_s)
        finally:
            self._telemetry.in_flight(0)
        return answers

    def _finish(self, job: Job) -> Encoded:
        """Encode a job's reply, or say why it cannot be."""
        trace = job.trace
        trace.resume()
        try:
            results = tuple(result for result in job.results if result is not None)
            outcome = reply.Reply.of(self._identity, results, trace.request_id)
            encoded = formats.encode(outcome, job.media_type, awaits_timing=trace.wants_timing)
            sizes.check(encoded.size, self._limits.max_reply_bytes)
        except RequestError as error:
            return refuse(self._identity, trace, error, job.media_type)
        except Exception as failure:
            message = "the reply could not be encoded; the server's log says why"
            return refuse(self._identity, trace, Internal(message, unexpected=failure), job.media_type)
        trace.lap("encode")
        trace.results, trace.error = results, outcome.refusal
        return encoded

    def _close(self, encoded: Encoded, trace: Trace, timing: reply.Timing | None) -> Answer:
        """Finish an answer, and note in the trace what goes back."""
        try:
            pieces = encoded.close(timing)
        except Exception as failure:
            trace.results = ()
            error = Internal("the reply could not be encoded; the server's log says why", unexpected=failure)
            encoded = refuse(self._identity, trace, error, encoded.media_type)
            pieces = encoded.pieces
        answer = Answer(pieces, encoded.media_type, encoded.status)
        trace.media_type, trace.reply_bytes = encoded.media_type, answer.size
        return answer
