"""Interventions: how an answer changes if channels are switched off, or maps replaced by those of another picture.

    from convscope import Client
    from convscope_lens import interventions

    with Client("http://localhost:8080") as client:
        print(interventions.ablate(client, "cat.png", model="cifar", layer="conv2").format_table())
        print(interventions.trace(client, "cat.png", "dog.png", model="cifar").format_table())

The service edits the maps; see `Edit` of the client. Many edited copies of a picture travel in one request.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from convscope import ConvscopeError, Edit, encode_pictures
from convscope.commands import format_table, printable, raise_if_of_service

if TYPE_CHECKING:
    from convscope import ClassScore, Client, Layer, ModelCard, Prediction
    from convscope.typing import Picture
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["Ablation", "Trace", "ablate", "trace"]

BATCH = 32  # Pictures per request: one that is edited costs a forward pass, and others wait for the worker meanwhile.
SLOPE_STEP = 1 / 64  # How much of a channel is taken away to measure a slope; a power of two, so that it is exact.

Region = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Ablation:
    """How a number changes when each channel of a layer is set to zero.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        layer: Name of the layer.
        measure: What changes: `logit` of the class, `value` of the output, or, of a model without scores, `relative
            distance`: minus the distance of the last layer's map from the unedited one, as a share of that.
        targets: The class of each picture: index and label; empty for a model without scores.
        changes: (N, C), float64: the number with the channel at zero minus the number without edits, of each picture.
        slopes: (N, C), float64: gradient × activation, summed over the cells of the channel: by how much the number
            grows with the channel, per whole channel. None if it was not measured.
    """

    model: str
    version: str
    layer: str
    measure: Literal["logit", "value", "relative distance"]
    targets: tuple[tuple[int, str], ...]
    changes: NDArray[np.float64]
    slopes: NDArray[np.float64] | None = None

    @property
    def mean_changes(self) -> NDArray[np.float64]:
        """(C,), float64: the mean over the pictures."""
        return np.asarray(self.changes.mean(axis=0))

    @property
    def ranking(self) -> list[int]:
        """The channels, the one whose absence lowers the number most first."""
        return [int(channel) for channel in np.argsort(self.mean_changes, kind="stable")]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation, -1..1, of the falls with gradient × activation, their first-order prediction.

        None if slopes were not measured; NaN if all falls or all slopes are equal.
        """
        if self.slopes is None:
            return None
        from scipy.stats import ConstantInputWarning, spearmanr  # Imported here: scipy.stats is slow to import.

        with warnings.catch_warnings(action="ignore", category=ConstantInputWarning):
            return float(spearmanr(-self.mean_changes, self.slopes.mean(axis=0)).statistic)

    def format_table(self, rows: int = 20) -> str:
        """Format the ranking as text.

        Args:
            rows: Channels to show at most.
        """
        labels = list(dict.fromkeys(label for _, label in self.targets))
        of_class = f" of {', '.join(labels[:3])}{', ...' * (len(labels) > 3)}" if labels else ""
        count = len(self.changes)
        title = f"{self.model} {self.version}, {self.layer}: change of the {self.measure}{of_class} without a channel"
        header = ["rank", "channel", "change", *([] if count == 1 else ["deviation"])]
        header += [] if self.slopes is None else ["gradient × activation"]
        lines = []
        for rank, channel in enumerate(self.ranking[:rows], 1):
            line = [str(rank), str(channel), f"{self.mean_changes[channel]:+.4f}"]
            line += [] if count == 1 else [f"{self.changes[:, channel].std():.4f}"]
            line += [] if self.slopes is None else [f"{self.slopes[:, channel].mean():+.4f}"]
            lines.append(line)
        parts = [printable(f"{title}, mean of {count} pictures" if count > 1 else title)]
        parts.append(format_table(header, lines, right_aligned=range(len(header))))
        if self.changes.shape[1] > rows:
            parts.append(f"{self.changes.shape[1] - rows} more channels")
        if self.rank_correlation is not None:
            parts.append(f"rank correlation of the falls with gradient × activation: {self.rank_correlation:.3f}")
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        correlation = self.rank_correlation
        return {
            "model": self.model,
            "version": self.version,
            "layer": self.layer,
            "measure": self.measure,
            "targets": [{"index": index, "label": label} for index, label in self.targets],
            "ranking": self.ranking,
            "mean_changes": self.mean_changes.tolist(),
            "changes": self.changes.tolist(),
            "slopes": None if self.slopes is None else self.slopes.tolist(),
            "rank_correlation": None if correlation is None or np.isnan(correlation) else correlation,
        }

    def figure(self, bars: int = 32) -> Figure:
        """Draw the ranking as bars, with the deviation over the pictures.

        Args:
            bars: Channels to show at most.

        Returns:
            A matplotlib figure, not registered with pyplot.
        """
        from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.

        chosen = self.ranking[:bars]
        title = f"{self.model} {self.version}, {self.layer}: {self.measure} without a channel, n = {len(self.changes)}"
        figure = new_figure(title, width_inches=max(6.4, 0.25 * len(chosen)), height_inches=3.6)
        ax = figure.subplots()
        deviations = self.changes[:, chosen].std(axis=0) if len(self.changes) > 1 else None
        ax.bar(range(len(chosen)), self.mean_changes[chosen], yerr=deviations, color="tab:blue")
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_xticks(range(len(chosen)), [str(channel) for channel in chosen], rotation=90, fontsize="small")
        ax.set(xlabel="channel", ylabel=f"change of the {self.measure}")
        return figure


@dataclass(frozen=True, eq=False)
class Trace:
    """Parts of maps that restore the score of one picture in the run of another.

    A share of 1 means that the score is that of the clean picture, 0 that it is that of the corrupt one; it may
    be below 0 or above 1.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        target: Index of the class.
        label: Label of the class.
        clean: Logit (or value) of the class for the clean picture.
        corrupt: The same for the corrupt picture.
        regions: By layer, the regions of its map in rows and columns: (top, left, bottom, right) in cells.
        restored: By layer, (rows, columns), float64: the share restored when all channels of that region are the clean
            picture's.
        whole: By layer, the share restored when the whole map is.
    """

    model: str
    version: str
    target: int
    label: str
    clean: float
    corrupt: float
    regions: dict[str, list[list[Region]]]
    restored: dict[str, NDArray[np.float64]]
    whole: dict[str, float]

    def format_table(self) -> str:
        """Format the layers as text: the share that the whole map and the best region restore."""
        rows = []
        for layer, shares in self.restored.items():
            row, column = np.unravel_index(int(np.argmax(shares)), shares.shape)
            top, left, bottom, right = self.regions[layer][row][column]
            place = f"rows {top} to {bottom - 1}, columns {left} to {right - 1}"
            rows.append([layer, f"{self.whole[layer]:.3f}", f"{shares.max():.3f}", place])
        title = (
            f"{self.model} {self.version}: share of {self.label} restored, {self.corrupt:.3f} to {self.clean:.3f}, by"
            " maps of the clean picture"
        )
        table = format_table(["layer", "whole map", "best region", "cells"], rows, right_aligned=(1, 2))
        return f"{printable(title)}\n\n{table}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return {
            "model": self.model,
            "version": self.version,
            "target": self.target,
            "label": self.label,
            "clean": self.clean,
            "corrupt": self.corrupt,
            "layers": {
                layer: {"whole": self.whole[layer], "restored": shares.tolist(), "regions": self.regions[layer]}
                for layer, shares in self.restored.items()
            },
        }

    def figure(self) -> Figure:
        """Draw a heat map for each layer: red restores the answer, blue takes it further away.

        Returns:
            A matplotlib figure, not registered with pyplot.
        """
        from convscope.figures import new_figure  # Imported here: matplotlib is slow to import.
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        columns = min(4, len(self.restored))
        rows = -(-len(self.restored) // columns)
        title = f"{self.model} {self.version}: share of {self.label} restored by the clean picture's maps"
        width = max(2.6 * columns + 0.8, 0.09 * len(title))
        figure = new_figure(title, width_inches=width, height_inches=2.8 * rows + 0.4)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        largest = max(float(np.abs(shares).max()) for shares in self.restored.values()) or 1.0
        for ax in axes[len(self.restored) :]:
            ax.set_axis_off()
        for ax, (layer, shares) in zip(axes, self.restored.items(), strict=False):
            ax.set_xticks([])
            ax.set_yticks([])
            ax.imshow(shares, cmap="bwr", vmin=-largest, vmax=largest, interpolation="nearest")
            ax.set_title(f"{layer}\nwhole map {self.whole[layer]:.2f}", fontsize="small")
        figure.colorbar(
            ScalarMappable(Normalize(-largest, largest), "bwr"), ax=axes, shrink=0.8, label="share restored"
        )
        return figure


def ablate(
    client: Client,
    pictures: Picture | Iterable[Picture],
    *,
    model: str,
    layer: str,
    target: int | None = None,
    slopes: bool = False,
    version: str | None = None,
    deadline_s: float | None = None,
    on_error: Callable[[int, ConvscopeError], None] | None = None,
) -> Ablation:
    """Measure how the score of a class changes when each channel of a layer is set to zero.

    A picture takes a forward pass per channel, and one per request.

    Args:
        client: An open client.
        pictures: One picture or several, as in `Client.predict`.
        model: Name of the model.
        layer: Name of the layer.
        target: Index of the class; None for each picture's most probable one.
        slopes: Whether to measure gradient × activation too, from the score with 1/64 of the channel taken away, which
            takes twice as many forward passes.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of each request, in seconds; None for the client's.
        on_error: Called with the index and the error of a failed picture; None to raise the error. An error of the
            service is raised, with a note that says how many pictures were measured.

    Returns:
        The change of the score by picture and channel, (N, C), and the slopes if measured.

    Raises:
        ConvscopeError: A picture or a request failed, there is no such layer (`UnknownLayer`), or the service has no
            edits.
        OSError: A path cannot be read.
        ValueError: There is no picture, or no such class. If every picture failed, the error of the last one is raised.
    """
    card = client.model_card(model, version, deadline_s=deadline_s)
    count = card.layer(layer).shape[0]
    _check_target(card, target)
    edits = [Edit(layer=layer, operation="zero", channels=[channel]) for channel in range(count)]
    if slopes:
        less = 1 - SLOPE_STEP
        edits += [Edit(layer=layer, operation="scale", value=less, channels=[channel]) for channel in range(count)]
    measured: list[NDArray[np.float64]] = []
    failure: ConvscopeError | None = None
    targets = []
    last = None if card.classes else card.layers[-1].name
    options: dict[str, Any] = {"model": model, "version": version, "deadline_s": deadline_s}
    files = encode_pictures(pictures).files
    for index, file in enumerate(files):
        try:
            found, chosen = _changes(client, card, file, edits, target, last, options)
        except ConvscopeError as error:
            if on_error is None:
                raise
            so_far = f"{len(measured)} of {len(files)} pictures were measured before"
            raise_if_of_service(error, lambda: client.model_card(model, version), so_far)
            on_error(index, error)
            failure = error
            continue
        measured.append(found)
        targets += [(chosen.index, chosen.label)] if chosen else []
    if not measured:
        raise failure or ValueError("there is no picture to measure")
    changes = np.stack(measured).reshape(len(measured), -1, count)
    return Ablation(
        card.model,
        card.version,
        layer,
        "relative distance" if last else "value" if card.scores == "value" else "logit",
        tuple(targets),
        changes[:, 0],
        -changes[:, 1] / SLOPE_STEP if slopes else None,
    )


def trace(
    client: Client,
    clean: Picture,
    corrupt: Picture,
    *,
    model: str,
    layers: str | Iterable[str] = "all",
    target: int | None = None,
    grid: int = 8,
    version: str | None = None,
    deadline_s: float | None = None,
) -> Trace:
    """Replace regions of the maps of one picture by those of another, and measure how far its score is restored.

    Causal tracing, or activation patching: K. Meng et al., "Locating and Editing Factual Associations in GPT" (NeurIPS
    2022), section 2, with another picture in place of noise.

    Args:
        client: An open client.
        clean: The picture whose answer is to be restored.
        corrupt: The picture whose maps are replaced, of the same size where the network takes any.
        model: Name of the model.
        layers: Names, one name, or `"all"`.
        target: Index of the class; None for the most probable one of the clean picture.
        grid: Rows and columns of regions per map at most; a map with fewer cells has a region for each.
        version: Version of the model; None for the server's default.
        deadline_s: Deadline of each request, in seconds; None for the client's.

    Returns:
        The share of the score restored, by layer: for each region (rows, columns), and for the whole map.

    Raises:
        ConvscopeError: A picture or a request failed, there is no such layer (`UnknownLayer`), or the service has no
            edits.
        OSError: A path cannot be read.
        ValueError: The model has no scores, the pictures have the same score, or an option is out of range.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1, not {grid}")
    card = client.model_card(model, version, deadline_s=deadline_s)
    if not card.classes:
        raise ValueError(f"{model} has no scores that could be restored")
    _check_target(card, target)
    files = [*encode_pictures([clean]).files, *encode_pictures([corrupt]).files]
    if len(files) != 2:
        raise ValueError("clean and corrupt must be one picture each")
    options: dict[str, Any] = {"model": model, "version": version, "deadline_s": deadline_s}
    sizes = _map_sizes(client, card, files[0], card.select_layers(layers), options)
    regions = {layer: _regions(*size, grid) for layer, size in sizes.items()}
    if not regions:
        raise ValueError("none of these layers has a map with rows and columns")
    edits = [
        Edit(layer=layer, operation="patch", value=0, region=region)
        for layer, size in sizes.items()
        for region in [(0, 0, *size), *(region for row in regions[layer] for region in row)]
    ]
    results = list(_edited(client, card, files, edits, options))
    index = results[0][0].top[0].index if target is None else target
    clean_score, corrupt_score = (_score(prediction, index) for prediction in results[0][:2])
    if abs(clean_score - corrupt_score) < 1e-4 * max(abs(clean_score), abs(corrupt_score)):
        raise ValueError(f"both pictures have the same score of {card.classes[index]}: there is nothing to restore")
    scores = np.array([_score(prediction, index) for predictions in results for prediction in predictions[2:]])
    shares = iter(((scores - corrupt_score) / (clean_score - corrupt_score)).tolist())
    restored, wholes = {}, {}
    for layer, rows in regions.items():
        wholes[layer] = next(shares)
        restored[layer] = np.array([[next(shares) for _ in row] for row in rows])
    return Trace(
        card.model, card.version, index, card.classes[index], clean_score, corrupt_score, regions, restored, wholes
    )


def _changes(
    client: Client,
    card: ModelCard,
    file: bytes,
    edits: Sequence[Edit],
    target: int | None,
    last: str | None,
    options: dict[str, Any],
) -> tuple[NDArray[np.float64], ClassScore | None]:
    """Return what each edit changes for one picture, and the class whose score it is of."""
    changes: list[float] = []
    chosen = None
    more = {} if last is None else {"layers": [last]}
    for predictions in _edited(client, card, [file], edits, options | more):
        unedited, *edited = predictions
        if last is None:
            chosen = unedited.top[0] if target is None else next(one for one in unedited.top if one.index == target)
            before = _score(unedited, chosen.index)
            changes += [_score(one, chosen.index) - before for one in edited]
        else:
            reference = unedited.maps[last].astype(np.float64)
            norm = max(float(np.linalg.norm(reference)), np.finfo(np.float64).tiny)
            changes += [-float(np.linalg.norm(one.maps[last] - reference)) / norm for one in edited]
    return np.array(changes), chosen


def _edited(
    client: Client, card: ModelCard, files: list[bytes], edits: Sequence[Edit], options: dict[str, Any]
) -> Iterator[list[Prediction]]:
    """Predict for the last of some pictures under each of many edits.

    Yields:
        For each request the predictions of `files` without edits, and then those of the last of them, each with the
        next edit.
    """
    room = BATCH
    if options.get("layers"):  # Their maps come along: whole ones of unknown size for a network that takes any picture.
        room = min(room, card.pictures_per_request(card.layer(options["layers"][0]).bytes.get("float32", 0)))
    room = max(1, min(room, card.limits.max_images) - len(files))
    for start in range(0, len(edits), room):
        some = edits[start : start + room]
        numbered = [dataclasses.replace(edit, picture=len(files) + place) for place, edit in enumerate(some)]
        sent = [*files, *(files[-1] for _ in some)]
        predictions = client.predict(sent, edits=numbered, top_k=0, **options)
        for prediction in predictions:
            if prediction.error is not None:
                raise prediction.error
        yield predictions


def _map_sizes(
    client: Client, card: ModelCard, file: bytes, layers: Sequence[Layer], options: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    """Return height and width of the layers' maps; those of a network of any size depend on the picture."""
    names = [layer.name for layer in layers if len(layer.shape) == 3]
    if card.input.height is not None:
        return {layer.name: (layer.shape[1], layer.shape[2]) for layer in layers if layer.name in names}
    [prediction] = client.predict([file], layers=names, channels=[0], top_k=1, **options)
    return {name: (prediction.maps[name].shape[1], prediction.maps[name].shape[2]) for name in names}


def _regions(height: int, width: int, grid: int) -> list[list[Region]]:
    """Return the regions that a map is cut into, in rows and columns."""
    rows, columns = min(height, grid), min(width, grid)
    tops = [row * height // rows for row in range(rows + 1)]
    lefts = [column * width // columns for column in range(columns + 1)]
    return [
        [(tops[row], lefts[column], tops[row + 1], lefts[column + 1]) for column in range(columns)]
        for row in range(rows)
    ]


def _score(prediction: Prediction, target: int) -> float:
    """Return the logit of a class, or the value of a number."""
    score = next(score for score in prediction.top if score.index == target)
    return score.logit if score.value is None else score.value


def _check_target(card: ModelCard, target: int | None) -> None:
    if target is not None and not 0 <= target < len(card.classes):
        raise ValueError(f"target is {target}; {card.model} has {len(card.classes)} classes")
