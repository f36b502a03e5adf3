"""`convscope card`: a model card as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from convscope.commands import format_table, printable

if TYPE_CHECKING:
    from convscope._card import Layer, ModelCard

_COLUMNS = 120  # Of a terminal.
_NONE = "–"


def card_text(card: ModelCard) -> str:
    """Return a model card as text, at most 120 columns wide unless a name is very long.

    The first table describes the operation that makes each layer's map, and the receptive field of its cells: its
    size ("sees"), the distance from cell to cell ("jump"), and its first pixel ("from"). The second table has the
    parameters and multiply-adds of that operation, the parameters of a fully connected layer between the same shapes,
    and the bytes of the map.
    """
    size = "any size" if card.input.height is None else f"{card.input.height}×{card.input.width}"
    facts = [
        ("model", f"{card.model} {card.version}"),
        ("description", card.description),
        ("network", f"{card.architecture}, {card.parameters:,} parameters,"
         f" {_count(card.multiply_adds)} multiply-adds a picture"),
        ("runs on", f"{card.device} ({card.engine})"),
        ("input", f"{card.input.channels} channel{'s' * (card.input.channels != 1)}, {size}"),
        ("normalised", _normalisation(card)),
        ("classes", f"{len(card.classes):,}: {', '.join(card.classes)}" if card.classes else "none"),
        ("limits", f"{card.limits.max_images} pictures a request, {card.limits.max_image_bytes:,} bytes and"
         f" {card.limits.max_image_pixels:,} pixels a picture, {card.limits.max_reply_bytes:,} bytes a reply"),
    ]  # fmt: skip
    if card.training is not None:
        training = card.training
        facts += [
            ("trained", f"on {training.data}: {training.train_pictures:,} pictures, {training.epochs} epochs,"
             f" {training.seconds:.0f} s on {training.machine}"),
            ("accuracy", f"train {_percent(training.train_accuracy)}, test {_percent(training.test_accuracy)}"
             f" (n = {training.test_pictures:,})"),
        ]  # fmt: skip
    width = max(len(name) for name, _ in facts) + 2
    lines = [_fact(name.ljust(width), printable(value)) for name, value in facts if value]
    return "\n".join(lines) + "\n\n" + _flow(card) + "\n\n" + _costs(card)


def _flow(card: ModelCard) -> str:
    """Return the table of operations and receptive fields."""
    header = ["layer", "made by", "in", "out", "kernel", "stride", "padding", "dilation", "sees", "jump", "from"]
    return format_table(header, [_flow_row(layer) for layer in card.layers])


def _flow_row(layer: Layer) -> list[str]:
    made_by = layer.operation or _NONE
    if layer.groups > 1:
        made_by += f", {layer.groups} groups"
    return [
        layer.name,
        made_by,
        _product(layer.input_shape),
        _product(layer.shape),
        *map(_product, (layer.kernel, layer.step, layer.padding, layer.dilation)),
        _product(layer.receptive_field),
        _product(layer.stride),
        _NONE if layer.receptive_field_start is None else ", ".join(map(str, layer.receptive_field_start)),
    ]


def _costs(card: ModelCard) -> str:
    """Return the table of parameters, multiply-adds and bytes."""
    header = ["layer", "node", "parameters", "fully connected", "multiply-adds", "float32", "float16", "uint8 bytes"]
    rows = [
        [
            layer.name,
            layer.module,
            *map(_count, (layer.parameters, layer.dense_parameters, layer.multiply_adds)),
            *(_count(layer.bytes.get(dtype, 0)) for dtype in ("float32", "float16", "uint8")),
        ]
        for layer in card.layers
    ]
    return format_table(header, rows, right=range(2, 8))


def _fact(name: str, value: str) -> str:
    """Return a fact, wrapped to the width of the terminal, in three lines at most."""
    lines = textwrap.wrap(value, _COLUMNS - len(name), max_lines=3, placeholder=" ...", break_on_hyphens=False)
    return name + ("\n" + " " * len(name)).join(lines)


def _normalisation(card: ModelCard) -> str:
    if not card.input.mean:
        return "no"
    return f"mean {_numbers(card.input.mean)}, std {_numbers(card.input.std)}"


def _product(numbers: tuple[int, ...] | None) -> str:
    return "×".join(map(str, numbers)) if numbers else _NONE


def _count(number: int) -> str:
    return f"{number:,}" if number else _NONE


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{share:.2%}"
