"""Reading a PredictReply that holds a model card."""

from __future__ import annotations

from convscope._card import Input, Layer, Limits, ModelCard, Training
from convscope._exceptions import ProtocolError, error_from_code
from convscope._reply import answered_id
from convscope._wire import convscope_pb2 as wire


def read_card(reply: wire.PredictReply, *, request_id: str = "") -> ModelCard:
    """Read a model card.

    Args:
        reply: What came.
        request_id: The id it was asked for with; the reply's own counts more.

    Returns:
        The card.

    Raises:
        ConvscopeError: The service answered with an error.
        ProtocolError: There is no card in the reply.
    """
    if reply.HasField("error"):
        raise error_from_code(reply.error.code, reply.error.message, answered_id(reply, request_id))
    if not reply.HasField("card"):
        raise ProtocolError("the model card was asked for and none came back")
    card = reply.card
    return ModelCard(
        model=card.model,
        version=card.version,
        description=card.description,
        architecture=card.architecture,
        engine=card.engine,
        device=card.device,
        classes=tuple(card.classes),
        input=Input(
            channels=card.input.channels,
            height=card.input.height or None,
            width=card.input.width or None,
            mean=tuple(card.input.mean),
            std=tuple(card.input.std),
        ),
        layers=tuple(map(_layer, card.layers)),
        parameters=card.parameters,
        training=_training(card.training) if card.HasField("training") else None,
        limits=Limits(
            max_images=card.limits.max_images,
            max_image_bytes=card.limits.max_image_bytes,
            max_image_pixels=card.limits.max_image_pixels,
            max_reply_bytes=card.limits.max_reply_bytes,
        ),
        multiply_adds=card.multiply_adds,
        explanations=tuple(card.explanations),
    )


def _layer(layer: wire.Layer) -> Layer:
    """Read one layer of a card."""
    return Layer(
        name=layer.name,
        module=layer.module,
        shape=tuple(layer.shape),
        stride=tuple(layer.stride) or None,
        receptive_field=tuple(layer.receptive_field) or None,
        receptive_field_start=tuple(layer.receptive_field_start) or None,
        parameters=layer.parameters,
        bytes=dict(sorted(layer.bytes.items())),
        input_shape=tuple(layer.input_shape),
        operation=layer.operation,
        kernel=tuple(layer.kernel),
        step=tuple(layer.step),
        padding=tuple(layer.padding),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        multiply_adds=layer.multiply_adds,
        dense_parameters=layer.dense_parameters,
    )


def _training(training: wire.Training) -> Training:
    """Read what a card says of the training."""
    return Training(
        data=training.data,
        train_pictures=training.train_pictures,
        test_pictures=training.test_pictures,
        epochs=training.epochs,
        train_accuracy=training.train_accuracy if training.HasField("train_accuracy") else None,
        test_accuracy=training.test_accuracy if training.HasField("test_accuracy") else None,
        seconds=training.seconds,
        machine=training.machine,
        versions=dict(sorted(training.versions.items())),
    )
