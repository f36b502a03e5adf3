"""Builds the portrait of a data set: one HTML page without a script, from the result of a survey."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from convscope.commands import read_picture_files

from convscope_lens._page.html import static_html
from convscope_lens._page.page_data import describe_operation, picture_url
from convscope_lens.patches import cut_patch, fetch_inputs
from convscope_lens.surveys import nan_mean

if TYPE_CHECKING:
    from convscope import Client, Layer, ModelCard
    from numpy.typing import NDArray

    from convscope_lens.surveys import StrongCell, Survey, SurveyedLayer

CHANNELS = 12  # Shown with their patches, of each layer.
PATCHES = 1200  # Number for all layers: at 1 to 2 kB each they are most of the page.
PATCH_SIDE = 64  # Pixels on the longer side; larger patches are reduced.
ROWS = 4000  # Total rows of the tables of channels.
CLASS_ROWS = 200
FAILURES = 100  # That are listed.
BINS = 40  # Bins of the histogram of a layer's selectivities.
_SHADES = 10

Tiles = dict[tuple[str, int, int], str]  # By layer, channel and rank: the patch as a data URL.


def portrait(client: Client, result: Survey, *, deadline_s: float | None = None) -> str:
    """Return the result of a survey as one HTML page.

    The files of the pictures that it shows are read again, and the network's input for them is requested.

    Args:
        client: An open client.
        result: The result.
        deadline_s: Deadline of each request, in seconds; None for the client's.

    Returns:
        A self-contained HTML document without a script. Each layer has up to 12 channels with the patches of their
        strongest cells (1,200 patches on the page at most), those first whose selectivity is furthest above chance, and
        a table of its channels (4,000 rows on the page at most).

    Raises:
        ConvscopeError: A request failed.
    """
    card = client.model_card(result.model, result.version, deadline_s=deadline_s)
    per_layer = PATCHES // max(1, result.settings["k"] * len(result.layers))
    ranked = {layer.name: _ranking(layer) for layer in result.layers}
    count = max(1, min(CHANNELS, per_layer))
    shown = {
        layer.name: [channel for channel in ranked[layer.name] if not layer.dead[channel]][:count]
        for layer in result.layers
    }
    tiles = _fetch_tiles(client, card, result, shown, deadline_s)
    title = f"{Path(result.folder).resolve().name} – {result.model}"
    parts = [
        '<a class="skip" href="#channels">Skip to the channels</a>',
        f'<header class="top"><h1>{escape(title)}</h1>{_facts(result, card)}</header>',
        '<main class="tables">',
        _overview(result, card),
        _class_table(result) if result.classes else "",
        '<section id="channels" aria-labelledby="channels-title"><h2 id="channels-title">Channels</h2>',
        f"<p>{_order(result)}</p>",
        *(_layer(result, layer, number, ranked, shown, tiles) for number, layer in enumerate(result.layers)),
        "</section>",
        _conversions(result) if result.converted else "",
        _failures(result) if result.failed else "",
        _method(result),
        "</main>",
    ]
    page = static_html(title, "portrait.css", "\n".join(filter(None, parts)))
    return page.encode("utf-8", "backslashreplace").decode()  # Names of files may hold bytes that are no text.


def _ranking(layer: SurveyedLayer) -> list[int]:
    """Return the channels, the one whose selectivity is furthest above chance first, then by their mean."""
    excess = np.nan_to_num(layer.selectivity - layer.chance, nan=-math.inf)
    return [int(channel) for channel in np.lexsort((-layer.mean, -excess))]


def _fetch_tiles(
    client: Client, card: ModelCard, result: Survey, shown: dict[str, list[int]], deadline_s: float | None
) -> Tiles:
    """Cut the patches of the channels that are shown; those of a file that can no longer be read are missing."""
    uses: dict[tuple[str, int | None], list[tuple[str, int, int, tuple[int, int]]]] = defaultdict(list)
    for layer in result.layers:
        for channel in shown[layer.name]:
            for rank, strong in enumerate(layer.strongest[channel]):
                uses[strong.file, strong.place].append((layer.name, channel, rank, strong.cell))
    pictures = list(uses)

    def files() -> Iterator[tuple[int, bytes]]:
        for number, (path, place) in enumerate(pictures):
            for _, file in islice(read_picture_files([path]), place or 0, (place or 0) + 1):
                if isinstance(file, bytes):
                    yield number, file

    tiles: Tiles = {}
    layers = {layer.name: layer for layer in card.layers}
    inputs = fetch_inputs(
        client, card, files(), model=result.model, version=result.version, deadline_s=deadline_s
    )  # fmt: skip
    for number, explanation in inputs:
        if explanation.error is None:
            for name, channel, rank, cell in uses[pictures[number]]:
                pixels = _cut(explanation.picture, layers[name], cell)
                tiles[name, channel, rank] = picture_url(pixels, PATCH_SIDE)
    return tiles


def _cut(picture: NDArray[np.float32], layer: Layer, cell: tuple[int, int]) -> NDArray[np.float32]:
    """Return what a cell depends on, (C, H, W): the whole picture where the card states no receptive field."""
    if not layer.has_receptive_field:
        return picture
    return cut_patch(picture, layer, cell).pixels.transpose(2, 0, 1)


def _facts(result: Survey, card: ModelCard) -> str:
    channels = sum(len(layer.mean) for layer in result.layers)
    facts = [("pictures", f"{result.pictures:,}"), ("failed", f"{len(result.failed):,}")]
    if result.classes:
        kind = {"folders": "classes (folders)", "predicted": "classes (predicted)"}[result.classes_from]
        facts.append((kind, f"{len(result.classes):,}"))
    if _is_judged(result, card):
        facts.append(("recognised", _share(sum(one.recognised for one in result.classes), result.pictures)))
    facts += [("layers", f"{len(result.layers)}"), ("channels", f"{channels:,}")]
    facts.append(("dead channels", f"{sum(layer.dead.sum() for layer in result.layers):,}"))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    about = f"{result.model} {result.version} on {card.engine}, {card.device}. {card.description}"
    return f'<p class="hint">{escape(about)}</p><dl class="numbers">{items}</dl>'


def _is_judged(result: Survey, card: ModelCard) -> bool:
    """Whether the names of the subfolders are labels of the network."""
    return result.classes_from == "folders" and any(one.label in card.classes for one in result.classes)


def _overview(result: Survey, card: ModelCard) -> str:
    layers = {layer.name: layer for layer in card.layers}
    header = ["layer", "made by", "channels", "a cell sees", "mean", "deviation", "sparsity", "dead"]
    if result.classes:
        header += ["selectivity", "shuffled", "above every shuffle", "channels by selectivity, 0 to 1"]
    rows = []
    for number, layer in enumerate(result.layers):
        field = layers[layer.name].receptive_field
        row = [
            f'<a href="#layer-{number}">{escape(layer.name)}</a>',
            _text(describe_operation(layers[layer.name])),
            f"{len(layer.mean):,}",
            f"{field[0]}×{field[1]}" if field else "–",
            _number(float(layer.mean.mean())),
            _number(float(layer.deviation.mean())),
            _percent(float(layer.sparsity.mean())),
            f"{layer.dead.sum():,}",
        ]
        if result.classes:
            row += [_index(nan_mean(layer.selectivity)), _index(nan_mean(layer.chance))]
            row += [_share(int(layer.selective.sum()), len(layer.mean)), _strip(layer)]
        rows.append(row)
    hint = "Figures are means over the channels of a layer."
    if result.classes:
        hint += (
            " In the last column, blue above the line are the channels by their selectivity, orange below it the same"
            " with the classes shuffled; each half has its own scale, and grey lines are 0.25, 0.5 and 0.75."
        )
    return _section("overview", "Layers", _table(header, rows, "Table of layers", hint=hint, texts=(1, 11)))


def _strip(layer: SurveyedLayer) -> str:
    """Draw the channels of a layer by their selectivity, and below them by that of chance."""
    halves = []
    for name, values, sign in (("real", layer.selectivity, "-"), ("shuffled", layer.chance, "")):
        counts, _ = np.histogram(values[~np.isnan(values)], BINS, (0, 1))
        heights = np.ceil(19 * counts / max(1, counts.max())).astype(int).tolist()
        bars = "".join(f"M{5 * place} 20v{sign}{height}h5V20z" for place, height in enumerate(heights) if height)
        halves.append(f'<path class="{name}" d="{bars}"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {5 * BINS} 40" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="M50 0v40M100 0v40M150 0v40"/>{"".join(halves)}<path class="axis" d="M0 20h200"/></svg>'
    )


def _class_table(result: Survey) -> str:
    """Return the table of classes, with the number of channels that prefer each."""
    chosen = sorted(range(len(result.classes)), key=lambda index: -result.classes[index].pictures)[:CLASS_ROWS]
    counts = np.stack(
        [np.bincount(layer.preferred[layer.selective], minlength=len(result.classes)) for layer in result.layers]
    )
    shares = counts / np.array([[len(layer.mean)] for layer in result.layers])
    largest = max(float(shares.max()), np.finfo(float).tiny)
    rows = []
    for index in sorted(chosen):
        one = result.classes[index]
        row = [escape(one.label), f"{one.pictures:,}"]
        row += [_share(one.recognised, one.pictures)] if result.classes_from == "folders" else []
        for number, share in enumerate(shares[:, index]):
            shade = min(_SHADES - 1, int(_SHADES * share / largest))
            row.append(f'<span class="shade h{shade}">{counts[number, index]}</span>')
        rows.append(row)
    header = ["class", "pictures", *(["recognised"] if result.classes_from == "folders" else [])]
    header += [layer.name for layer in result.layers]
    hint = (
        "Of each layer, the channels that prefer a class and whose selectivity is above that of every shuffle; the"
        f" brighter, the larger the share of the layer’s channels, up to {_percent(largest)}."
    )
    if len(chosen) < len(result.classes):
        hint += f" The {len(chosen)} classes with the most pictures, of {len(result.classes):,}."
    return _section("classes", "Classes", _table(header, rows, "Table of classes", hint=hint))


def _order(result: Survey) -> str:
    first = "Channels whose selectivity is furthest above chance come first, dead ones are left out."
    if not result.classes:
        first = "Channels with the largest mean come first, dead ones are left out."
    return f"{first} A patch is the part of a picture that one of the channel’s strongest cells depends on."


def _layer(
    result: Survey,
    layer: SurveyedLayer,
    number: int,
    ranked: dict[str, list[int]],
    shown: dict[str, list[int]],
    tiles: Tiles,
) -> str:
    channels = shown[layer.name]
    cards = "".join(_channel(result, layer, channel, tiles) for channel in channels)
    rows = ranked[layer.name][: max(16, ROWS // len(result.layers))]
    about = f"{len(channels)} of {len(layer.mean):,} channels, {layer.cells:,} cells each."
    return (
        f'<section id="layer-{number}" class="layer" aria-labelledby="layer-{number}-title">'
        f'<h3 id="layer-{number}-title">{escape(layer.name)}</h3><p class="hint">{about}</p>'
        f'<ul class="channels">{cards}</ul>{_channel_table(result, layer, rows)}</section>'
    )


def _channel(result: Survey, layer: SurveyedLayer, channel: int, tiles: Tiles) -> str:
    cells = layer.strongest[channel]
    lines = []
    if result.classes and not math.isnan(layer.selectivity[channel]):
        label = escape(result.classes[layer.preferred[channel]].label)
        found = _index(layer.selectivity[channel])
        lines.append(f"<b>{label}</b>, selectivity {found}, shuffled {_index(layer.chance[channel])}")
    lines.append(f"mean {_number(layer.mean[channel])}, {_percent(layer.sparsity[channel])} of cells are 0 or less")
    value = f"strongest {_number(cells[0].value)}"
    value += f" to {_number(cells[-1].value)}" if len(cells) > 1 else ""
    if result.classes:
        [(label, count)] = Counter(cell.label for cell in cells).most_common(1)
        value += f", {count} of {len(cells)} {escape(label)}"
    lines.append(value)
    images = "".join(
        _image(tiles[layer.name, channel, rank], cell, result)
        for rank, cell in enumerate(cells)
        if (layer.name, channel, rank) in tiles
    )
    patches = f'<ol class="patches">{images}</ol>' if images else ""
    hints = "".join(f'<p class="hint">{line}</p>' for line in lines)
    return f'<li class="card"><h4>Channel {channel}</h4>{patches}{hints}</li>'


def _image(url: str, cell: StrongCell, result: Survey) -> str:
    place = f"row {cell.cell[0]}, column {cell.cell[1]}"
    name = Path(cell.picture).relative_to(result.folder)
    label = f"{cell.label}, " if cell.label else ""
    alternative = escape(f"{label}value {_number(cell.value)}")
    return f'<li><img src="{url}" alt="{alternative}" title="{escape(str(name))}, {place}"></li>'


def _channel_table(result: Survey, layer: SurveyedLayer, channels: Sequence[int]) -> str:
    header = ["channel", "mean", "deviation", "smallest", "largest", "sparsity"]
    header += ["class", "selectivity", "shuffled", "largest shuffled"] if result.classes else []
    rows = []
    for channel in channels:
        values = [layer.mean, layer.deviation, layer.minimum, layer.maximum]
        row = [f"{channel}", *(_number(value[channel]) for value in values), _percent(layer.sparsity[channel])]
        if layer.dead[channel]:
            row[0] += " (dead)"
        if result.classes:
            indexes = (layer.selectivity, layer.chance, layer.chance_max)
            is_known = not math.isnan(layer.selectivity[channel])
            row.append(escape(result.classes[layer.preferred[channel]].label) if is_known else "–")
            row += [_index(index[channel]) for index in indexes]
        rows.append(row)
    title = f"All {len(rows):,} channels" if len(rows) == len(layer.mean) else f"{len(rows)} of {len(layer.mean):,}"
    table = _table(header, rows, f"Table of the channels of {layer.name}", texts=(6,))
    return f"<details><summary>{title}</summary>{table}</details>"


def _conversions(result: Survey) -> str:
    rows = [[escape(", ".join(notes)), f"{count:,}"] for notes, count in result.converted.items()]
    hint = f"Converted before the network saw them: {sum(result.converted.values()):,} of {result.pictures:,} pictures."
    table = _table(["how", "pictures"], rows, "Table of conversions", hint=hint)
    return _section("converted", "Converted pictures", table)


def _failures(result: Survey) -> str:
    rows = [[_text(picture), escape(error.code), escape(error.message)] for picture, error in result.failed[:FAILURES]]
    hint = f"{len(result.failed):,} pictures failed and are in no figure."
    if len(rows) < len(result.failed):
        hint += f" The first {len(rows)}:"
    table = _table(["picture", "error", "message"], rows, "Table of failed pictures", hint=hint, texts=(1, 2))
    return _section("failed", "Failed pictures", table)


def _method(result: Survey) -> str:
    """Return the definitions of the figures."""
    settings = result.settings
    definitions = [
        ("mean, deviation", "of the cells of a channel over all pictures"),
        ("sparsity", "share of the cells that are 0 or less"),
        ("dead", "all cells of all pictures have the same value; after a ReLU, 0"),
        (
            "strongest cells",
            f"the {settings['k']} cells with the largest values, at most one of each picture",
        ),
    ]  # fmt: skip
    if result.classes:
        definitions += [
            (
                "selectivity",
                "the class selectivity index (μ<sub>max</sub> − μ<sub>rest</sub>) / (μ<sub>max</sub> +"
                " μ<sub>rest</sub>). The activity of a channel for a picture is the mean of its cells; μ<sub>max</sub>"
                " is the largest class mean of it, and μ<sub>rest</sub> the mean of the other class means. 0: equal for"
                " all classes; 1: active for one class only. Undefined (–) where a class mean is negative, or all are"
                " 0. A. S. Morcos et al., “On the importance of single directions for generalization”, ICLR 2018",
            ),
            (
                "shuffled",
                f"the same index with the classes shuffled among the pictures, mean of {settings['shuffles']} shuffles:"
                " what chance gives. The largest of several means is above the rest by chance too. Of channels that"
                f" follow no class, one in {settings['shuffles'] + 1} is above every shuffle",
            ),
        ]
    items = "".join(f"<dt>{name}</dt><dd>{text}.</dd>" for name, text in definitions)
    about = f"Maps were sent as {settings['map_dtype']}. Seed {settings['seed']}."
    return _section("method", "What the figures are", f'<dl class="terms">{items}</dl><p class="hint">{about}</p>')


def _section(identifier: str, title: str, content: str) -> str:
    heading = f'<h2 id="{identifier}-title">{title}</h2>'
    return f'<section id="{identifier}" aria-labelledby="{identifier}-title">{heading}{content}</section>'


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], name: str, *, hint: str = "", texts: Sequence[int] = ()
) -> str:
    """Return a table that scrolls by itself where it is too wide.

    Args:
        header: Headings, text.
        rows: Cells, HTML; the first of each row is its heading.
        name: Name of the table, for screen readers.
        hint: What is to be read first; empty for nothing.
        texts: Columns of words, which are aligned on the left.
    """
    kinds = [' class="text"' if column in texts else "" for column in range(len(header))]
    heads = "".join(f'<th scope="col"{kind}>{escape(text)}' for kind, text in zip(kinds, header, strict=True))
    body = "".join(
        f'<tr><th scope="row">{first}'
        + "".join(f"<td{kind}>{cell}" for kind, cell in zip(kinds[1:], others, strict=True))
        for first, *others in rows
    )
    label = f'aria-label="{escape(name)}"'
    return (
        f'{f"<p>{escape(hint)}</p>" if hint else ""}<div class="scroll" tabindex="0" role="region" {label}>'
        f"<table {label}><thead><tr>{heads}</thead><tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    return escape(text) or "–"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _index(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part / whole)})"
