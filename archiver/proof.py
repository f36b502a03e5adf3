"""The checks that every network must pass before it may be served.

Its output for a picture is the same each time, the same with another picture as alone, the same after a rebuild from
its archive, and the same in ONNX Runtime as in torch. Gradients are looked for, not required. Axes: `N` batch, `C`
channels, `H, W` picture pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from archiver.packing import ArchiveError
from archiver.trial import noise
from handlers.images.preprocessing import Preprocessing
from handlers.network.archive import GRAPH, SIGMOID, SOFTMAX, WEIGHTS, eager_arguments
from handlers.network.engines import Engine
from handlers.network.engines.onnx import OnnxEngine
from handlers.network.engines.reference import PICTURES, check
from handlers.network.engines.torch_engine import TorchEngine
from handlers.network.outputs import as_scores, select

TOLERANCE = 1e-4
"""How far two answers to one picture may be from each other: the largest difference of any cell, as a share of the
largest value. Passes of one and of two pictures sum in another order, and errors of layers add up."""

ROUNDING = 1e-6
"""The same where both answers are computed in float64 and then rounded to float32."""

_MOVES = ("View", "Squeeze", "Unsqueeze", "Reshape", "UnsafeView", "Alias", "Clone", "Select", "Slice", "Transpose")
"""Beginnings of the names that torch's graph of gradients has for operations that move values and compute nothing."""

_SMALLEST = 1e-2  # A smaller largest value counts as this: a difference of equal values is only rounding.
_RUNS = 2  # Runs of the same picture after the first.
_RUNS_IF_DRAWN = 30  # Runs if random numbers were drawn: a dropout may miss a few scores several times.


def check_mode(network: nn.Module) -> None:
    """Check that evaluation mode reached the whole network.

    Raises:
        ArchiveError: A part of it is in training mode.
    """
    left = [name or "the network itself" for name, part in network.named_modules() if part.training]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ArchiveError(
            f"still in training mode after eval(), where answers are random or depend on what else is in the batch: "
            f"{', '.join(left[:3])}{more}; let eval() and train() reach every module"
        )


def check_steady(network: nn.Module, picture: Tensor) -> Any:
    """Check that the network's output for one picture is the same each time.

    Args:
        network: In evaluation mode, on the CPU.
        picture: (1, C, H, W), float32, normalised.

    Returns:
        The output.

    Raises:
        ArchiveError: The outputs differ.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        answer = network(picture)
        drawn = not torch.equal(torch.random.get_rng_state(), before)
        for _ in range(_RUNS_IF_DRAWN if drawn else _RUNS):
            if not _largest_difference(network(picture), answer) <= TOLERANCE:
                raise ArchiveError(
                    "its forward pass is random, or keeps something from one picture to the next: the same picture was "
                    "answered otherwise the second time; for dropout use nn.Dropout, which eval() ends"
                )
    return answer


def check_rebuilt(network: nn.Module, picture: Tensor, answer: object) -> None:
    """Check that a rebuilt network has the same output as the network before.

    Args:
        network: The rebuilt network, the same weights loaded, in evaluation mode, on the CPU.
        picture: (1, C, H, W), float32, normalised.
        answer: The earlier network's output for this picture.

    Raises:
        ArchiveError: The outputs differ.
    """
    with torch.no_grad():
        found = network(picture)
    if not _largest_difference(found, answer) <= TOLERANCE:
        raise ArchiveError(
            "built twice with the same weights, the network gives two answers: its constructor makes random values "
            "that the state dict does not hold; make them parameters, or buffers that are persistent"
        )


def check_batch_independence(engine: Engine, preprocessing: Preprocessing) -> None:
    """Check that the outputs for a picture do not depend on the other pictures of the batch.

    Args:
        engine: The engine that runs the network.
        preprocessing: Preprocessing of the network's input.

    Raises:
        ArchiveError: They do, or the network cannot take two pictures in one pass.
    """
    pictures = noise(preprocessing, 2)
    pictures[1] *= 0.5  # A statistic of a whole batch, such as its maximum, is nearly the same for two alike.
    what, off = _compare_batches(engine, pictures)
    if off <= TOLERANCE or (isinstance(engine, TorchEngine) and _is_rounding(engine, pictures)):
        return
    raise ArchiveError(
        f"an answer depends on what else is in the batch: {what} of a picture beside another differ by {off:.1e} of "
        "their largest value from those of the picture alone"
    )


def _compare_batches(engine: Engine, pictures: Tensor) -> tuple[str, float]:
    """Return the output that differs most between two pictures together and each alone, and the difference.

    Raises:
        ArchiveError: The network cannot take two pictures in one pass.
    """
    alone = [_answers(engine, picture, "one picture of noise") for picture in (pictures[:1], pictures[1:])]
    together = _answers(engine, pictures, "two pictures in one pass, though not for one")
    worst = ("", 0.0)
    for number, answers in enumerate(alone):
        for (what, found), (_, expected) in zip(together, answers, strict=True):
            if len(found) != len(pictures) or found[number].shape != expected[0].shape:
                raise ArchiveError(
                    f"two pictures in one pass give {what} of shape {tuple(found.shape)}, and one alone of shape "
                    f"{tuple(expected.shape)}: the first axis must be the batch's, as in images.flatten(1)"
                )
            off = _largest_difference(found[number : number + 1], expected)
            worst = max(worst, (what, off), key=lambda pair: pair[1])
    return worst


def _is_rounding(engine: TorchEngine, pictures: Tensor) -> bool:
    """Return whether outputs alone and together differ by rounding only: in float64 they then agree.

    A batch of another size is summed in another order. A norm whose statistics hardly vary amplifies the difference.
    """
    try:
        return _compare_batches(engine.copy(torch.float64), pictures)[1] <= ROUNDING
    except Exception:  # A network may insist on float32.
        return False


def check_graph(
    content: bytes, weights: bytes, card: Mapping[str, Any], network: nn.Module, preprocessing: Preprocessing
) -> None:
    """Compare a graph's outputs with the network's in torch, every cell, if ONNX Runtime is installed here.

    Args:
        content: The content of graph.onnx.
        weights: The content of weights.safetensors, which holds the graph's weights.
        card: The archive's card.
        network: The network in evaluation mode, on the CPU, weights loaded.
        preprocessing: Preprocessing of the network's input. A network of any size is tested on two sizes.

    Raises:
        ArchiveError: ONNX Runtime cannot run the graph, or computes something else.
    """
    if find_spec("onnxruntime") is None:
        return
    try:
        eager = TorchEngine(network, **eager_arguments(card))
        with TemporaryDirectory() as folder:  # As in serving: the weights lie beside the graph.
            Path(folder, GRAPH).write_bytes(content)
            Path(folder, WEIGHTS).write_bytes(weights)
            session = OnnxEngine(Path(folder, GRAPH), eager.layers, has_scores=eager.has_scores, layouts=eager.layouts)
            check(session, eager, noise(preprocessing, PICTURES).numpy())
            check_batch_independence(session, preprocessing)
            if preprocessing.size is None:
                check(session, eager, noise(replace(preprocessing, height=41, width=56)).numpy())
    except Exception as err:  # ONNX Runtime may raise anything.
        raise ArchiveError(f"the graph for ONNX Runtime does not do what the network does: {err}") from err


def why_no_gradients(engine: TorchEngine, preprocessing: Preprocessing) -> str:
    """Return why the scores have no gradient with respect to the picture; empty if they have one.

    A network that rounds its values has a gradient of 0, which is correct and not checked here.

    Args:
        engine: The engine that runs the network, in torch.
        preprocessing: Preprocessing of the network's input.
    """
    picture = noise(preprocessing).requires_grad_(True)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        try:
            scores, _ = engine.forward_with_gradients(picture.clone())
            if not scores.requires_grad:
                return "its forward pass runs without gradients (torch.no_grad, detach, or a cast to integers)"
            [gradient] = torch.autograd.grad(scores.sum(), picture, allow_unused=True)
        except Exception as err:  # The forward pass is the user's code; its derivative may be too.
            return f"its backward pass fails with {type(err).__name__}"
    if gradient is None:
        return "its scores do not come from the picture by operations that have a gradient"
    return ""


def gives_probabilities(network: nn.Module, pictures: Tensor, output: str, kind: str) -> bool:
    """Return whether a network's outputs are already the result of softmax or sigmoid.

    They are if they lie between 0 and 1 on noise, and their last operation has the derivative of softmax or sigmoid.

    Args:
        network: The network in evaluation mode, on the CPU.
        pictures: (N, C, H, W), float32, noise.
        output: Which of the returned tensors is the scores.
        kind: Which of the two the outputs are declared as.

    Raises:
        ArchiveError: They are the result of the other, or lie between 0 and 1 for an unknown reason.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            scores = as_scores(select(network(pictures.clone().requires_grad_(True).clone()), output))
        except Exception:  # The test of the contents reports the error.
            return False
    if not isinstance(scores, Tensor) or not bool(((scores >= 0) & (scores <= 1)).all()):
        return False
    node = scores.grad_fn
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    name = node.name() if node is not None else ""
    last = next((one for one in (SOFTMAX, SIGMOID) if name.lower().startswith(one)), "")
    if last == kind:
        return True
    if last:
        raise ArchiveError(f"its outputs went through a {last} in the network already: --scores {last}")
    raise ArchiveError(
        "all outputs lie between 0 and 1 on pictures of noise, and the network does not show whether they are "
        f"probabilities: add --probabilities if they went through a {kind} already, --no-probabilities if they "
        "are logits"
    )


def _answers(engine: Engine, pictures: Tensor, failing: str) -> list[tuple[str, Tensor]]:
    """Return the scores without maps, the scores with all maps, and the maps, each with its name."""
    try:
        plain, _ = engine.run(pictures.numpy()) if engine.has_scores else (None, {})
        scores, maps = engine.run(pictures.numpy(), frozenset(engine.layers))
    except Exception as err:  # The forward pass is the user's code, which may raise anything.
        raise ArchiveError(f"the network fails for {failing}: {type(err).__name__}: {err}") from err
    named = [("scores", torch.from_numpy(found)) for found in (plain, scores) if found is not None]
    return named + [(f"the maps of {name}", torch.from_numpy(maps[name])) for name in engine.layers]


def _largest_difference(found: object, expected: object) -> float:
    """Return the largest difference of any cell, as a share of the largest finite value expected; inf where another."""
    pairs = list(_leaves(found)), list(_leaves(expected))
    if [one.shape for one in pairs[0]] != [other.shape for other in pairs[1]]:
        return torch.inf
    return max((_difference(one, other) for one, other in zip(*pairs, strict=True)), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    differ = ~((found == expected) | (found.isnan() & expected.isnan()))
    if not differ.any():
        return 0.0
    finite = expected[expected.isfinite()].abs()
    largest = max(float(finite.max()) if len(finite) else 0.0, _SMALLEST)
    return float((found - expected)[differ].abs().nan_to_num(torch.inf).max()) / largest


def _leaves(value: object) -> Iterator[Tensor]:
    """Return the tensors in a network's output: one tensor, or a tuple or a dictionary of tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
