"""Admission: what becomes of a row before the forward pass.

It is parsed and its pictures decoded, or refused, or answered at once: a model card, a layer's filters. Whatever goes
wrong here is that row's own answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from handlers import card, filters, formats, media, reply, request, sizes
from handlers.bundle import Limits
from handlers.errors import BadRequest, Draining, Internal, RequestError, TooManyImages, UnknownLayer
from handlers.explanations.explainer import Explainer
from handlers.files import Budget
from handlers.formats import Encoded
from handlers.images import ANY_SIZE, Picture, Preprocessing, decode
from handlers.inference import Inference, Job
from handlers.networks.geometry import LayerGeometry
from handlers.options import Options
from handlers.trace import Trace


class Admission:
    """Turns rows into jobs.

    Args:
        identity: Who answers.
        limits: In force.
        preprocessing: What the network takes.
        geometry: Of each published layer, by public name.
        model_card: What is answered to who asks for it, after one forward pass.
        inference: That does this pass.
        explainer: That says which explanations there are, and what they cost.
        drain_file: While this file exists, readiness says no.
        starting_file: While this file exists, readiness says no.
    """

    def __init__(
        self,
        identity: reply.Identity,
        limits: Limits,
        preprocessing: Preprocessing,
        geometry: Mapping[str, LayerGeometry],
        model_card: Mapping[str, Any],
        inference: Inference,
        explainer: Explainer,
        *,
        drain_file: Path | None = None,
        starting_file: Path | None = None,
    ) -> None:
        self._identity = identity
        self._limits = limits
        self._preprocessing = preprocessing
        self._geometry = geometry
        self._card = model_card
        self._inference = inference
        self._explainer = explainer
        self._drain_file = drain_file
        self._starting_file = starting_file

    def admit(self, row: request.Row, headers: Mapping[str, str], trace: Trace) -> Job | Encoded:
        """Parse a row and decode its pictures; a model card or a refusal is encoded already."""
        media_type = media.REST_DEFAULT if headers else media.GRPC_DEFAULT
        try:
            row = request.open_row(row, headers)
            media_type = request.reply_type(row, headers)
            asked = request.parse(row, headers, trace, max_images=self._limits.max_images)
            media_type = asked.media_type
            if asked.describe:
                return self._describe(trace, media_type)
            if asked.filters:
                return self._filters(trace, asked.filters, media_type)
            trace.wants_timing = asked.options.timing
            layers = trace.layers = self._resolve(asked.options.layers)
            options, explain = asked.options, asked.options.explain
            if explain is not None:
                explain = self._explainer.settle(explain)
                options = replace(options, explain=explain)
            trace.lap("read")
            pictures = self._decode(asked.pictures)
            trace.pictures = len(pictures)
            trace.lap("decode")
            if explain is not None:
                self._explainer.check_work(explain, pictures)
            if media_type == media.PNG and not formats.fits_png(pictures, layers, options):
                media_type = _without_png(row, headers)
            if media_type != media.PNG:  # How small it gets is not known before.
                self._check_size(pictures, layers, options, media_type)
        except RequestError as error:
            return refuse(self._identity, trace, error, media_type)
        except Exception as failure:
            message = "the request could not be read; the server's log has the reason"
            return refuse(self._identity, trace, Internal(message, unexpected=failure), media_type)
        return Job(trace, options, layers, media_type, pictures, [None] * len(pictures))

    def is_starting(self) -> bool:
        """Tell whether the server has still to be ready; once it is, no file is looked for any more."""
        if self._starting_file is not None and not self._starting_file.exists():
            self._starting_file = None
        return self._starting_file is not None

    def _resolve(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in layers if name not in self._geometry and name != "all"]
        if unknown:
            raise UnknownLayer.of(unknown[0], self._geometry)
        return tuple(self._geometry) if "all" in layers else layers

    def _decode(self, files: Sequence[request.Bytes]) -> list[Picture | RequestError]:
        """Decode every file; one that fails is its own error, unless there are too many of them for the request."""
        pictures: list[Picture | RequestError] = []
        limits, budget = self._limits, Budget(self._limits.max_request_pixels)
        for file in files:
            try:
                pictures += decode(
                    file,
                    self._preprocessing,
                    max_bytes=limits.max_image_bytes,
                    max_pixels=limits.max_image_pixels,
                    max_images=limits.max_images,
                    budget=budget,
                )
            except (TooManyImages, MemoryError):
                raise
            except RequestError as error:
                pictures.append(error)
            except Exception as failure:
                message = "the picture could not be read; the server's log has the reason"
                pictures.append(Internal(message, unexpected=failure))
            request.check_count(len(pictures), limits.max_images)
        return pictures

    def _check_size(
        self, pictures: list[Picture | RequestError], layers: tuple[str, ...], options: Options, media_type: str
    ) -> None:
        """Refuse what is foreseen to make too long a reply."""
        good = [picture for picture in pictures if not isinstance(picture, RequestError)]
        if self._preprocessing.size is not None:
            foreseen = len(good) * sizes.foresee(layers, self._geometry, options, media_type)
        else:  # Padding adds less to a large map than to the card's small one.
            scales = [0.9 * prod(picture.shape[:2]) / prod(ANY_SIZE) for picture in good]
            foreseen = sum(sizes.foresee(layers, self._geometry, options, media_type, scale) for scale in scales)
        if options.explain is not None:
            foreseen += self._explainer.foresee(options.explain, good, options)
        sizes.check(foreseen, self._limits.max_reply_bytes)

    def _describe(self, trace: Trace, media_type: str) -> Encoded:
        """Answer the card after one real forward pass: the readiness probe."""
        trace.is_card = True
        if self._drain_file is not None and self._drain_file.exists():
            raise Draining("the server is stopping; requests in flight finish, new ones go elsewhere")
        if self.is_starting():
            raise Draining("the server is starting and warms up; ask again in a moment")
        self._inference.warm_up()
        return card.encode(self._card, media_type, trace.request_id)

    def _filters(self, trace: Trace, layer: str, media_type: str) -> Encoded:
        """Answer the kernels behind a layer; as a card, it is no prediction and not counted among them."""
        trace.is_card = True
        layers = self._resolve((layer,))
        if len(layers) != 1:
            raise BadRequest("filters are those of one layer; name it")
        kernels = filters.kernels(self._geometry[layers[0]].operation, layers[0])
        encoded = filters.encode(kernels, layers[0], self._identity, media_type, trace.request_id)
        sizes.check(encoded.size, self._limits.max_reply_bytes)
        return encoded


def _without_png(row: request.Row, headers: Mapping[str, str]) -> str:
    """Return the format that a caller likes next to PNG, which cannot show this reply; browsers accept PNG and more."""
    try:
        return request.reply_type(row, headers, without=media.PNG)
    except BadRequest as err:
        raise BadRequest(formats.NO_PNG) from err


def refuse(identity: reply.Identity, trace: Trace, error: RequestError, media_type: str) -> Encoded:
    """Encode a refusal, and note it in the trace."""
    trace.error = error
    trace.seconds.pop("encode", None)  # Maps may have been converted, but it did not get through.
    return formats.encode(reply.Reply(identity, (), error, trace.request_id), media_type)
