"""The editor: checks a request's edits, and runs the network with them.

Edits are done by torch in float32, whatever engine predicts and in whatever precision: that network is the one that
gradients come from, and it is built for the first request that needs it. Requests without edits do not use the editor.

Pictures that are edited run in one pass with what they need unedited: the pictures whose maps are put into theirs and,
for a comparison, themselves. So an unedited map is at hand at the place in the network where it is put in, and what
edits change is not blurred by the rounding of another batch. Axes: `N` batch, `C` channels, `H, W` picture pixels, `h,
w` map cells, `K` classes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from handlers import optional_torch
from handlers.api.edits import ADD, CLAMP, MEAN, OPERATIONS, SCALE, ZERO, Edit
from handlers.api.errors import BadImage, BadRequest, ImageTooLarge, Internal, RequestError, UnknownLayer
from handlers.api.job import Job
from handlers.api.options import PICTURE, Options
from handlers.images.preprocessing import Picture, to_input_on
from handlers.network.archive import Archive
from handlers.network.engines import MAX_INPUT_BYTES, CannotEditError, Cells
from handlers.network.predictor import Predictor
from handlers.outputs.explainer import MAX_RUNS, MAX_SECONDS
from handlers.outputs.maps import prepare
from handlers.outputs.response import Change, ClassScore, Result

if TYPE_CHECKING:
    from torch import Tensor

    from handlers.network.engines.torch_engine import TorchEngine

MAX_PIXELS = 2**20  # An edited picture and all that run with it: four of 512×512.

_NEAR = 1e-6  # Of a cell: edges of boxes are computed, so one that should meet the middle of a cell may miss it.

Place = tuple[slice, slice]
"""Rows and columns of a map."""


class Editor:
    """Runs the network with edits.

    Args:
        archive: The served archive.
        network: Builds the network in torch, on its device, or returns it if already built.
        predictor: Converts scores and maps to results.
        device: The network's device: `cpu`, or `cuda:` and a number.
    """

    def __init__(self, archive: Archive, network: Callable[[], TorchEngine], predictor: Predictor, device: str) -> None:
        self._network, self._predictor, self._device = network, predictor, device
        self._preprocessing = archive.preprocessing
        self._layers = archive.described.layers
        self._has_torch = optional_torch.is_installed()

    def available(self) -> list[str]:
        """Return the operations that a request may ask for."""
        return list(OPERATIONS) if self._has_torch else []

    def check_options(self, options: Options) -> None:
        """Check the edits as far as possible without the pictures.

        Raises:
            BadRequest: torch is not installed, an explanation is asked for too, or an operation does not fit its layer.
            UnknownLayer: The model does not publish a layer.
        """
        if not self._has_torch:
            raise BadRequest("this server has no torch, which edits are done by; its card lists no operations")
        if options.explain is not None and options.explain.method != PICTURE:
            raise BadRequest(
                "explain and edits do not go together: what is explained is the network without edits; leave out one "
                "of them, or send two requests"
            )
        for number, edit in enumerate(options.edits):
            if edit.layer not in self._layers:
                raise UnknownLayer(f"edits[{number}]: {UnknownLayer.of(edit.layer, self._layers)}")
            try:
                self._check_edit(edit)
            except BadRequest as err:
                raise BadRequest(f"edits[{number}]: {err}") from err

    def check_work(self, options: Options, pictures: Sequence[Picture | RequestError]) -> None:
        """Check that the pictures named by operations exist, and that the worker is not busy for too long.

        Raises:
            BadRequest: A picture does not exist, or the edits take more than `MAX_RUNS` runs of the network.
        """
        for number, edit in enumerate(options.edits):
            for index in (edit.picture, edit.source):
                if index is not None and index >= len(pictures):
                    raise BadRequest(
                        f"edits[{number}]: there is no picture {index}; the request has 0 to {len(pictures) - 1}"
                    )
        runs = sum(
            len(_needed(options, index)) + _is_edited(options, index)
            for index, picture in enumerate(pictures)
            if not isinstance(picture, RequestError)
        )
        if runs > MAX_RUNS:
            raise BadRequest(
                f"the edits would take {runs:,} runs of the network, at most {MAX_RUNS:,} are done for a request; send "
                "fewer pictures"
            )

    def run(self, jobs: Sequence[Job]) -> None:
        """Run jobs with edits, one after the other, and set every picture's result in its job."""
        for job in jobs:
            job.resume()
            job.results = [picture if isinstance(picture, RequestError) else None for picture in job.pictures]
            try:
                self._run(job, MAX_SECONDS / len(jobs))
            except Exception as cause:  # The network could not be built.
                failure = Internal("the edits failed; the server's log has the reason", unexpected=cause)
                job.results = [failure if result is None else result for result in job.results]
            job.lap("forward")

    def _check_edit(self, edit: Edit) -> None:
        shape = self._layers[edit.layer].shape
        if len(shape) != 3:
            raise BadRequest(f"edits need a map of shape (C, h, w); {edit.layer} has {shape}")
        named = edit.channels or edit.excluded
        if max(named, default=0) >= shape[0]:
            raise BadRequest(f"layer {edit.layer} has channels 0 to {shape[0] - 1}, not {max(named)}")
        if len(edit.excluded) == shape[0]:
            raise BadRequest(f"no channel is left: {edit.layer} has {shape[0]}, and all of them are excepted")
        if self._preprocessing.size is not None and edit.region:
            _region(edit, shape[1], shape[2])
        if edit.box and not self._layers[edit.layer].facts.get("receptive_field"):
            raise BadRequest(
                f"the card does not say where the cells of {edit.layer} are in the picture, so box cannot be mapped to "
                "it; give region, in cells"
            )

    def _run(self, job: Job, seconds: float) -> None:
        network = self._network()
        job.engine = network.name
        job.lap("forward")  # Building the network, if it was not built yet.
        ends = perf_counter() + seconds
        groups = defaultdict[tuple[int, int], dict[int, list[int]]](dict)
        for index, picture in enumerate(job.pictures):
            if not isinstance(picture, RequestError):
                try:
                    groups[picture.shape[0], picture.shape[1]][index] = self._together(job, index, picture)
                except RequestError as error:
                    job.results[index] = error
        with network.all_threads():
            for (height, width), needs in groups.items():
                most = max(1, MAX_INPUT_BYTES // (height * width * self._preprocessing.channels * 4))
                for chosen in _passes(needs, most):
                    if perf_counter() > ends:
                        late = BadRequest(
                            f"the edits took longer than the {MAX_SECONDS:g} s that those asked for together get; send "
                            "fewer pictures"
                        )
                        job.results = [late if result is None else result for result in job.results]
                        return
                    self._run_together(network, job, {index: needs[index] for index in chosen}, height, width)

    def _together(self, job: Job, index: int, picture: Picture) -> list[int]:
        """Return the pictures that must run unedited in the pass of a picture.

        Raises:
            BadRequest: The map of one of these pictures cannot be put into this picture's.
            ImageTooLarge: They are too large together.
        """
        needed = _needed(job.options, index)
        for other in needed:
            source = job.pictures[other]
            if isinstance(source, RequestError):
                raise BadRequest(f"picture {other}, whose map is to be put in, has an error: {source.code}")
            if source.shape[:2] != picture.shape[:2]:
                raise BadRequest(
                    f"picture {other}, whose map is to be put in, has {source.shape[0]}×{source.shape[1]} pixels, and "
                    f"this one {picture.shape[0]}×{picture.shape[1]}; send pictures of one size"
                )
        height, width = picture.shape[:2]
        runs = len(needed) + _is_edited(job.options, index)
        if runs * height * width > MAX_PIXELS:
            raise ImageTooLarge(
                f"a picture that is edited, its unedited run for compare, and those whose maps are put into it may "
                f"have {MAX_PIXELS:,} pixels together, not {runs} · {height * width:,}; send smaller ones"
            )
        return needed

    def _run_together(
        self, network: TorchEngine, job: Job, needs: Mapping[int, Sequence[int]], height: int, width: int
    ) -> None:
        """Run pictures of one size in one pass, with the unedited pictures that they need."""
        options = job.options
        edited = [index for index in needs if _is_edited(options, index)]
        unedited = dict.fromkeys(other for own in needs.values() for other in own)
        before = {index: row for row, index in enumerate(unedited)}
        after = before | {index: row for row, index in enumerate(edited, len(before))}
        errors: dict[int, RequestError] = {}

        def change(edit: Edit) -> Callable[[Tensor], None]:
            def apply(maps: Tensor) -> None:
                channels = _channels(edit, maps.shape[1])
                for index in edited:
                    if edit.concerns(index) and index not in errors:
                        try:
                            place = self._place(edit, job, index, maps.shape[2], maps.shape[3])
                        except BadRequest as error:
                            errors[index] = error
                            continue
                        source = None if edit.source is None else maps[before[edit.source]]
                        _operate(edit, maps[after[index]], (channels, *place), source)

            return apply

        try:
            rows = [job.pictures[index] for index in [*before, *edited]]
            images = to_input_on(self._device, rows, self._preprocessing)  # type: ignore[arg-type]  # (N, C, H, W)
            job.lap("preprocess")
            logits, maps = network.run_edited(
                images,
                frozenset(job.layers),
                [(edit.layer, change(edit)) for edit in options.edits if any(map(edit.concerns, edited))],
            )
            job.lap("forward")
            scores = [] if logits is None else logits.tolist()
            for index in needs:
                job.results[index] = errors.get(index) or self._result(
                    job, scores, maps, after[index], before[index] if options.compare else None
                )
            job.lap("encode")
        except CannotEditError as err:
            for index in needs:
                job.results[index] = BadRequest(str(err))
        except Exception as cause:
            error = self._predictor.failure(cause, height, width)
            for index in needs:
                job.results[index] = error

    @np.errstate(over="ignore", invalid="ignore")  # Values beyond float32 are checked for at the end.
    def _result(
        self, job: Job, scores: Sequence[list[float]], maps: Mapping[str, Cells], row: int, before: int | None
    ) -> Result | RequestError:
        """Return the result in one row, and how it differs from the row of the unedited run, if any."""
        options = job.options
        found = self._predictor.top(scores[row], len(scores[row])) if scores else ()
        if isinstance(found, RequestError):
            return BadRequest("the scores are not finite after these edits; send smaller values")
        count = options.top_k or len(found)
        wanted = {name: maps[name][row : row + 1] for name in job.layers}  # Arrays, or tensors on their device.
        [result] = self._predictor.results(options, wanted, [found[:count]])
        if isinstance(result, RequestError):
            return _not_carried(result)
        sent = {f"the map of {item.layer}": item.cells for item in result.maps}
        if before is not None:
            unedited = self._predictor.top(scores[before], len(scores[before])) if scores else ()
            if isinstance(unedited, RequestError):
                return unedited
            changed = []
            for item in result.maps:
                difference = wanted[item.layer] - maps[item.layer][before : before + 1]
                [one] = prepare(item.layer, difference, replace(options, channels=item.channels))
                if isinstance(one, RequestError):
                    return _not_carried(one, "in the comparison, ")
                changed.append(one)
                sent[f"the change of the map of {item.layer}"] = one.cells
            change = Change(_change(unedited, found, count), tuple(changed))
            numbers = [number for score in change.top for number in score[2:] if number is not None]
            sent["the change of the scores"] = np.array(numbers, np.float32)
            result = replace(result, change=change)
        for what, values in sent.items():
            if not np.isfinite(values).all():
                return BadRequest(f"{what} is not finite after these edits; send smaller values")
        return result

    def _place(self, edit: Edit, job: Job, index: int, height: int, width: int) -> Place:
        """Return the rows and columns of a map (C, h, w) that an operation changes.

        Raises:
            BadRequest: They are outside the map, or empty.
        """
        if edit.region:
            return _region(edit, height, width)
        if not edit.box:
            return slice(None), slice(None)
        original, picture = job.sizes[index], job.pictures[index]
        assert not isinstance(picture, RequestError)  # noqa: S101  # For the types: only these run.
        if edit.box[2] > original[0] or edit.box[3] > original[1]:
            raise BadRequest(
                f"box ends at ({edit.box[2]:g}, {edit.box[3]:g}), beyond the picture, which has "
                f"{original[0]}×{original[1]} pixels"
            )
        placement = self._preprocessing.place(original, is_prepared=picture.dtype == np.float32)
        seen, facts = placement.region(original), self._layers[edit.layer].facts
        place = []
        for axis, cells in enumerate((height, width)):
            scale = picture.shape[axis] / (seen[axis + 2] - seen[axis])
            middle = facts["receptive_field_start"][axis] + facts["receptive_field"][axis] / 2  # Of the first cell.
            first, end = (
                math.ceil(((edge - seen[axis]) * scale - middle) / facts["stride"][axis] - _NEAR)
                for edge in (edit.box[axis], edit.box[axis + 2])
            )
            place.append(slice(max(first, 0), min(end, cells)))
        if any(part.start >= part.stop for part in place):
            raise BadRequest(
                f"box holds the middle of no cell of {edit.layer}, one of which is every "
                f"{'×'.join(map(str, facts['stride']))} pixels of the network's input; give a larger box"
            )
        return place[0], place[1]


def _not_carried(error: RequestError, where: str = "") -> RequestError:
    """Return the error for a map whose values the asked-for dtype cannot carry: it is not the picture that is wrong."""
    return BadRequest(f"after these edits, {where}{error}") if isinstance(error, BadImage) else error


def _needed(options: Options, index: int) -> list[int]:
    """Return the pictures of which a picture needs the unedited run: for what is put in, and to compare."""
    own = [edit for edit in options.edits if edit.concerns(index)]
    needed = [edit.source for edit in own if edit.source is not None]
    if options.compare or not own:
        needed.append(index)
    return list(dict.fromkeys(needed))


def _is_edited(options: Options, index: int) -> bool:
    return any(edit.concerns(index) for edit in options.edits)


def _passes(needs: Mapping[int, Sequence[int]], most: int) -> Iterator[list[int]]:
    """Share pictures out among passes of at most `most` rows, or of one picture and what it needs."""
    chosen: list[int] = []
    unedited: set[int] = set()
    for index, needed in needs.items():
        if chosen and len(unedited.union(needed)) + len(chosen) + 1 > most:
            yield chosen
            chosen, unedited = [], set()
        chosen.append(index)
        unedited.update(needed)
    if chosen:
        yield chosen


def _region(edit: Edit, height: int, width: int) -> Place:
    top, left, bottom, right = edit.region
    if bottom > height or right > width:
        raise BadRequest(
            f"region ends at ({bottom}, {right}), beyond the map of {edit.layer}, which has {height}×{width} cells"
        )
    return slice(top, bottom), slice(left, right)


def _channels(edit: Edit, count: int) -> slice | list[int]:
    if edit.excluded:
        return [channel for channel in range(count) if channel not in set(edit.excluded)]
    return list(edit.channels) if edit.channels else slice(None)


def _operate(edit: Edit, cells: Tensor, place: tuple[slice | list[int], slice, slice], source: Tensor | None) -> None:
    """Change the cells of one picture's map in place.

    Args:
        edit: The operation.
        cells: (C, h, w).
        place: Channels, rows and columns that are changed.
        source: `patch`: the map (C, h, w) that is put in.
    """
    if source is not None:
        cells[place] = source[place]
    elif edit.operation == ZERO:
        cells[place] = 0
    elif edit.operation == SCALE:
        cells[place] *= edit.value[0]
    elif edit.operation == ADD:
        cells[place] += edit.value[0]
    elif edit.operation == MEAN:
        cells[place] = cells[place[0]].mean(dim=(1, 2), keepdim=True)
    elif edit.operation == CLAMP:
        cells[place] = cells[place].clamp(*edit.value)


def _change(before: Sequence[ClassScore], after: Sequence[ClassScore], count: int) -> tuple[ClassScore, ...]:
    """Return the differences of the first classes after the edits, then of those that were first before them."""
    was, now = ({score.index: score for score in scores} for scores in (before, after))
    shown = dict.fromkeys(score.index for score in (*after[:count], *before[:count]))
    return tuple(_difference(was[index], now[index]) for index in shown)


def _difference(before: ClassScore, after: ClassScore) -> ClassScore:
    numbers = [
        None if one is None or other is None else other - one for one, other in zip(before[2:], after[2:], strict=True)
    ]
    return ClassScore(after.index, after.label, *numbers)
