"""Surveys: one watched forward pass, and from it which maps a network may publish.

Nodes are named as `torchvision.models.feature_extraction` names them; in a network that cannot be traced they are the
paths of its modules. Axes: `N` batch, `C` channels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from archiver.packing import ArchiveError
from archiver.proof import check_mode, check_steady
from handlers.network.geometry import takes_hooks

Shape = tuple[int, int, int]

BATCH_REPLY_BYTES = 1_000_000  # What the replies of one batch may come to before TorchServe's parsing shows.
MAX_BATCH = 8  # Beyond it a batch saves little: the networks this small are bound by bytes, not by calls.


@dataclass
class Survey:
    """What one forward pass of one picture showed.

    Attributes:
        output: What the network returned.
        shapes: (C, h, w) of every node that makes a map, in the order of the pass.
        nodes: Every node there is, whatever it makes.
        overwritten: Nodes whose map a later operation changed in place, by the node that did it ("" where unknown).
        hindrance: Why the network's graph cannot be traced; empty if it can.
    """

    output: Any
    shapes: dict[str, Shape] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    overwritten: dict[str, str] = field(default_factory=dict)
    hindrance: str = ""

    @property
    def traced(self) -> bool:
        """Whether the network's graph could be traced."""
        return not self.hindrance


def survey(network: nn.Module, picture: Tensor) -> Survey:
    """Run the network once and look at every node.

    Like the handler, this first makes in-place modules write to new memory. What still changes a map in place is
    written in the network's own code: `relu(x, inplace=True)`, `x.add_(y)`. Tracing turns `x += y` into `x = x + y`,
    so that does harm only in a network that cannot be traced.

    Args:
        network: In evaluation mode, on the CPU.
        picture: (1, C, H, W), float32, normalised.

    Raises:
        ArchiveError: The network is still in training mode, fails on this picture, answers it in several ways, or
            takes more than a picture.
    """
    check_mode(network)
    for part in network.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    try:
        with torch.no_grad():
            network(torch.zeros_like(picture))  # Loading and readiness try a black one.
        output = check_steady(network, picture)
    except ArchiveError:
        raise
    except Exception as err:  # The forward pass is the user's code, which may raise anything.
        raise ArchiveError(
            f"the network fails on a picture of shape {tuple(picture.shape[1:])}, black or noise: "
            f"{type(err).__name__}: {err}; --channels and --size say what it takes (of any size: tried on 32×32)"
        ) from err
    try:
        train_nodes, nodes = get_graph_node_names(network)
        extractor = create_feature_extractor(
            network, train_return_nodes=train_nodes[-1:], eval_return_nodes=list(nodes)
        ).eval()
    except Exception as err:  # Tracing too. torchvision does so in training mode as well; a failure leaves it there.
        network.eval()
        return _survey_modules(network, picture, _reason(err))
    (returned,) = (node.args[0] for node in extractor.graph.nodes if node.op == "output")
    watch = _Watch(extractor, {node: name for name, node in returned.items()})
    more = [node.name for node in extractor.graph.nodes if node.op == "placeholder"][1:]
    advice = "is there a branch in its forward pass?"
    if more:  # Tracing takes them for given.
        advice = f"wrap it so that forward takes the picture alone, without {', '.join(more)}"
    try:
        with torch.no_grad():
            watch.run(picture)
    except Exception as err:
        raise ArchiveError(f"the traced graph fails where the network does not ({_reason(err)}); {advice}") from err
    found = watch.finish(Survey(output, nodes=list(nodes)))
    scores = watch.values.get(nodes[-1])
    if isinstance(output, Tensor) and not (
        isinstance(scores, Tensor)
        and scores.shape == output.shape
        and torch.allclose(scores, output, 1e-4, 1e-5, equal_nan=True)
    ):
        raise ArchiveError(f"the traced graph does not compute what the network computes; {advice}")
    return found


def check_layers(found: Survey, layers: Mapping[str, str]) -> dict[str, Shape]:
    """Return the shape (C, h, w) of each layer to be published, by public name.

    Args:
        found: What the network does.
        layers: Public name → node.

    Raises:
        ArchiveError: No layers, a node that is not there, makes no map, or is overwritten later.
    """
    if not layers:
        raise ArchiveError(f"say which layers to publish: --layers conv1=NODE,conv2=NODE\n{listing(found)}")
    for name, node in layers.items():
        if node not in found.nodes:
            raise ArchiveError(f"layer {name!r}: the network has no node {node!r}\n{listing(found)}")
        if node not in found.shapes:
            raise ArchiveError(f"layer {name!r}: {node!r} makes no map (1, C, h, w) of the picture\n{listing(found)}")
        if node in found.overwritten:
            by = found.overwritten[node]
            raise ArchiveError(
                f"layer {name!r}: the map of {node!r} is overwritten in place later in the forward pass"
                + (f", by {by!r}; publish that node instead" if by else "; publish a later node instead")
                + f", or write the operation so that it makes a new tensor (y = x + z, not x += z)\n{listing(found)}"
            )
    return {name: found.shapes[node] for name, node in layers.items()}


def listing(found: Survey) -> str:
    """Return the nodes that can be published, one a line with the shape of their maps."""
    kind, why = "nodes", ""
    if not found.traced:
        kind, why = "modules", f"the network cannot be traced, so no receptive fields are known: {found.hindrance}\n"
    maps = {name: shape for name, shape in found.shapes.items() if name not in found.overwritten}
    lines = [f"  {name}  {'×'.join(map(str, shape))}" for name, shape in maps.items()]
    return why + ("\n".join([f"{kind} that make maps:", *lines]) if lines else f"no {kind} make maps (1, C, h, w)")


def check_scores(found: Survey, classes: int) -> None:
    """Check that there is one score a class.

    Args:
        found: What the network does.
        classes: K; 0 for a network without classes, which may return anything.

    Raises:
        ArchiveError: The output is not one finite logit for each class, or already probabilities.
    """
    if not classes:
        return
    output = found.output
    if not isinstance(output, Tensor):
        raise ArchiveError(f"the network returns a {type(output).__name__}, not a tensor of logits (N, K)")
    if output.dim() != 2 or output.shape[1] != classes:
        raise ArchiveError(f"the network returns shape {tuple(output.shape)}; {classes} classes need (1, {classes})")
    if not torch.isfinite(output).all():
        raise ArchiveError("the network's scores are not finite; are these its weights?")
    if (output >= 0).all() and float((output.sum(1) - 1).abs().max()) < 1e-3:
        raise ArchiveError(
            "the network's scores are already probabilities (none below 0, their sum is 1), and the service makes "
            "probabilities of them once more: return the logits, before softmax"
        )


def batch_size(shapes: Mapping[str, Shape], *, any_size: bool) -> int:
    """Choose how many requests TorchServe may put in one batch.

    Its front end parses the whole batch's reply again on every 64 KB, so that many large replies cost time quadratic in
    their sum. Counted is the largest reply to one picture: all layers as float32, in base64.

    Args:
        shapes: (C, h, w) of the published layers.
        any_size: Whether the network takes pictures of any size, so that no bound is known.

    Returns:
        1..MAX_BATCH.
    """
    if any_size:
        return 1
    reply_bytes = sum(channels * height * width * 4 for channels, height, width in shapes.values()) * 4 // 3
    return max(1, min(MAX_BATCH, BATCH_REPLY_BYTES // max(1, reply_bytes)))


class _Watch(fx.Interpreter):
    """Runs a graph node by node and notices when a map changes after it was made.

    Tensors count the operations that wrote to them, through views too; that counter tells even where the values happen
    to stay the same for this picture. A copy of each map is compared as well, for code that goes behind the counter.
    """

    def __init__(self, extractor: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
        super().__init__(extractor)
        self._names = names
        self._of_picture: set[fx.Node] = set()  # Nodes whose value depends on the picture; weights' do not.
        self._taken: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._overwritten: dict[str, str] = {}
        self.values: dict[str, object] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "placeholder" or not self._of_picture.isdisjoint(n.all_input_nodes):
            self._of_picture.add(n)
        for name, (tensor, _, version) in self._taken.items():
            if tensor._version != version:
                self._overwritten.setdefault(name, self._names.get(n, n.name))
        made = self._names.get(n)
        if made is not None:
            self.values[made] = value
            is_map = n in self._of_picture and n.op != "placeholder"
            if is_map and isinstance(value, Tensor) and value.dim() == 4:
                self._taken[made] = (value, value.clone(), value._version)
        return value

    def finish(self, found: Survey) -> Survey:
        for name, (tensor, copy, _) in self._taken.items():
            found.shapes[name] = _shape(tensor)
            if not torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True):
                self._overwritten.setdefault(name, "")
        found.overwritten.update(self._overwritten)
        return found


def _reason(err: Exception) -> str:
    """Return what went wrong, and the last line outside of torch's own code and this file that led there."""
    ours = (*torch.__path__, *torchvision.__path__, __file__, "<")  # Generated code has names such as <string>.
    frames = [frame for frame in traceback.extract_tb(err.__traceback__) if not frame.filename.startswith(ours)]
    place = f"; line {frames[-1].lineno} of {Path(frames[-1].filename).name}: {frames[-1].line}" if frames else ""
    return f"{type(err).__name__}: {str(err).partition(chr(10))[0]}{place}"


def _survey_modules(network: nn.Module, picture: Tensor, hindrance: str) -> Survey:
    """Look at the modules of a network that cannot be traced, with hooks that are gone afterwards."""
    taken: dict[str, tuple[Tensor, Tensor, int]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                taken[name] = (output, output.clone(), output._version)

        return hook

    modules = [(name, module) for name, module in network.named_modules() if name and takes_hooks(module)]
    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    try:
        with torch.no_grad():
            found = Survey(network(picture), nodes=[name for name, _ in modules], hindrance=hindrance)
    finally:
        for handle in handles:
            handle.remove()
    for name, (tensor, copy, version) in taken.items():
        found.shapes[name] = _shape(tensor)
        if tensor._version != version or not torch.allclose(tensor, copy, rtol=0, atol=0, equal_nan=True):
            found.overwritten[name] = ""
    return found


def _shape(value: Tensor) -> Shape:
    return value.shape[1], value.shape[2], value.shape[3]
