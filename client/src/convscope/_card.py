"""The model card: what a served model is, which pictures it takes, its layers and its accuracy. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """The pictures that the network takes; the service converts others.

    Attributes:
        channels: 1 for grey, 3 for colour.
        height: In pixels; None for any size, pictures are then not resized.
        width: In pixels; None for any size.
        mean: Subtracted from each channel's values in 0..1; empty for no normalisation.
        std: Each channel is divided by it after that; empty for no normalisation.
    """

    channels: int
    height: int | None
    width: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Layer:
    """A layer whose map can be requested.

    Attributes:
        name: The public name, to put into `layers=`.
        module: The node of the network it is bound to.
        shape: (C, h, w) of its map, for the model's input size.
        stride: Input pixels from one cell to the next, (y, x); None where not defined.
        receptive_field: Input pixels that one cell depends on, (height, width); None where not defined.
        receptive_field_start: First input pixel of cell (0, 0), (y, x), negative in the padding; None where not
            defined.
        parameters: Of the operation with weights that makes the map, which is what all below but `bytes` are of.
        bytes: Size of the whole map by dtype name.
        input_shape: (C, h, w) of the operation's input; empty if there is none.
        operation: `Conv2d`, `Linear`, ...; empty if there is none.
        kernel: Cells of its window, (height, width); empty for a linear layer, as are the next three.
        step: Its own stride in cells of its input, (y, x).
        padding: Cells added before the first one, (y, x).
        dilation: Input cells from one cell of the window to the next, (y, x).
        groups: Groups of channels that do not mix; 0 for a linear layer.
        multiply_adds: For one picture; a multiplication and its addition count as one.
        dense_parameters: What a fully connected layer between the same shapes would have: a weight for each pair of
            cells and a bias for each output cell.
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


@dataclass(frozen=True)
class Training:
    """How the weights were trained.

    Attributes:
        data: What it was trained on.
        train_pictures: How many pictures it learned from.
        test_pictures: How many it was measured on.
        epochs: How often it saw them.
        train_accuracy: 0..1; None if not measured.
        test_accuracy: 0..1; None if not measured.
        seconds: How long it took.
        machine: On what.
        versions: Of the libraries, by name.
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
        max_images: Pictures in a request.
        max_image_bytes: Bytes of a picture's file.
        max_image_pixels: Pixels of a picture.
        max_reply_bytes: Bytes of a reply.
    """

    max_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_reply_bytes: int


@dataclass(frozen=True)
class ModelCard:
    """A served model, as it describes itself after one real forward pass.

    Attributes:
        model: Its name.
        version: Its version.
        description: For people.
        architecture: The network's class, `module:Class`.
        engine: What computes it, such as `torch-2.15.0`.
        device: Where, `cpu` or `cuda:0`.
        classes: Labels in the order of their indexes; empty for a model without classes.
        input: What pictures become before they enter.
        layers: In the order of the forward pass.
        parameters: Of the whole network.
        training: None for a network that was not trained.
        limits: Of a request and a reply.
        multiply_adds: Of the whole network for one picture; 0 from a service that does not say.
        explanations: Methods of `explain` that suit the network; empty from a service that does not say.
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
