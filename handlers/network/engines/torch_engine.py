"""Eager torch: the engine that is always available, and the reference for every other.

Maps come from torchvision's feature extraction, which makes named nodes of the graph outputs; a network that cannot be
traced gets forward hooks instead. Either way, a layer that is not asked for is neither kept nor copied. Axes:
`N` batch, `C` channels, `h, w` map cells, `K` classes.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torchvision import ops
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

from handlers.network.engines import CannotEditError, Cells
from handlers.network.layouts import CHANNELS_FIRST, change, to_maps
from handlers.network.modules import stop_working_in_place, watching
from handlers.network.outputs import OUTPUT, as_scores, node_of, select

logger = logging.getLogger(__name__)

Maps = dict[str, Tensor]
Forward = Callable[[Tensor], Mapping[str, Tensor]]
Edits = Sequence[tuple[str, Callable[[Tensor], None]]]
"""Public names of layers, each with what changes its maps (N, C, h, w) in place, in the order in which it is done."""

SCORES = "//scores"  # No public layer name can hold a slash, so no clash.
_TRACED = frozenset([SCORES])  # Asks for no layer, yet for the traced graph; no layers at all runs the module itself.
_EXTRACTORS_KEPT = 32  # One per set of layers ever asked for; they share the network's weights.

# What torchvision's feature extraction traces with unless told otherwise: the node names depend on it.
_LEAVES = [part for part in vars(ops).values() if inspect.isclass(part) and issubclass(part, nn.Module)]


def trace(model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """Trace a network as torchvision's feature extraction does, which may raise anything.

    Args:
        model: A network in evaluation mode.

    Returns:
        Its graph, and the published name of each of the graph's nodes.
    """
    tracer = NodePathTracer(autowrap_modules=(math, ops), leaf_modules=_LEAVES)
    model.eval()  # A network that keeps what it computed, here a proxy of the trace before, lets go of it in this call.
    graph = tracer.trace(model)
    return fx.GraphModule(tracer.root, graph), {node.name: path for node, path in tracer.node_to_qualname.items()}


class TorchBase(ABC):
    """The base of engines that run torch."""

    @abstractmethod
    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once, as `Engine.run`, on tensors.

        Args:
            images: (N, C, H, W), float32, normalised, contiguous, on the CPU or the engine's device.
            layers: Public names of the maps wanted.

        Returns:
            Scores (N, K) on the CPU, or None; and the maps, on the device of the engine.
        """

    def run(
        self, images: Cells, layers: frozenset[str] = frozenset()
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once; see `Engine.run`."""
        return _as_arrays(*self.forward(_tensor(images), layers))


class TorchEngine(TorchBase):
    """A network run by torch, operation by operation.

    Args:
        module: The network, weights loaded. It is put into evaluation mode, and its in-place activations write to new
            memory from then on: a map must not change after it was taken.
        layers: Public name of each layer → node name of torchvision's feature extraction (for a network that cannot be
            traced: module path), or `output:` and the name of a tensor that the network returns.
        has_scores: Whether the network's output is scores.
        layouts: Public name → layout, of the layers that are not (N, C, h, w) in the network.
        output: Name of the returned tensor that is the scores; empty if it returns nothing else.
        device: The network's device.
        dtype: Dtype of weights and activations. If it is not float32, the engine needs its own copy of the module.
        memory_format: Memory format of weights and input: `torch.channels_last` or `torch.contiguous_format`.

    Attributes:
        name, layers, has_scores: See `Engine`.
        layouts, output: As given.
        module: The network.
        device: The network's device.
        threads: torch's number of threads when the engine was made.

    Raises:
        ValueError: A layer is bound to a node that the network does not have, or the network returns no such output.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, str],
        *,
        has_scores: bool,
        layouts: Mapping[str, str] | None = None,
        output: str = "",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.name = f"torch-{torch.__version__.partition('+')[0]}"
        self._dtype, self._memory_format = dtype, memory_format
        self._converts = dtype != torch.float32 or memory_format != torch.contiguous_format
        if dtype != torch.float32:
            self.name += f"-{str(dtype).removeprefix('torch.')}"
        if memory_format == torch.channels_last:
            self.name += "-channels-last"
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # float32 maps are float32 on a GPU too; TF32 keeps 10 bits of 23.
        self.threads = torch.get_num_threads()
        self.layers = dict(layers)
        self.has_scores = has_scores
        self.layouts, self.output = dict(layouts or {}), output
        self.module = module.to(self.device).eval().requires_grad_(False)
        if self._converts:
            self.module.to(dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
        stop_working_in_place(self.module)
        self._nodes: dict[str, str] = {}  # By public name, and that of the scores; empty where hooks are needed.
        self._trace()
        self._extractors: OrderedDict[frozenset[str], Forward] = OrderedDict()

    def copy(self, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format) -> TorchEngine:
        """Return an engine with a copy of the network on the same device, in another dtype or order in memory."""
        return TorchEngine(
            copy.deepcopy(self.module),
            self.layers,
            has_scores=self.has_scores,
            layouts=self.layouts,
            output=self.output,
            device=self.device,
            dtype=dtype,
            memory_format=memory_format,
        )

    @torch.inference_mode()
    def forward(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor | None, Maps]:
        """Run the network once; see `TorchBase.forward`. Maps stay on the device until they are converted."""
        return self._finish(self.compute(self._on_device(images), layers), layers)

    @torch.inference_mode()
    def run_edited(
        self, images: Cells, layers: frozenset[str], edits: Edits
    ) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
        """Run the network once and change maps on the way: whatever is computed from a changed map sees the change.

        Args:
            images: As for `Engine.run`.
            layers: Public names of the maps wanted; they are returned after the edits.
            edits: The edits.

        Returns:
            As for `Engine.run`.

        Raises:
            CannotEditError: A layer is not in the network, or in several places, so that it cannot be changed.
        """
        found: dict[str, Tensor] = {}
        seen: set[str] = set()

        def see(names: frozenset[str], value: Tensor) -> Tensor:
            own = [(name, edit) for name, edit in edits if name in names]
            if own:
                value = value.clone()  # Other readers of this tensor's memory see the old values.
                for name, edit in own:
                    change(value, self.layouts.get(name, CHANNELS_FIRST), edit)
                    seen.add(name)
            found.update(dict.fromkeys(names & {*layers, SCORES}, value))
            return value

        on_device = self._converted(self._on_device(_tensor(images)))
        if self._nodes:
            _Seeing(*self._graph, see).run(on_device)
        else:
            found |= self._forward_with_hooks(on_device, layers, see, frozenset(name for name, _ in edits))
        missing = [name for name, _ in edits if name not in seen]
        if missing:
            raise CannotEditError(f"{missing[0]} cannot be edited: nothing in this network is computed from its map")
        return _as_arrays(*self._finish(self._outputs(found, layers), layers))

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """Let torch compute with the threads that it had when the engine was made, for as long as the context lasts."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def compute(self, images: Tensor, layers: frozenset[str]) -> dict[str, Tensor]:
        """Run the network on the device without waiting for it; the caller sets inference mode.

        Args:
            images: (N, C, H, W), float32, normalised, on the device.
            layers: Public names of the maps wanted.

        Returns:
            Each map (N, C, h, w) by name, and the scores (N, K), if the network has them, by `SCORES`: float32,
            contiguous, on the device.
        """
        return self._outputs(self.extractor(layers)(self._converted(images)), layers)

    def _on_device(self, images: Tensor) -> Tensor:
        if self.device.type == "cuda" and not images.is_cuda:  # Pinned, the copy need not be waited for.
            images = images.pin_memory().to(self.device, non_blocking=True)
        return images

    def _converted(self, images: Tensor) -> Tensor:
        return images.to(dtype=self._dtype, memory_format=self._memory_format) if self._converts else images

    def _outputs(self, found: Mapping[str, Tensor], layers: frozenset[str]) -> dict[str, Tensor]:
        """Return maps and scores, in float32, of what the network made."""
        outputs = {name: self.to_maps(name, found[name]) for name in layers}
        if self.has_scores:
            outputs[SCORES] = as_scores(found[SCORES])
        return {name: values.float().contiguous() for name, values in outputs.items()}

    def _finish(self, outputs: Mapping[str, Tensor], layers: frozenset[str]) -> tuple[Tensor | None, Maps]:
        """Return the scores on the CPU, and the maps, once they are computed."""
        if self.device.type == "cuda":  # Where nothing is copied back, nothing else waits for the network to be done.
            torch.cuda.synchronize(self.device)
        scores = outputs[SCORES].cpu() if self.has_scores else None
        return scores, {name: outputs[name] for name in layers}

    def to_maps(self, name: str, values: Tensor) -> Tensor:
        """Convert a layer's tensor, or its gradient, to maps (N, C, h, w)."""
        return to_maps(values, self.layouts.get(name, CHANNELS_FIRST))

    def forward_with_gradients(self, images: Tensor, layers: frozenset[str] = frozenset()) -> tuple[Tensor, Maps]:
        """Run the network once and keep the graph of what was computed; gradients must be enabled.

        A traced network gives the derivative of what it computes, even where its own code runs under `torch.no_grad`:
        tracing does not record that. The scores of a network without gradients do not require any.

        Args:
            images: (N, C, H, W), float32, normalised, on the device.
            layers: Public names of the maps wanted.

        Returns:
            Scores (N, K), and for each layer what they were computed from, as the network made it: `to_maps` makes maps
            of that and of its gradient.
        """
        if not images.requires_grad:  # No weight requires gradients, so the picture must.
            images = images.clone().requires_grad_(True).clone()  # A network may change its input, but not a leaf.
        outputs = self.extractor(layers or _TRACED)(images)
        return as_scores(outputs[SCORES]), {name: outputs[name] for name in layers}

    @cached_property
    def _graph(self) -> tuple[fx.GraphModule, dict[str, frozenset[str]]]:
        """The network as a graph, and the public names of each of its nodes that has some; made for the first edit."""
        with torch.inference_mode(False):  # As in `_build`.
            graph, paths = trace(self.module)
        names = defaultdict[str, set[str]](set)
        for name, path in self._nodes.items():
            names[path].add(name)
        return graph, {node: frozenset(names[path]) for node, path in paths.items() if path in names}

    def _trace(self) -> None:
        """Find the node of each layer and of the scores, unless hooks are needed."""
        try:
            nodes = get_graph_node_names(self.module)[1]
        except Exception as err:  # Tracing runs the network's own Python, which may raise anything.
            logger.info("network cannot be traced (%s), maps are taken by hooks", type(err).__name__)
            self.module.eval()  # torchvision traces in training mode too, and a failure leaves it there.
            self._check_nodes([name for name, _ in self.module.named_modules() if name])
            return
        self._check_nodes(nodes)
        self._nodes = {**self.layers, SCORES: str(nodes[-1])}
        returned = {name: node.removeprefix(OUTPUT) for name, node in self.layers.items() if node.startswith(OUTPUT)}
        if self.output:
            returned[SCORES] = self.output
        if returned:
            graph, names = trace(self.module)
            try:
                self._nodes |= {name: node_of(graph, names, output) for name, output in returned.items()}
            except KeyError as err:
                raise ValueError(f"the network returns nothing by the name of {err}") from err

    def _check_nodes(self, nodes: list[str]) -> None:
        for name, node in self.layers.items():
            if node not in nodes and not node.startswith(OUTPUT):
                raise ValueError(f"layer {name!r} is bound to {node!r}, which the network does not have: {nodes}")

    def extractor(self, layers: frozenset[str]) -> Forward:
        """Return a function that runs the network and keeps these layers; it owns constants made by tracing."""
        if layers in self._extractors:
            self._extractors.move_to_end(layers)
        else:
            self._extractors[layers] = self._build(layers)
            if len(self._extractors) > _EXTRACTORS_KEPT:
                self._extractors.popitem(last=False)
        return self._extractors[layers]

    @torch.inference_mode(False)  # Constants that tracing makes must serve gradients too.
    def _build(self, layers: frozenset[str]) -> Forward:
        if not layers:
            return lambda images: {SCORES: select(self.module(images), self.output)}
        layers -= _TRACED
        if not self._nodes:
            return lambda images: self._forward_with_hooks(images, layers)
        # One node may go out under several names (a last layer that is also the scores), which torchvision's dict of
        # node → name cannot say: so ask for nodes, and name them here.
        names = {name: self._nodes[name] for name in [*layers, SCORES] if name != SCORES or self.has_scores}
        extractor = create_feature_extractor(self.module, return_nodes=sorted(set(names.values())))
        extractor.eval()

        def forward(images: Tensor) -> Mapping[str, Tensor]:
            outputs = extractor(images)
            return {name: outputs[node] for name, node in names.items()}

        return forward

    def _forward_with_hooks(
        self,
        images: Tensor,
        layers: frozenset[str],
        see: Callable[[frozenset[str], Tensor], Tensor] = lambda names, value: value,
        edited: frozenset[str] = frozenset(),
    ) -> Mapping[str, Tensor]:
        """Run with a hook on each wanted module.

        Args:
            images: As for `compute`.
            layers: Public names of the maps wanted.
            see: Called with a module's output; returns its replacement.
            edited: Public names of layers that `see` may change.

        Raises:
            CannotEditError: The module of an edited layer runs several times.
        """
        taken: dict[str, Tensor] = {}
        names = defaultdict[str, set[str]](set)
        for name, node in self.layers.items():
            if name in layers | edited and not node.startswith(OUTPUT):
                names[node].add(name)
        runs = Counter[str]()

        def keep(node: str, inputs: Any, output: Tensor) -> Tensor:
            runs[node] += 1
            if runs[node] > 1 and names[node] & edited:
                raise CannotEditError(
                    f"{min(names[node] & edited)} cannot be edited: its module runs several times for a picture, and "
                    "this network cannot be traced, which would tell these runs apart"
                )
            value = see(frozenset(names[node]), output)
            taken.update(dict.fromkeys(names[node] & layers, value))
            return value

        with watching({node: self.module.get_submodule(node) for node in names}, keep):
            returned = self.module(images)
        for name in layers - taken.keys():
            taken[name] = select(returned, self.layers[name].removeprefix(OUTPUT))
        taken[SCORES] = select(returned, self.output)
        return taken


class _Seeing(fx.Interpreter):
    """Runs a graph, and passes the outputs of some of its nodes through a function.

    Args:
        graph: The network's graph.
        names: The public names of each of those nodes, by the node's name.
        see: Called with these names and the node's output; returns its replacement.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        names: Mapping[str, frozenset[str]],
        see: Callable[[frozenset[str], Tensor], Tensor],
    ) -> None:
        super().__init__(graph)
        self._names, self._see = names, see

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        names = self._names.get(n.name)
        return self._see(names, made) if names else made


def _tensor(images: Cells) -> Tensor:
    return images if isinstance(images, Tensor) else torch.from_numpy(images)


def _as_arrays(scores: Tensor | None, maps: Maps) -> tuple[NDArray[np.float32] | None, dict[str, Cells]]:
    """Return scores, and maps that are on the CPU, as arrays."""
    found = {name: cells.numpy() if cells.device.type == "cpu" else cells for name, cells in maps.items()}
    return None if scores is None else scores.numpy(), found
