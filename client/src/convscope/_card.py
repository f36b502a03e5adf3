"""Data classes of the model card, and the card as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, TypeVar

from convscope._exceptions import UnknownLayer
from convscope.commands import LAYER_HEADINGS, format_field, format_table, printable, terminal_width

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Index = TypeVar("Index", int, "NDArray[np.int_]")

_REPLY_OVERHEAD_BYTES = 4096  # Per picture, besides maps and scores.
_SCORE_BYTES = 64  # Per class: index, probability, logit and label.

_WIDTH = 120  # Width of the fields of a formatted card, in columns.
_CHARACTERS = 360  # Approximate length of such a field in a narrow terminal.
_MISSING = "–"
_OUTPUTS = {
    "softmax": "scores of mutually exclusive classes (softmax)",
    "sigmoid": "multi-label scores (sigmoid)",
    "value": "regression outputs (value)",
    "none": "maps alone (none)",
}


@dataclass(frozen=True)
class Input:
    """The network's input; the service converts pictures to it.

    Attributes:
        channels: 1 for grey, 3 for colour.
        height: Height in pixels; None for any size: pictures are then not resized.
        width: Width in pixels; None for any size.
        mean: Subtracted from the values (0..1) of each channel; empty for no normalisation.
        std: Divisor of each channel after that; empty for no normalisation.
        resize: What a picture is resized to before its middle, (height, width), is cut out: the length of the shorter
            side, or (H, W). Empty: pictures are resized to (height, width), without keeping the aspect ratio.
        interpolation: `bilinear`, `bicubic`, `nearest`, `lanczos`, `box` or `hamming`; empty if pictures are not
            resized.
        antialias: Whether resizing is antialiased.
        bgr: Whether the network takes BGR. `mean` and `std` are in its order; pictures are sent as RGB.
        fit: How (H, W) in `resize` is met: empty for exactly; `cover` and `contain` keep the aspect ratio and make the
            picture at least, or at most, that size.
        fill: Levels 0..255 of each channel where the resized picture is smaller than the network; empty for black.
    """

    channels: int
    height: int | None
    width: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, ...] = ()
    interpolation: str = "bilinear"
    antialias: bool = True
    bgr: bool = False
    fit: str = ""
    fill: tuple[int, ...] = ()

    def original_box(
        self, box: tuple[float, float, float, float], picture_size: tuple[int, int]
    ) -> tuple[float, float, float, float]:
        """Return where a box in pixels of the network's input lies in the original picture.

        The edges of input pixels are mapped; the resizing filter uses a few original pixels more around them. For a
        cell of a layer, pass `Layer.receptive_field_box(row, column)`.

        Args:
            box: (top, left, bottom, right) in pixels of the network's input, bottom and right exclusive.
            picture_size: (H, W) of the original picture, rotated according to its EXIF orientation. A float32 array
                of the network's size is not resized; its boxes are their own.

        Returns:
            (top, left, bottom, right) in pixels of the original picture, bottom and right exclusive; it may extend past
            the picture where the box lies in padding.

        Raises:
            ValueError: `picture_size` is not the size of a picture that the service accepts.
        """
        height, width = picture_size
        resized = self._resized_size(height, width) if min(picture_size) > 0 else (0, 0)
        if min(resized) < 1:
            raise ValueError(f"the service cannot resize a picture of {height}×{width} pixels")
        offsets = (0, 0)
        if self.height is not None and self.width is not None:  # Rounded as torchvision's CenterCrop does.
            offsets = _offset(resized[0], self.height), _offset(resized[1], self.width)
        y_scale, x_scale = height / resized[0], width / resized[1]
        top, left, bottom, right = box
        return (
            (top + offsets[0]) * y_scale,
            (left + offsets[1]) * x_scale,
            (bottom + offsets[0]) * y_scale,
            (right + offsets[1]) * x_scale,
        )

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (H, W) of a picture after resizing, rounded as torchvision's Resize and timm's ResizeKeepRatio do."""
        if len(self.resize) == 1:
            [short] = self.resize
            return (int(short * height / width), short) if width <= height else (short, int(short * width / height))
        if len(self.resize) == 2 and self.fit:
            ratios = height / self.resize[0], width / self.resize[1]
            ratio = min(ratios) if self.fit == "cover" else max(ratios)
            return round(height / ratio), round(width / ratio)
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        return self.height or height, self.width or width


def _offset(resized: int, size: int) -> int:
    """Return the first row or column of the middle; negative where the picture is padded."""
    return round((resized - size) / 2) if resized >= size else -((size - resized) // 2)


@dataclass(frozen=True)
class Source:
    """A layer, or the picture, that feeds a layer or the scores with no other published layer between.

    Several paths may lead there: in a residual block one passes convolutions and one passes none.

    Attributes:
        layer: Name of the layer; empty for the picture.
        fewest: Convolutions and linear layers on the path with the fewest of them, the fed layer's own included.
        most: Convolutions and linear layers on the path with the most of them.
    """

    layer: str
    fewest: int
    most: int


@dataclass(frozen=True)
class Layer:
    """A layer whose map can be requested.

    The map:

    Attributes:
        name: Public name, for `layers=`.
        module: Graph node of the network.
        shape: (C, h, w), for the model's input size.
        stride: Total stride from input to map: input pixels per cell, (y, x); None if undefined.
        receptive_field: Size of a cell's receptive field in input pixels, (height, width); None if undefined.
        receptive_field_start: First input pixel of the receptive field of cell (0, 0), (y, x), negative in the padding;
            None if undefined.
        bytes: Bytes of the whole map, by dtype name.
        layout: How the network itself holds it, from which the service turns it to `shape`: empty for (C, h, w), else
            "channels_last", "tokens" (a grid of patches), "extra_tokens" (class token, registers: (C, n, 1)),
            "plane" or "vector".
        sources: Sources of the layer; empty if the network cannot be traced, or if the service is too old to report it.

    All convolutions and linear layers that compute it from its sources, in a residual block those of all branches:

    Attributes:
        parameters: Number of weights and biases; those that are used several times count once.
        multiply_adds: Multiply-adds for one picture; one multiply-add counts as one.

    The last one of them:

    Attributes:
        operation: `Conv2d`, `Linear`, ...; empty if there is none.
        input_shape: (C, h, w) of its input; empty if there is none.
        kernel: Kernel size, (height, width); empty for a linear layer, as are the next three.
        step: The operation's own stride, in cells of its input, (y, x).
        padding: Cells added before the first one, (y, x).
        dilation: Distance between the kernel's elements, in cells of its input, (y, x).
        groups: Groups of channels; 0 for a linear layer.
        dense_parameters: Weights and biases of a fully connected layer between the same shapes.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    receptive_field: tuple[int, ...] | None
    receptive_field_start: tuple[int, ...] | None
    parameters: int
    bytes: dict[str, int]
    input_shape: tuple[int, ...] = ()
    operation: str = ""
    kernel: tuple[int, ...] = ()
    step: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 0
    multiply_adds: int = 0
    dense_parameters: int = 0
    layout: str = ""
    sources: tuple[Source, ...] = ()

    @property
    def has_receptive_field(self) -> bool:
        """Whether the receptive field of the map's cells is known."""
        return None not in (self.stride, self.receptive_field, self.receptive_field_start)

    def receptive_field_box(self, row: Index, column: Index) -> tuple[Index, Index, Index, Index]:
        """Return the receptive field of a cell in pixels of the network's input; it may extend past the picture.

        Args:
            row: Row of the cell; or rows, an integer array.
            column: Column of the cell; or columns, an integer array.

        Returns:
            (top, left, bottom, right), bottom and right exclusive; arrays for arrays.

        Raises:
            ValueError: The model card does not state the receptive field.
        """
        if self.stride is None or self.receptive_field is None or self.receptive_field_start is None:
            raise ValueError(f"the model card does not state the receptive field of layer {self.name!r}")
        top = self.receptive_field_start[0] + self.stride[0] * row
        left = self.receptive_field_start[1] + self.stride[1] * column
        return top, left, top + self.receptive_field[0], left + self.receptive_field[1]


@dataclass(frozen=True)
class Training:
    """How the weights were trained.

    Attributes:
        data: Name of the data set.
        train_pictures: Number of training pictures.
        test_pictures: Number of test pictures.
        epochs: Passes over the training data.
        train_accuracy: 0..1; None if not measured.
        test_accuracy: 0..1; None if not measured.
        seconds: Training time in seconds.
        machine: Hardware used for training.
        versions: Versions of the libraries, by name.
    """

    data: str
    train_pictures: int
    test_pictures: int
    epochs: int
    train_accuracy: float | None
    test_accuracy: float | None
    seconds: float
    machine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Limits:
    """The limits of a request and of a reply.

    Attributes:
        max_images: Pictures per request.
        max_image_bytes: Bytes per picture file.
        max_image_pixels: Pixels per picture.
        max_reply_bytes: Bytes per reply.
    """

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_reply_bytes: int


@dataclass(frozen=True)
class ModelCard:
    """Description of a served model.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        description: Human-readable description.
        architecture: Class of the network, `module:Class`.
        engine: What runs the network, such as `torch-2.15.0`.
        device: `cpu` or `cuda:0`.
        classes: Labels in the order of their indexes; empty for a model without classes.
        input: Size, channels and normalisation of the network's input.
        layers: Published layers, in the order of the forward pass.
        parameters: Number of parameters of the network.
        training: None if the network was not trained.
        limits: Limits of a request and of a reply.
        multiply_adds: Multiply-adds of the network for one picture; 0 if the service is too old to report it.
        explanations: Methods of `explain` that suit the network; empty if the service is too old to report it.
        scores: What the network's outputs mean: "softmax", mutually exclusive classes; "sigmoid", multi-label;
            "value", regression outputs that `classes` names; "none". Empty if the service is too old to report it.
        edits: Operations of `Edit` that can be requested; empty if the service has no torch, or is too old for edits.
        sources: What feeds the scores; empty without scores, and as for a layer.
    """

    model: str
    version: str
    description: str
    architecture: str
    engine: str
    device: str
    classes: tuple[str, ...]
    input: Input
    layers: tuple[Layer, ...]
    parameters: int
    training: Training | None
    limits: Limits
    multiply_adds: int = 0
    explanations: tuple[str, ...] = ()
    scores: str = ""
    sources: tuple[Source, ...] = ()
    edits: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: what `convscope card` prints."""
        return f"<pre>{escape(format_card(self))}</pre>"

    def layer(self, name: str) -> Layer:
        """Return the layer of this name.

        Args:
            name: Public name of the layer.

        Returns:
            The layer.

        Raises:
            UnknownLayer: The model has no such layer; the message lists its layers.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers)
        raise UnknownLayer(f"{self.model} has no layer {name!r}; layers: {names}")

    def select_layers(self, layers: str | Iterable[str]) -> list[Layer]:
        """Return some layers, each once, in the order of the forward pass.

        Args:
            layers: Names, one name, or `"all"`, as in `Client.predict`.

        Returns:
            The layers.

        Raises:
            UnknownLayer: The model has no layer of one of the names; the message lists its layers.
        """
        names = [layers] if isinstance(layers, str) else list(layers)
        selected = {self.layer(name).name for name in names if name != "all"}
        return [layer for layer in self.layers if "all" in names or layer.name in selected]

    def pictures_per_request(self, reply_bytes: int = 0) -> int:
        """Return how many pictures fit into one request, and their results into its reply.

        Args:
            reply_bytes: Bytes of the arrays in the reply, per picture; 0 for scores only.

        Returns:
            At least 1; 1 for arrays from a network that accepts any size, as their bytes are not known beforehand.
        """
        if not reply_bytes:
            return max(1, self.limits.max_images)
        if self.input.height is None:
            return 1
        total_bytes = reply_bytes + _REPLY_OVERHEAD_BYTES + _SCORE_BYTES * len(self.classes)
        return max(1, min(self.limits.max_images, self.limits.max_reply_bytes // total_bytes))


def format_card(card: ModelCard) -> str:
    """Format a model card as text, as wide as the terminal, at most 120 columns unless a name is very long.

    The first table lists the operation behind each map, and the receptive field of its cells: size, stride and first
    pixel. The second lists parameters and multiply-adds of all operations since the layer before, the parameters of a
    dense layer in place of the last one, and the bytes of the map.
    """
    fields = [
        ("model", f"{card.model} {card.version}"),
        ("description", card.description),
        ("network", f"{card.architecture}, {card.parameters:,} parameters,"
         f" {_count(card.multiply_adds)} multiply-adds per picture"),
        ("runs on", f"{card.device} ({card.engine})"),
        ("input", f"{card.input.channels} channel{'s' * (card.input.channels != 1)}"
         f"{', BGR' * card.input.bgr}, {format_size(card.input)}"),
        ("pictures", _recipe(card.input)),
        ("normalisation", _normalisation(card)),
        ("classes", f"{len(card.classes):,}: {', '.join(card.classes)}" if card.classes else "none"),
        ("outputs", _OUTPUTS.get(card.scores, card.scores)),
        ("limits", f"{card.limits.max_images} pictures per request, {card.limits.max_image_bytes:,} bytes and"
         f" {card.limits.max_image_pixels:,} pixels per picture, {card.limits.max_reply_bytes:,} bytes per reply"),
    ]  # fmt: skip
    if card.training is not None:
        training = card.training
        fields += [
            ("trained", f"on {training.data}: {training.train_pictures:,} pictures, {training.epochs} epochs,"
             f" {training.seconds:.0f} s on {training.machine}"),
            ("accuracy", f"train {_percent(training.train_accuracy)}, test {_percent(training.test_accuracy)}"
             f" (n = {training.test_pictures:,})"),
        ]  # fmt: skip
    width = max(len(name) for name, _ in fields) + 2
    columns = min(_WIDTH, terminal_width())
    max_lines = max(3, _CHARACTERS // columns)
    lines = [
        format_field(name.ljust(width), printable(value), width=columns, max_lines=max_lines)
        for name, value in fields
        if value
    ]
    return "\n".join(lines) + "\n\n" + _operations_table(card) + "\n\n" + _cost_table(card)


def _operations_table(card: ModelCard) -> str:
    """Return the table of operations and receptive fields; without groups if there is only one everywhere."""
    headings = list(LAYER_HEADINGS.values())
    table = [["layer", *headings[: headings.index("parameters")]], *map(_operations_row, card.layers)]
    if all(layer.groups <= 1 for layer in card.layers):
        groups = table[0].index(LAYER_HEADINGS["groups"])
        table = [row[:groups] + row[groups + 1 :] for row in table]
    return format_table(table[0], table[1:])


def _operations_row(layer: Layer) -> list[str]:
    start = layer.receptive_field_start
    return [
        layer.name,
        layer.operation or _MISSING,
        _product(layer.input_shape),
        _product(layer.shape),
        *map(_product, (layer.kernel, layer.step, layer.padding, layer.dilation)),
        _count(layer.groups),
        _product(layer.receptive_field),
        _product(layer.stride),
        _MISSING if start is None else ", ".join(map(str, start)),
    ]


def _cost_table(card: ModelCard) -> str:
    """Return the table of parameters, multiply-adds and bytes."""
    headings = list(LAYER_HEADINGS.values())
    header = ["layer", "node", *headings[headings.index("parameters") :], "float16", "uint8"]
    rows = [
        [
            layer.name,
            layer.module,
            *map(_count, (layer.parameters, layer.dense_parameters, layer.multiply_adds)),
            *(_count(layer.bytes.get(dtype, 0)) for dtype in ("float32", "float16", "uint8")),
        ]
        for layer in card.layers
    ]
    return format_table(header, rows, right_aligned=range(2, 8))


def format_size(input_spec: Input) -> str:
    """Return the height and width of a network's input."""
    return "any size" if input_spec.height is None else _product((input_spec.height, input_spec.width or 0))


def _normalisation(card: ModelCard) -> str:
    if not card.input.mean:
        return "none"
    return f"mean {_numbers(card.input.mean)}, std {_numbers(card.input.std)}"


def _recipe(input_spec: Input) -> str:
    """Describe how pictures are brought to the network's size."""
    if not input_spec.interpolation:
        return "not resized"
    size = _product((input_spec.height or 0, input_spec.width or 0))
    filter_name = input_spec.interpolation + ("" if input_spec.antialias else " without antialiasing")
    if not input_spec.resize:
        return f"resized to {size}, {filter_name}; the aspect ratio is not kept"
    if len(input_spec.resize) == 1:
        target = f"until the shorter side has {input_spec.resize[0]} pixels"
    elif input_spec.fit:
        relation = "at least" if input_spec.fit == "cover" else "at most"
        target = f"to {relation} {_product(input_spec.resize)}, keeping the aspect ratio"
    else:
        target = f"to {_product(input_spec.resize)}"
    middle = "" if input_spec.height is None else f"; then the middle {size}"
    fill = f", padded with {' '.join(map(str, input_spec.fill))}" if input_spec.fill else ""
    return f"resized {target}, {filter_name}{middle}{fill}"


def _product(numbers: tuple[int, ...] | None) -> str:
    return "×".join(map(str, numbers)) if numbers else _MISSING


def _count(number: int) -> str:
    return f"{number:,}" if number else _MISSING


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _percent(share: float | None) -> str:
    return _MISSING if share is None else f"{share:.2%}"
