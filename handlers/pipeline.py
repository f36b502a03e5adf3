"""The pipeline: one request's way from TorchServe's parameters to its response. Read `Pipeline.respond` first.

The requests of one batch come from different callers, so an error in one does not touch the others. TorchServe's
context is known to `entry.py` alone; `loading.py` loads archives and makes pipelines of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from handlers.api import card, media
from handlers.api.errors import BadRequest, Draining, Internal, RequestError, TooManyImages, UnknownLayer
from handlers.api.job import Job, Parameters
from handlers.api.limits import Limits, estimate_maps
from handlers.api.request import accepted_type, check_count, parse, request_headers
from handlers.images.decoding import Budget, Notes, OpenedFile, open_file
from handlers.images.preprocessing import ANY_SIZE, Picture
from handlers.network.archive import Archive
from handlers.network.engines import Engine
from handlers.network.predictor import Predictor
from handlers.ops.telemetry import Telemetry
from handlers.outputs import filters, formats, png
from handlers.outputs.editor import Editor
from handlers.outputs.explainer import Explainer
from handlers.outputs.response import Identity, Response, Result, error_of
from handlers.settings import Settings

if TYPE_CHECKING:
    from handlers.network.engines.torch_engine import TorchEngine

_READING = "the request could not be read; the server's log has the reason"
_ENCODING = "the reply could not be encoded; the server's log says why"
_PICTURE = "the picture could not be read; the server's log has the reason"

_MOST_DECODERS = 8  # Decoding threads. Each may hold a picture of `max_image_pixels`, of four bytes per pixel.
_WORTH_A_THREAD = 2**16  # Pixels of a picture file: decoding takes ten times as long as handing it to a thread.


class _Decoded(NamedTuple):
    """The result of decoding one file.

    Attributes:
        pictures: The file's pictures, ready for the network, or its error.
        sizes: (H, W) of each picture as it was sent; (0, 0) for an error.
        notes: Changes to each picture that affect what is seen.
        began: Start of decoding, by `perf_counter`.
        ended: End of decoding.
    """

    pictures: Sequence[Picture | RequestError]
    sizes: list[tuple[int, int]]
    notes: list[Notes]
    began: float
    ended: float


class Pipeline:
    """Responds to the requests of one model.

    Args:
        archive: The served archive.
        identity: The server's identity, sent in every response; `scores` is filled in.
        limits: The limits of a request.
        network: Builds the archive's network in torch, or returns it if already built.
        engine: The engine that predicts.
        settings: The worker's settings; the defaults unless given.
        telemetry: Counts and logs requests; None to do neither.

    Raises:
        RuntimeError: The network fails on its first forward pass, or its graph computes something else.
    """

    def __init__(
        self,
        archive: Archive,
        identity: Identity,
        limits: Limits,
        network: Callable[[], TorchEngine],
        engine: Engine,
        settings: Settings | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        settings = settings or Settings()
        self._archive, self._limits = archive, limits
        self._identity = replace(identity, scores=archive.scores)
        self._preprocessing, self._published = archive.preprocessing, archive.described.layers
        self.telemetry = telemetry or Telemetry()
        self.predictor = Predictor(engine, archive, identity.device)
        self.explainer = Explainer(archive, network, engine)
        self.editor = Editor(archive, network, self.predictor, identity.device)
        self.predictor.check_maps_leave_scores_alone()
        methods, operations = self.explainer.available(), self.editor.available()
        self._card = card.describe(archive, self._identity, limits, methods, operations)
        self._drain_file, self._starting_file = settings.drain_file, settings.starting_file
        self._scaled_decoding = settings.scaled_decoding
        self._decode_threads = min(settings.threads, _MOST_DECODERS)
        self._decoders = ThreadPoolExecutor(self._decode_threads, "decode")  # Threads start on demand.

    def respond(
        self,
        batch: Sequence[Parameters],
        properties: Sequence[Mapping[str, Any]],
        request_ids: Sequence[str | None] | None = None,
        *,
        is_recorded: bool = True,
    ) -> list[Response]:
        """Respond to every request of a batch.

        Args:
            batch: TorchServe's parameters of each request.
            properties: TorchServe's properties of each request, HTTP headers among them.
            request_ids: TorchServe's id of each request, used if it has none of its own.
            is_recorded: Count and log these requests.

        Returns:
            One response per request, in order. Errors are responses too and never raised.
        """
        began = perf_counter()
        telemetry = self.telemetry if is_recorded else Telemetry()
        telemetry.in_flight(len(batch))
        try:
            ids = request_ids or [None] * len(batch)
            jobs = [
                Job(parameters, request_headers(own), given, is_traced=telemetry.makes_spans)
                for parameters, own, given in zip(batch, properties, ids, strict=True)
            ]
            for job in jobs:
                job.resume()
                self._step(job, self._parse, _READING)
                self._step(job, self._open, _READING)
            parsed = [job for job in jobs if job.response is None]
            try:
                self._decode(parsed)
            except Exception as cause:  # No thread could be started.
                for job in parsed:
                    self._reject(job, Internal(_READING, unexpected=cause))
            for job in jobs:
                self._step(job, self._check, _READING)
            waiting = [job for job in jobs if job.response is None]
            self.predictor.run([job for job in waiting if not job.options.edits])
            if edited := [job for job in waiting if job.options.edits]:
                self.editor.run(edited)
            if explained := [job for job in waiting if job.options.explain is not None]:
                self.explainer.run(explained)
            for job in waiting:
                self._step(job, self._encode, _ENCODING)
            handler_s = perf_counter() - began
            responses = [self._finish(job, handler_s, len(jobs)) for job in jobs]
            if is_recorded and not self._is_starting():
                telemetry.record(jobs, handler_s)
            return responses
        finally:
            telemetry.in_flight(0)

    def _step(self, job: Job, step: Callable[[Job], None], failure: str) -> None:
        """Run one step of a job that has no response yet; an exception becomes the job's error response."""
        if job.response is not None:
            return
        try:
            step(job)
        except RequestError as error:
            self._reject(job, error)
        except Exception as cause:
            self._reject(job, Internal(failure, unexpected=cause))

    def _parse(self, job: Job) -> None:
        """Parse the request; the model card and a layer's filters get their response here."""
        request = parse(job, max_images=self._limits.max_images)
        if request.is_describe:
            job.response = self._describe(job)
        elif request.filters:
            job.response = self._filters(job, request.filters)
        else:
            job.wants_timing = request.options.timing
            job.layers = self._resolve(request.options.layers)
            job.files, job.options = request.files, request.options
            if job.options.explain is not None:
                explain = self.explainer.settle(job.options.explain)
                job.options = replace(job.options, explain=explain)
            if job.options.edits:
                self.editor.check_options(job.options)
            job.lap("read")

    def _open(self, job: Job) -> None:
        """Read the files' headers; an error affects only its picture, unless the request holds too many pictures."""
        limits = self._limits
        budget, count = Budget(limits.max_request_pixels), 0
        for file in job.files:
            opened: OpenedFile | RequestError
            try:
                opened = open_file(
                    file,
                    self._preprocessing,
                    max_bytes=limits.max_image_bytes,
                    max_pixels=limits.max_image_pixels,
                    max_images=limits.max_images,
                    budget=budget,
                    scaled=self._scaled_decoding,
                )
            except (TooManyImages, MemoryError):
                raise
            except RequestError as error:
                opened = error
            except Exception as cause:
                opened = Internal(_PICTURE, unexpected=cause)
            job.opened.append(opened)
            count += 1 if isinstance(opened, RequestError) else len(opened.sizes)
            check_count(count, limits.max_images)
        job.files = ()
        job.lap("decode")

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decode the files of all jobs, large ones several at a time; an error affects only its picture."""
        files = [opened for job in jobs for opened in job.opened]
        large = sum(isinstance(opened, OpenedFile) and opened.pixels >= _WORTH_A_THREAD for opened in files)
        is_shared = large > 1 and self._decode_threads > 1
        results = self._decoders.map(_decode_file, files) if is_shared else map(_decode_file, files)
        for job in jobs:
            decoded = [next(results) for _ in job.opened]
            job.opened = []
            for pictures, sizes, notes, _, _ in decoded:
                job.pictures += pictures
                job.sizes += sizes
                job.notes += notes
            if decoded:  # Threads take the files in order, so a job's first one begins before its others.
                ended = max(one.ended for one in decoded)
                job.add("decode", ended - decoded[0].began, ended)

    def _check(self, job: Job) -> None:
        """Check that the request is within its limits, which its pictures' sizes decide."""
        if job.options.explain is not None:
            self.explainer.check_work(job.options.explain, job.pictures)
        if job.options.edits:
            self.editor.check_work(job.options, job.pictures)
        if job.media_type == media.PNG and not png.fits(job.pictures, job.layers, job.options):
            job.media_type = _without_png(job)
        if job.media_type != media.PNG:  # A PNG's size is unknown before encoding.
            self._limits.check_response(self._estimate(job))

    def _encode(self, job: Job) -> None:
        """Encode the results."""
        job.resume()
        results = [result for result in job.results if result is not None]
        if any(job.notes):
            results = [
                replace(result, notes=notes) if isinstance(result, Result) else result
                for result, notes in zip(job.results, job.notes, strict=True)
                if result is not None
            ]
        error = error_of(results)
        response = formats.encode(
            replace(self._identity, engine=job.engine) if job.engine else self._identity,
            results,
            job.media_type,
            error=error,
            request_id=job.request_id,
            edits=len(job.options.edits),
        )
        self._limits.check_response(response.size)
        job.lap("encode")
        job.error, job.response = error, response

    def _finish(self, job: Job, handler_s: float, batch_requests: int) -> Response:
        """Add the timing to a response, if it was asked for."""
        assert job.response is not None  # noqa: S101  # For the types: every job has passed `_encode` or an error.
        if job.wants_timing:
            try:
                job.response = job.response.with_timing(job.timing(handler_s, batch_requests))
            except Exception as cause:
                self._reject(job, Internal(_ENCODING, unexpected=cause))
        return job.response

    def _reject(self, job: Job, error: RequestError) -> None:
        """Give a job the response of an error that concerns the request as a whole."""
        job.error, job.results = error, []
        job.seconds.pop("encode", None)  # Maps may have been converted, but the stage was not completed.
        job.response = formats.encode(self._identity, (), job.media_type, error=error, request_id=job.request_id)

    def _is_starting(self) -> bool:
        """Return whether the server is still starting; once it is ready, the file is no longer checked."""
        if self._starting_file is not None and not self._starting_file.exists():
            self._starting_file = None
        return self._starting_file is not None

    def _resolve(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in layers if name not in self._published and name != "all"]
        if unknown:
            raise UnknownLayer.of(unknown[0], self._published)
        return tuple(self._published) if "all" in layers else layers

    def _estimate(self, job: Job) -> int:
        """Return a lower estimate of the response's bytes."""
        good = [picture for picture in job.pictures if not isinstance(picture, RequestError)]
        if self._preprocessing.size is not None:
            size = len(good) * estimate_maps(job.layers, self._published, job.options, job.media_type)
        else:  # 0.9: what padding adds to the card's small maps does not grow with the picture.
            scales = [0.9 * prod(picture.shape[:2]) / prod(ANY_SIZE) for picture in good]
            size = sum(
                estimate_maps(job.layers, self._published, job.options, job.media_type, scale) for scale in scales
            )
        size *= 1 + job.options.compare  # Changes have the size of the maps.
        if job.options.explain is not None:
            size += self.explainer.estimate(job.options.explain, good, job.options)
        return size

    def _describe(self, job: Job) -> Response:
        """Return the model card after one real forward pass: the readiness probe."""
        job.predicts_nothing = True
        if self._drain_file is not None and self._drain_file.exists():
            raise Draining("the server is stopping: send new requests to another replica")
        if self._is_starting():
            raise Draining("the server is starting and warms up; ask again in a moment")
        self.predictor.run_black()
        return card.encode(self._card, job.media_type, job.request_id)

    def _filters(self, job: Job, layer: str) -> Response:
        """Return the kernels behind a layer; like a card, it is not counted as a prediction."""
        job.predicts_nothing = True
        layers = self._resolve((layer,))
        if len(layers) != 1:
            raise BadRequest("filters are those of one layer; name it")
        kernels = filters.kernels(self._archive, layers[0])
        response = filters.encode(kernels, layers[0], self._identity, job.media_type, job.request_id)
        self._limits.check_response(response.size)
        return response


def _decode_file(opened: OpenedFile | RequestError) -> _Decoded:
    """Decode one file, in any thread."""
    began = perf_counter()
    pictures: Sequence[Picture | RequestError]
    sizes, notes = [(0, 0)], list[Notes]([()])
    try:
        if isinstance(opened, RequestError):
            pictures = [opened]
        else:
            pictures, sizes, notes = opened.decode(), opened.sizes, opened.notes
    except RequestError as error:
        pictures = [error]
    except Exception as cause:
        pictures = [Internal(_PICTURE, unexpected=cause)]
    return _Decoded(pictures, sizes, notes, began, perf_counter())


def _without_png(job: Job) -> str:
    """Return the media type to use instead of PNG, which cannot show this response; browsers accept both."""
    try:
        return accepted_type(job, without=media.PNG)
    except BadRequest as err:
        raise BadRequest(png.NO_PNG) from err
