"""The pipeline: one request's way from TorchServe's parameters to its response. Read `Pipeline.respond` first.

The requests of one batch come from different callers, so an error in one does not touch the others. TorchServe's
context is known to `entry.py` alone; `loading.py` makes pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from handlers.api import card, media
from handlers.api.errors import BadRequest, Draining, Internal, RequestError, TooManyImages, UnknownLayer
from handlers.api.job import Job, Parameters
from handlers.api.limits import Limits, estimate_maps
from handlers.api.request import Bytes, accepted_type, check_count, parse, request_headers
from handlers.images.decoding import Budget, decode_upright, fit_within
from handlers.images.preprocessing import ANY_SIZE, Picture
from handlers.network.archive import Archive
from handlers.network.predictor import Predictor
from handlers.ops.telemetry import Telemetry
from handlers.outputs import filters, formats, png
from handlers.outputs.explainer import Explainer
from handlers.outputs.response import Identity, Response, error_of

_READING = "the request could not be read; the server's log has the reason"
_ENCODING = "the reply could not be encoded; the server's log says why"


class Pipeline:
    """What responds to the requests of one model.

    Args:
        predictor: Runs the network.
        explainer: Explains its scores.
        archive: What is served.
        described: The model card.
        identity: What every response names as its server.
        limits: In force.
        drain_file: While this file exists, readiness fails.
        starting_file: While this file exists, readiness fails, and requests are neither counted nor logged.
        telemetry: Counts and logs requests.
    """

    def __init__(
        self,
        predictor: Predictor,
        explainer: Explainer,
        archive: Archive,
        described: Mapping[str, Any],
        identity: Identity,
        limits: Limits,
        *,
        drain_file: Path | None,
        starting_file: Path | None,
        telemetry: Telemetry,
    ) -> None:
        self.predictor, self.explainer, self.telemetry = predictor, explainer, telemetry
        self._archive, self._card = archive, described
        self._preprocessing, self._published = archive.preprocessing, archive.described.layers
        self._identity, self._limits = identity, limits
        self._drain_file, self._starting_file = drain_file, starting_file

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
            request_ids: TorchServe's id of each, for requests that name none.
            is_recorded: Count and log these requests.

        Returns:
            One response a request, in order. Nothing is raised: an error is a response too.
        """
        began = perf_counter()
        telemetry = self.telemetry if is_recorded else Telemetry()
        telemetry.in_flight(len(batch))
        try:
            ids = request_ids or [None] * len(batch)
            jobs = [
                Job(parameters, request_headers(own), given)
                for parameters, own, given in zip(batch, properties, ids, strict=True)
            ]
            for job in jobs:
                job.resume()
                self._step(job, self._parse, _READING)
                self._step(job, self._decode, _READING)
            waiting = [job for job in jobs if job.response is None]
            self.predictor.run(waiting)
            self.explainer.run(waiting)
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
        """Read what is asked for; the model card and a layer's filters get their response here."""
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
            job.lap("read")

    def _decode(self, job: Job) -> None:
        """Decode the pictures, and check that the request is within its limits."""
        self._decode_files(job)
        job.files = ()
        job.lap("decode")
        if job.options.explain is not None:
            self.explainer.check_work(job.options.explain, job.pictures)
        if job.media_type == media.PNG and not png.fits(job.pictures, job.layers, job.options):
            job.media_type = _without_png(job)
        if job.media_type != media.PNG:  # The size of a PNG is not known before.
            self._limits.check_response(self._estimate(job))

    def _encode(self, job: Job) -> None:
        """Encode the results."""
        job.resume()
        results = [result for result in job.results if result is not None]
        error = error_of(results)
        response = formats.encode(self._identity, results, job.media_type, error=error, request_id=job.request_id)
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
        """Tell whether the server is still starting; once it is ready, the file is not looked for any more."""
        if self._starting_file is not None and not self._starting_file.exists():
            self._starting_file = None
        return self._starting_file is not None

    def _resolve(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in layers if name not in self._published and name != "all"]
        if unknown:
            raise UnknownLayer.of(unknown[0], self._published)
        return tuple(self._published) if "all" in layers else layers

    def _decode_files(self, job: Job) -> None:
        """Decode every file; an error is that picture's own, unless the request holds too many pictures."""
        budget = Budget(self._limits.max_request_pixels)
        for file in job.files:
            found: list[Picture | RequestError]
            sizes = [(0, 0)]
            try:
                found, sizes = self._decode_file(file, budget)
            except (TooManyImages, MemoryError):
                raise
            except RequestError as error:
                found = [error]
            except Exception as cause:
                found = [Internal("the picture could not be read; the server's log has the reason", unexpected=cause)]
            job.pictures += found
            job.sizes += sizes
            check_count(len(job.pictures), self._limits.max_images)

    def _decode_file(self, file: Bytes, budget: Budget) -> tuple[list[Picture | RequestError], list[tuple[int, int]]]:
        """Return the pictures of a file, ready for the network, and (H, W) of each before that."""
        limits = self._limits
        pictures = decode_upright(
            file,
            self._preprocessing.channels,
            max_bytes=limits.max_image_bytes,
            max_pixels=limits.max_image_pixels,
            max_images=limits.max_images,
            budget=budget,
        )
        fitted: list[Picture | RequestError] = [
            fit_within(picture, self._preprocessing, max_pixels=limits.max_image_pixels, budget=budget)
            for picture in pictures
        ]
        return fitted, [(picture.shape[0], picture.shape[1]) for picture in pictures]

    def _estimate(self, job: Job) -> int:
        """Return about how many bytes the response will have at least."""
        good = [picture for picture in job.pictures if not isinstance(picture, RequestError)]
        if self._preprocessing.size is not None:
            size = len(good) * estimate_maps(job.layers, self._published, job.options, job.media_type)
        else:  # 0.9: what padding adds to the card's small maps does not grow with the picture.
            scales = [0.9 * prod(picture.shape[:2]) / prod(ANY_SIZE) for picture in good]
            size = sum(
                estimate_maps(job.layers, self._published, job.options, job.media_type, scale) for scale in scales
            )
        if job.options.explain is not None:
            size += self.explainer.estimate(job.options.explain, good, job.options)
        return size

    def _describe(self, job: Job) -> Response:
        """Return the model card after one real forward pass: the readiness probe."""
        job.predicts_nothing = True
        if self._drain_file is not None and self._drain_file.exists():
            raise Draining("the server is stopping; requests in flight finish, new ones go elsewhere")
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


def _without_png(job: Job) -> str:
    """Return the media type to use instead of PNG, which cannot show this response; browsers accept both."""
    try:
        return accepted_type(job, without=media.PNG)
    except BadRequest as err:
        raise BadRequest(png.NO_PNG) from err
