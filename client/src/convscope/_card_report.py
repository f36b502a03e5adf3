"""What the command line says of a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from convscope._table import format_table, printable

if TYPE_CHECKING:
    from convscope._card import ModelCard


def card_text(card: ModelCard) -> str:
    """Return a model card as text."""
    size = "any size" if card.input.height is None else f"{card.input.height}×{card.input.width}"
    facts = [
        ("model", f"{card.model} {card.version}"),
        ("description", card.description),
        ("network", f"{card.architecture}, {card.parameters:,} parameters"),
        ("runs on", f"{card.device} ({card.engine})"),
        ("input", f"{card.input.channels} channel{'s' * (card.input.channels != 1)}, {size}"),
        ("normalised", _normalisation(card)),
        ("classes", ", ".join(card.classes) or "none"),
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
    layers = [
        [
            layer.name,
            layer.module,
            "×".join(map(str, layer.shape)),
            _pair(layer.stride),
            _pair(layer.receptive_field),
            "–" if layer.receptive_field_start is None else ", ".join(map(str, layer.receptive_field_start)),
            f"{layer.parameters:,}",
            f"{layer.bytes['float32']:,}" if "float32" in layer.bytes else "–",
        ]
        for layer in card.layers
    ]
    header = ["layer", "module", "map", "stride", "sees", "from", "parameters", "bytes (float32)"]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:<{width}}  {printable(value)}" for name, value in facts if value]
    return "\n".join(lines) + "\n\n" + format_table(header, layers, right=(6, 7))


def _normalisation(card: ModelCard) -> str:
    if not card.input.mean:
        return "no"
    return f"mean {_numbers(card.input.mean)}, std {_numbers(card.input.std)}"


def _pair(pair: tuple[int, ...] | None) -> str:
    return "–" if pair is None else "×".join(map(str, pair))


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"
