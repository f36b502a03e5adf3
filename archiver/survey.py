"""Surveys: one watched forward pass, and the maps that a network may publish according to it.

Nodes are named as `torchvision.models.feature_extraction` names them; in a network that cannot be traced they are the
paths of its modules. Axes: `N` batch, `C` channels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import get_graph_node_names

from archiver.packing import ArchiveError
from archiver.proof import check_mode, check_steady
from handlers.network.archive import NONE, SIGMOID, SOFTMAX, VALUE
from handlers.network.engines.torch_engine import trace
from handlers.network.layouts import CHANNELS_FIRST, map_shape
from handlers.network.modules import stop_working_in_place, watchable, watching
from handlers.network.outputs import OUTPUT, as_scores, node_of, select, tensors

Shape = tuple[int, int, int]

BATCH_REPLY_BYTES = 1_000_000  # Size of a batch's replies from which TorchServe's parsing takes noticeable time.
MAX_BATCH = 8  # Beyond this a batch saves little: networks this small are bound by bytes, not by calls.


@dataclass
class Survey:
    """Results of one forward pass of one picture.

    Attributes:
        output: The network's output.
        node_shapes: Shape, without the batch, of every node that makes three or four axes of the picture, in
            the order of the pass.
        layouts: Layouts of these nodes, where found out; see `shapes`.
        nodes: All nodes.
        overwritten: Nodes whose map a later operation changed in place → that operation's node ("" if unknown).
        trace_error: Why the network's graph cannot be traced; empty if it can.
    """

    output: Any
    node_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layouts: dict[str, str] | None = None
    nodes: list[str] = field(default_factory=list)
    overwritten: dict[str, str] = field(default_factory=dict)
    trace_error: str = ""

    @property
    def traced(self) -> bool:
        """Whether the network's graph can be traced."""
        return not self.trace_error

    @property
    def shapes(self) -> dict[str, Shape]:
        """(C, h, w) of every node that makes a map: by its layout, or before layouts are known, if it has four axes."""
        if self.layouts is None:
            return {node: (shape[0], shape[1], shape[2]) for node, shape in self.node_shapes.items() if len(shape) == 3}
        return {
            node: map_shape(shape, self.layouts[node])
            for node, shape in self.node_shapes.items()
            if node in self.layouts
        }

    @property
    def returned(self) -> dict[str, Tensor]:
        """Returned tensors by name, as `--layers` takes it; empty if the network returns one tensor."""
        return {f"{OUTPUT}{name}": tensor for name, tensor in tensors(self.output) if name}

    def shape_of(self, node: str) -> tuple[int, ...] | None:
        """Return the shape, without the batch, of a layer's tensor; None if it is no usable tensor."""
        if not node.startswith(OUTPUT):
            return self.node_shapes.get(node)
        try:
            tensor = select(self.output, node.removeprefix(OUTPUT))
        except KeyError:
            return None
        return tuple(tensor.shape[1:]) if isinstance(tensor, Tensor) else None


def survey(network: nn.Module, picture: Tensor) -> Survey:
    """Run the network once and watch every node.

    Like the handler, this first makes in-place modules write to new memory. What still changes a map in place is
    written in the network's own code: `relu(x, inplace=True)`, `x.add_(y)`. Tracing turns `x += y` into `x = x + y`,
    so that is harmful only in a network that cannot be traced.

    Args:
        network: The network, in evaluation mode, on the CPU.
        picture: (1, C, H, W), float32, normalised.

    Raises:
        ArchiveError: The network is still in training mode, fails on this picture, has varying outputs for it, or takes
            more than a picture.
    """
    check_mode(network)
    check_inputs(network)
    stop_working_in_place(network)
    try:
        with torch.no_grad():
            network(torch.zeros_like(picture))  # Loading and readiness checks run a black picture.
        output = check_steady(network, picture)
    except ArchiveError:
        raise
    except Exception as err:  # The forward pass is the user's code, which may raise anything.
        raise ArchiveError(
            f"the network fails on a picture of shape {tuple(picture.shape[1:])}, black or noise: "
            f"{type(err).__name__}: {err}; --channels and --size say what it takes (of any size: tried on 32×32)"
        ) from err
    try:
        get_graph_node_names(network)  # Where this fails, the handler uses hooks.
        graph, names = trace(network)
    except Exception as err:  # Tracing too. torchvision does so in training mode as well; a failure leaves it there.
        network.eval()
        return _survey_modules(network, picture, _reason(err))
    watch = _Watch(graph, names)
    more = [node.name for node in graph.graph.nodes if node.op == "placeholder"][1:]
    advice = "is there a branch in its forward pass?"
    if more:  # Tracing takes their defaults.
        advice = f"wrap it so that forward takes the picture alone, without {', '.join(more)}"
    try:
        with torch.no_grad():
            watch.run(picture)
    except Exception as err:
        raise ArchiveError(f"the traced graph fails where the network does not ({_reason(err)}); {advice}") from err
    found = watch.finish(Survey(output, nodes=list(names.values())))
    for name in (key.removeprefix(OUTPUT) for key in found.returned or {"": output}):
        expected = select(output, name)
        try:
            computed = watch.values.get(node_of(graph, names, name) if name else found.nodes[-1])
        except KeyError:  # The graph does not show how the tensor is returned.
            continue
        if isinstance(expected, Tensor) and not (
            isinstance(computed, Tensor)
            and computed.shape == expected.shape
            and torch.allclose(computed, expected, 1e-4, 1e-5, equal_nan=True)
        ):
            raise ArchiveError(f"the traced graph does not compute what the network computes; {advice}")
    return found


def check_inputs(network: nn.Module) -> None:
    """Check that a network can be called with a picture alone.

    Raises:
        ArchiveError: The network takes more inputs; the message has a wrapper to copy.
    """
    try:
        taken = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # Not every callable has a signature.
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one.name for one in taken if one.default is inspect.Parameter.empty and one.kind in kinds]
    named = [one.name for one in taken if one.default is inspect.Parameter.empty and one.kind == one.KEYWORD_ONLY]
    if len(needed) + len(named) <= 1:
        return
    kind = type(network).__name__
    others = [*(f"self.{name}" for name in needed[1:]), *(f"{name}=self.{name}" for name in named)]
    raise ArchiveError(
        f"its forward pass takes {len(needed) + len(named)} inputs, {', '.join(needed + named)}, and the service gives "
        f"it one picture. Wrap it in a class that says what the others are, and archive that with --arch: its weights "
        f"keep their names, so the same --state-dict fits.\n\n"
        f"    class OnePicture({kind}):\n"
        f"        def forward(self, images):  # (N, C, H, W)\n"
        f"            return super().forward(images, {', '.join(others)})\n\n"
        f"where {', '.join(others)} stands for what you have: a constant made in __init__, the same images, or "
        "some of their channels, images[:, 3:]"
    )


def check_layers(
    found: Survey, layers: Mapping[str, str], layouts: Mapping[str, str] | None = None
) -> dict[str, Shape]:
    """Return the shape (C, h, w) of each layer to be published, by public name.

    Args:
        found: Survey of the network.
        layers: Public name → node, or `output:` and the name of a tensor that the network returns.
        layouts: Public name → layout, for layers that are not (N, C, h, w) in the network.

    Raises:
        ArchiveError: There are no layers, or a node does not exist, makes no map, or is overwritten later.
    """
    if not layers:
        raise ArchiveError(f"say which layers to publish: --layers conv1=NODE,conv2=NODE\n{listing(found)}")
    shapes = {}
    for name, node in layers.items():
        if node.startswith(OUTPUT) and found.shape_of(node) is None:
            raise ArchiveError(
                f"layer {name!r}: the network returns no {node.removeprefix(OUTPUT)!r}\n{listing(found)}"
            )
        if not node.startswith(OUTPUT) and node not in found.nodes:
            raise ArchiveError(f"layer {name!r}: the network has no node {node!r}\n{listing(found)}")
        shape, layout = found.shape_of(node), (layouts or {}).get(name, CHANNELS_FIRST)
        if shape is None or (layout == CHANNELS_FIRST and len(shape) != 3):
            made = f" but {(1, *shape)}" if shape else ""
            advice = "; if these are tokens (N, T, C), --tokens HxW+N says their grid" if len(shape or ()) == 2 else ""
            raise ArchiveError(
                f"layer {name!r}: {node!r} makes no map (1, C, h, w) of the picture{made}{advice}\n{listing(found)}"
            )
        if node in found.overwritten:
            by = found.overwritten[node]
            raise ArchiveError(
                f"layer {name!r}: the map of {node!r} is overwritten in place later in the forward pass"
                + (f", by {by!r}; publish that node instead" if by else "; publish a later node instead")
                + f", or write the operation so that it makes a new tensor (y = x + z, not x += z)\n{listing(found)}"
            )
        try:
            shapes[name] = map_shape(shape, layout)
        except ValueError as err:
            raise ArchiveError(f"layer {name!r}: {node!r} cannot be read so: {err}") from err
    return shapes


def listing(found: Survey) -> str:
    """Return the nodes that can be published, one a line with the shape of their maps, and the returned tensors."""
    kind, why = "nodes", ""
    if not found.traced:
        kind, why = "modules", f"the network cannot be traced, so no receptive fields are known: {found.trace_error}\n"
    maps = {name: shape for name, shape in found.shapes.items() if name not in found.overwritten}
    lines = [f"  {name}  {_product(shape)}" for name, shape in maps.items()]
    text = why + ("\n".join([f"{kind} that make maps:", *lines]) if lines else f"no {kind} make maps (1, C, h, w)")
    usable = {name: shape for name, shape in found.node_shapes.items() if name not in found.overwritten}
    tokens = {name: shape for name, shape in usable.items() if len(shape) == 2}
    if tokens and found.layouts is None:
        lines = [f"  {name}  {_product(shape)}" for name, shape in tokens.items()]
        text = "\n".join([text, f"{kind} that make (1, T, C), tokens perhaps:", *lines])
    return f"{text}\n{_returned(found)}" if found.returned else text


def _returned(found: Survey) -> str:
    """Return the outputs of a network that returns more than one tensor, one a line."""
    lines = [f"  {key.removeprefix(OUTPUT)}  {_product(tensor.shape)}" for key, tensor in found.returned.items()]
    return "\n".join(["the network returns:", *lines])


def _product(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def check_scores(
    found: Survey,
    classes: int,
    kind: str | None = None,
    output: str = "",
    *,
    gives_probabilities: bool = False,
    more: Callable[[], Iterable[Any]] = lambda: (),
) -> None:
    """Check that there is one score a class, and that the scores are what the options declare.

    Args:
        found: Survey of the network.
        classes: K; 0 for a network without scores, which may return anything.
        kind: Declared meaning of the outputs, one of `SCORES`; None if not declared.
        output: Which of the returned tensors is the scores.
        gives_probabilities: Whether the scores are declared as probabilities already.
        more: Runs the network on more pictures of noise; called only if the first one is not enough.

    Raises:
        ArchiveError: The output is not one finite number for each class, or not what the options declare.
    """
    if not classes or kind == NONE:
        return
    scores = _scores(found.output, output, found)
    if scores.dim() != 2 or scores.shape[1] != classes:
        raise ArchiveError(
            f"the network returns shape {tuple(scores.shape)}; {classes} classes need (1, {classes})"
            + (" (or name another output with --output)" if found.returned else "")
        )
    if not torch.isfinite(scores).all():
        raise ArchiveError("the network's scores are not finite; are these its weights?")
    if kind == VALUE:
        return
    if classes == 1 and kind != SIGMOID:
        raise ArchiveError(
            "one logit alone: softmax makes probability 1 of it for every picture. Say --scores sigmoid if it speaks "
            "for the class, or --scores value if it is a number that is no score"
        )
    if gives_probabilities and not _is_share(scores):
        raise ArchiveError(
            f"--probabilities was given, but its outputs are not within 0 and 1: {_some(scores)}; say "
            "--no-probabilities if they are logits"
        )
    if gives_probabilities and kind == SOFTMAX and not _sums_to_one(scores):
        raise ArchiveError(
            f"its outputs are said to have gone through a softmax, and their sum is not 1: {_some(scores)}; say "
            "--no-probabilities if they are logits, or --scores sigmoid if they went through a sigmoid"
        )
    if gives_probabilities or not _is_share(scores):
        return
    if _sums_to_one(scores) and kind != SIGMOID:
        raise ArchiveError(
            "the network's scores are already probabilities (none below 0, their sum is 1), and the service makes "
            "probabilities of them once more: return the logits, before softmax, or say --scores softmax "
            "--probabilities"
        )
    others = [_scores(answer, output, found) for answer in more()] if kind is None else []
    if others and all(map(_is_share, others)) and bool(((scores > 0) & (scores < 1)).any()):
        raise ArchiveError(
            f"all outputs lie between 0 and 1 on pictures of noise: {_some(scores)}. Say what they are: --scores "
            "sigmoid --probabilities if they went through a sigmoid; --scores softmax, or sigmoid, with "
            "--no-probabilities if they are logits and small; --scores value if they are numbers that are no scores"
        )


def _scores(returned: object, output: str, found: Survey) -> Tensor:
    try:
        scores = select(returned, output)
    except KeyError:
        raise ArchiveError(f"the network returns no {output!r}\n{_returned(found)}") from None
    if not isinstance(scores, Tensor):
        listed = f"; say which is the scores: --output NAME\n{_returned(found)}" if found.returned else ""
        what = type(scores).__name__
        raise ArchiveError(f"the network returns a {what}, not a tensor of logits (N, K){listed}")
    return as_scores(scores)


def _is_share(scores: Tensor) -> bool:
    return bool(((scores >= 0) & (scores <= 1)).all())


def _sums_to_one(scores: Tensor) -> bool:
    return float((scores.sum(1) - 1).abs().max()) < 1e-3


def _some(scores: Tensor) -> str:
    shown = " ".join(f"{score:.3g}" for score in scores[0, :5].tolist())
    return shown + (" ..." if scores.shape[1] > 5 else "")


def batch_size(shapes: Mapping[str, Shape], *, any_size: bool) -> int:
    """Choose how many requests TorchServe may put in one batch.

    Its front end parses the whole batch's reply again on every 64 KB, so that many large replies cost time quadratic in
    their sum. The bound counts the largest reply to one picture: all layers as float32, in base64.

    Args:
        shapes: (C, h, w) of the published layers.
        any_size: Whether the network takes pictures of any size, so that a reply's size has no bound.

    Returns:
        1..MAX_BATCH.
    """
    if any_size:
        return 1
    reply_bytes = sum(channels * height * width * 4 for channels, height, width in shapes.values()) * 4 // 3
    return max(1, min(MAX_BATCH, BATCH_REPLY_BYTES // max(1, reply_bytes)))


class _Watch(fx.Interpreter):
    """Runs a graph node by node and detects changes of a map after it was made.

    Tensors count the operations that wrote to them, through views too; that counter detects a write even if the values
    stay the same for this picture. A copy of each map is compared as well, for code that bypasses the counter.
    """

    def __init__(self, graph: fx.GraphModule, names: Mapping[str, str]) -> None:
        super().__init__(graph)
        self._names = names
        self._of_picture: set[fx.Node] = set()  # Nodes whose value depends on the picture.
        self._taken: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._overwritten: dict[str, str] = {}
        self.values: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" or not self._of_picture.isdisjoint(n.all_input_nodes):
            self._of_picture.add(n)
        for name, (tensor, _, version) in self._taken.items():
            if tensor._version != version:
                self._overwritten.setdefault(name, self._names.get(n.name, n.name))
        made = self._names.get(n.name)
        if made is not None:
            self.values[made] = value
            is_map = n in self._of_picture and n.op != "placeholder"
            if is_map and isinstance(value, Tensor) and value.dim() in (3, 4):
                self._taken[made] = (value, value.clone(), value._version)
        return value

    def finish(self, found: Survey) -> Survey:
        for name, (tensor, copy, _) in self._taken.items():
            if len(tensor) == 1:
                found.node_shapes[name] = tuple(tensor.shape[1:])
            if not torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True):
                self._overwritten.setdefault(name, "")
        found.overwritten.update(self._overwritten)
        return found


def _reason(err: Exception) -> str:
    """Return the error, and the last line outside of torch's own code and this file that led to it."""
    ours = (*torch.__path__, *torchvision.__path__, __file__, "<")  # Generated code has names such as <string>.
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if not frame.filename.startswith(ours)]
    place = f"; line {frames[-1].lineno} of {Path(frames[-1].filename).name}: {frames[-1].line}" if frames else ""
    return f"{type(err).__name__}: {str(err).partition(chr(10))[0]}{place}"


def _survey_modules(network: nn.Module, picture: Tensor, trace_error: str) -> Survey:
    """Survey the modules of a network that cannot be traced."""
    taken: dict[str, tuple[Tensor, Tensor, int]] = {}

    def keep(name: str, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            taken[name] = (output, output.clone(), output._version)

    modules = watchable(network)
    with watching(modules, keep), torch.no_grad():
        found = Survey(network(picture), nodes=list(modules), trace_error=trace_error)
    for name, (tensor, copy, version) in taken.items():
        if len(tensor) == 1:
            found.node_shapes[name] = tuple(tensor.shape[1:])
        if tensor._version != version or not torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True):
            found.overwritten[name] = ""
    return found
